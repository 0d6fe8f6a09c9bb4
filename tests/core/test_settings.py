"""One way of being refused: the path to the key, what is allowed, what was got."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from germane.core.errors import SettingError, nearest
from germane.core.records import Data
from germane.core.settings import Settings, describe_bounds, describe_default, describe_type, validate


class Inner(Settings):
    depth: int = Field(default=1, description="how deep")


class Outer(Settings):
    density: float = Field(default=0.2, gt=0, le=1, description="share kept")
    trim: Literal["model", "tensor"] = Field(default="model", description="where")
    steps: int = Field(ge=0, description="how many")
    inner: Inner = Field(default=Inner(), description="more")
    items: list[Inner] = Field(default=[], description="many")
    flag: bool = Field(default=False, description="or not")
    pairs: dict[str, Any] = Field(default={}, description="pairs")
    limit: int | None = Field(default=None, description="at most")


REFUSED = {
    "unknown": ({"densty": 1}, "here.densty: unknown setting; did you mean 'density'?"),
    "unknown, known listed": ({"zzz": 1}, "Known here: density, trim, steps"),
    "missing": ({}, "here.steps: required, but not given."),
    "type": ({"steps": "many"}, "here.steps: input should be a valid integer"),
    "type says what came": ({"steps": "many"}, "got 'many'"),
    "bounds": ({"steps": 1, "density": 0}, "here.density: input should be greater than 0; got 0"),
    "upper bound": ({"steps": 1, "density": 2}, "less than or equal to 1; got 2"),
    "choice": (
        {"steps": 1, "trim": "modle"},
        "here.trim: must be 'model' or 'tensor'; got 'modle'; did you mean 'model'?",
    ),
    "inside": (
        {"steps": 1, "inner": {"deph": 1}},
        "here.inner.deph: unknown setting; did you mean 'depth'? Known here: depth.",
    ),
    "in a list": (
        {"steps": 1, "items": [{}, {"depth": "x"}]},
        "here.items[1].depth: input should be a valid integer",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(kind):
    values, message = REFUSED[kind]
    with pytest.raises(SettingError) as caught:
        validate(Outer, values, "here")
    assert message in str(caught.value)


def test_every_fault_is_told_at_once():
    with pytest.raises(SettingError) as caught:
        validate(Outer, {"densty": 1, "trim": "x", "steps": -1}, "here")
    assert len(str(caught.value).split("\n")) == 3


def test_what_is_good_is_built():
    built = validate(Outer, {"steps": "3", "density": "0.5"}, "here")
    assert (built.steps, built.density, built.trim) == (3, 0.5, "model")


def test_descriptions():
    fields = Outer.model_fields
    assert describe_type(fields["density"].annotation) == "number"
    assert describe_type(fields["trim"].annotation) == "one of model, tensor"
    assert describe_type(list[str]) == "list of text"
    assert describe_type(int | None) == "integer"
    assert describe_type(dict[str, int]) == "mapping of integer"
    assert describe_type(Annotated[bool, "x"]) == "yes or no"
    assert describe_bounds(fields["density"]) == "> 0, <= 1"
    assert describe_bounds(fields["trim"]) == ""
    assert describe_default(fields["steps"]) == "required"
    assert describe_default(fields["density"]) == "0.2"
    assert describe_default(fields["flag"]) == "no"
    assert describe_default(fields["items"]) == describe_default(fields["limit"]) == "none"


def test_nearest():
    assert nearest("tise", ["ties", "dare"]) == "; did you mean 'ties'?"
    assert nearest("xyz", ["ties"]) == ""


@pytest.mark.parametrize(
    ("text", "name", "path"), [("a=b/c.jsonl", "a", "b/c.jsonl"), ("b/c.jsonl", "c", "b/c.jsonl")]
)
def test_data_from_text(text, name, path):
    data = Data.model_validate(text)
    assert (data.name, data.path) == (name, path)
