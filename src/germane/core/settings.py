"""Typed settings with one way of being refused.

Everything a user can set, from a method's option to a key of a recipe, is a field of a `Settings`
class: type, bounds, default and one-line meaning stand together, and the command line, the YAML
schema, the documentation and the checks are all read from there.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from germane.core.errors import SettingError, nearest

SettingsType = TypeVar("SettingsType", bound="Settings")


class Settings(BaseModel):
    """Base of every typed group of settings: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def validate(kind: type[SettingsType], values: Mapping[str, Any], where: str) -> SettingsType:
    """Build `kind` from `values`, or raise one `SettingError` that names every fault.

    Args:
        kind: The settings class.
        values: Keys and values as a user wrote them.
        where: What the values belong to, for the message: "merge/ties", "steps[0].settings".

    Raises:
        SettingError: For unknown keys, wrong types and values out of bounds, each with the path
            to the key, what is allowed, and what was got.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        faults = [_fault(kind, fault, where) for fault in error.errors()]
        raise SettingError("\n".join(dict.fromkeys(faults))) from None


def _fault(kind: type[Settings], fault: Any, where: str) -> str:
    path = _path(where, fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _fields_at(kind, fault["loc"][:-1])
        name = str(fault["loc"][-1])
        allowed = ", ".join(known) or "none"
        return f"{path}: unknown setting{nearest(name, known)} Known here: {allowed}."
    if fault["type"] == "missing":
        return f"{path}: required, but not given."
    if fault["type"] == "literal_error":
        spelling = nearest(str(fault["input"]), [str(w) for w in _literals(fault)])
        return f"{path}: must be {fault['ctx']['expected']}; got {fault['input']!r}{spelling}"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{path}: {message}; got {fault['input']!r}"


def _literals(fault: Any) -> list[str]:
    return [part.strip(" '") for part in fault["ctx"]["expected"].replace(" or ", ",").split(",")]


def _path(where: str, location: tuple[int | str, ...]) -> str:
    text = where
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text


def _fields_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the settings class found at `location` inside `kind`."""
    for part in location:
        if isinstance(part, int) or part not in kind.model_fields:
            continue
        inner = next(_settings_within(kind.model_fields[part].annotation), None)
        if inner is None:
            return []
        kind = inner
    return list(kind.model_fields)


def _settings_within(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _settings_within(argument)


def describe_type(annotation: Any) -> str:
    """A type as a user reads it: `number`, `text`, `one of a, b`, `list of text`."""
    names: dict[Any, str] = {int: "integer", float: "number", bool: "yes or no", str: "text"}
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_type(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(str(word) for word in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(a) for a in arguments if a is not type(None))
    if origin in (list, tuple):
        return f"list of {describe_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {describe_type(arguments[1])}"
    return getattr(annotation, "__name__", str(annotation))


def describe_bounds(field: FieldInfo) -> str:
    """The field's bounds as mathematics: `> 0, <= 1`, or an empty text."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    parts = []
    for constraint in field.metadata:
        for name, sign in signs.items():
            value = getattr(constraint, name, None)
            if value is not None:
                parts.append(f"{sign} {value:g}")
    return ", ".join(parts)


def describe_default(field: FieldInfo) -> str:
    """The field's default as a user would write it, or `required`."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None or default in ([], {}, ()):
        return "none"
    return "yes" if default is True else "no" if default is False else str(default)
