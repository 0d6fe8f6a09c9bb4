"""What a method is, and where methods are found.

A method is one class in one file: `germane/TASK/METHOD_NAME.py` holds the method
`TASK/METHOD-NAME`, decorated with `@method`. Files whose names start with an underscore hold what
the methods of a task share. Nothing else has to be edited: the folder is the register. A package
of your own adds methods by an entry point in the group `germane.methods`, named `TASK/METHOD-NAME`
and pointing at the module.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from germane.core.errors import UnknownName, nearest
from germane.core.settings import Settings, validate

Need = Literal[
    "data",
    "labels",
    "chat model",
    "training",
    "retain",
    "general",
    "demonstrations",
    "passages",
    "language model",
    "classifier",
]
MethodType = TypeVar("MethodType", bound="type[Method]")

_TASKS = Path(__file__).parent / "tasks"
_ENTRY_POINTS = "germane.methods"


@dataclass(frozen=True)
class Information:
    """What is known of a method before it runs.

    Attributes:
        name: `TASK/METHOD-NAME`.
        summary: First line of the class docstring.
        paper: arXiv identifier ("2306.01708"), or "" for what has no paper.
        code: Official repository, or "".
        needs: What a user must supply beyond the task's own arguments.
    """

    name: str
    summary: str
    paper: str
    code: str
    needs: tuple[Need, ...]

    @property
    def task(self) -> str:
        """The part of the name before the slash."""
        return self.name.split("/")[0]


class Method(Settings):
    """Base of every method: its fields are its settings."""

    information: ClassVar[Information]

    @property
    def name(self) -> str:
        """`TASK/METHOD-NAME`."""
        return self.information.name


_registered: dict[str, type[Method]] = {}


def method(
    name: str, *, paper: str = "", code: str = "", needs: tuple[Need, ...] = ()
) -> Callable[[MethodType], MethodType]:
    """Register a class as the method `name` ("TASK/METHOD-NAME")."""

    def register(kind: MethodType) -> MethodType:
        summary = (inspect.getdoc(kind) or "").split("\n")[0]
        kind.information = Information(name, summary, paper, code, needs)
        _registered[name] = kind
        return kind

    return register


def tasks() -> list[str]:
    """Names of the tasks that have at least one method."""
    return sorted({name.split("/")[0] for name in names()})


def names(task: str | None = None) -> list[str]:
    """Names of all methods, or of one task's, without importing any."""
    found = [name for name in _modules() if task is None or name.startswith(f"{task}/")]
    if task is not None and not found:
        raise UnknownName(f"no task {task!r}{nearest(task, tasks())} Tasks: {', '.join(tasks())}.")
    return sorted(found)


def load(name: str) -> type[Method]:
    """The class of the method `name`; its module is imported now.

    Raises:
        UnknownName: With the nearest spellings.
    """
    modules = _modules()
    if name not in modules:
        task = name.split("/")[0]
        known = names(task) if "/" in name else list(modules)
        raise UnknownName(f"no method {name!r}{nearest(name, known)} Known: {', '.join(known)}.")
    importlib.import_module(modules[name])
    return _registered[name]


def build(name: str, settings: Mapping[str, Any], where: str | None = None) -> Method:
    """The method `name` with these settings, every one checked."""
    return validate(load(name), settings, where or name)


@functools.cache
def _modules() -> dict[str, str]:
    """Method name -> module, from the folders of this package and from entry points."""
    found = {}
    for file in _TASKS.glob("*/*.py"):
        if file.name.startswith("_"):
            continue
        name = f"{file.parent.name}/{file.stem.replace('_', '-')}"
        found[name] = f"germane.tasks.{file.parent.name}.{file.stem}"
    for point in entry_points(group=_ENTRY_POINTS):
        if re.fullmatch(r"[a-z]+/[a-z0-9-]+", point.name):
            found[point.name] = point.value
    return found
