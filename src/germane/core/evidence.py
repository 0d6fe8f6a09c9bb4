"""The evidence of a run: what was asked, what was done, what came out, and how sure that is.

`Evidence` is the one record that everything else is drawn from: `evidence.json` is its JSON,
`report.html` and the model card are pictures of it, `compare` puts several side by side.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Severity = Literal["note", "warning", "serious"]
FILE_NAME = "evidence.json"
_REPORTED = (  # libraries whose version may change a result
    "torch", "transformers", "diffusers", "sentence-transformers", "safetensors", "peft", "numpy", "bm25s",
    "ir-measures",
)  # fmt: skip


class Record(BaseModel):
    """Base of the parts of the evidence."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Score(Record):
    """One measured number.

    Attributes:
        subject: Whose number it is: "result", "base", "own" (a pool member on its own task), ...
        task: What was measured: the name of the data.
        metric: "accuracy", "perplexity", ...
        value: The number itself; accuracies are shares between 0 and 1.
        n: Records behind it.
        low: Lower end of the 95 % interval.
        high: Upper end.
        higher_is_better: How to read it.
    """

    subject: str
    task: str
    metric: str
    value: float
    n: int
    low: float
    high: float
    higher_is_better: bool = True


class Finding(Record):
    """One thing worth saying about inputs or result.

    Attributes:
        code: Stable short name: "duplicate-of-base", "no-effect", "destroyed", ...
        severity: How much it matters.
        about: The file, member or step meant.
        message: One sentence: what was found, and what follows.
    """

    code: str
    severity: Severity
    about: str
    message: str


class Share(Record):
    """What one member of a pool gave to the result, and why.

    Attributes:
        member: Its label.
        share: Weight in the result; the shares of a run are at least 0 and sum to 1 with the base.
        taken: Whether anything of it is in the result.
        reason: One sentence: its score at each step, or why it was left out.
    """

    member: str
    share: float
    taken: bool
    reason: str


class Series(Record):
    """One line of a plot: a quantity at each step of an iterative method."""

    name: str
    steps: list[float]
    values: list[float]


class Plot(Record):
    """Lines that share axes."""

    title: str
    x: str
    y: str
    series: list[Series]


class ScatterPoint(Record):
    """One point of a scatter plot."""

    name: str
    x: float
    y: float
    reference: bool = False


class Scatter(Record):
    """Points between two aims, of which more of one costs the other.

    Attributes:
        lower_x: Whether less of x is better; more of y always is.
    """

    title: str
    x: str
    y: str
    points: list[ScatterPoint]
    lower_x: bool = True


class Table(Record):
    """A table a method or a comparison wants shown as it is."""

    title: str
    columns: list[str]
    rows: list[list[str | float | int | None]]


class Step(Record):
    """One step of a recipe: a task done by a method."""

    task: str
    method: str
    summary: str = ""
    paper: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    job: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    inputs: dict[str, str] = Field(default_factory=dict)  # path -> digest
    seconds: float = 0.0
    timings: dict[str, float] = Field(default_factory=dict)  # stage -> seconds
    peak_memory_bytes: int = 0
    findings: list[Finding] = Field(default_factory=list)
    scores: list[Score] = Field(default_factory=list)
    shares: list[Share] = Field(default_factory=list)
    plots: list[Plot] = Field(default_factory=list)
    tables: list[Table] = Field(default_factory=list)
    facts: dict[str, Any] = Field(default_factory=dict)  # what else a method wants on record

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to `timings[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.timings[name] = round(self.timings.get(name, 0.0) + spent, 4)


class Row(Record):
    """One row of a comparison: a method with settings and a seed, or a reference.

    Attributes:
        label: What is printed in the first column.
        status: "done", "failed", or "reference" (the base, or each member on its own task).
        error: The one-line message of a failed row.
    """

    label: str
    method: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    status: Literal["done", "failed", "reference"] = "done"
    error: str = ""
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    scores: list[Score] = Field(default_factory=list)
    folder: str = ""

    def mean(self, metric: str) -> float | None:
        """Mean over tasks of one metric, or None where the row has no such score."""
        values = [score.value for score in self.scores if score.metric == metric]
        return sum(values) / len(values) if values else None


class Evidence(Record):
    """All that a run leaves, one JSON file."""

    kind: Literal["run", "compare"] = "run"
    title: str = ""
    headline: str = ""  # the finding in the maker's own words; without, the report works one out
    germane: str = ""
    recipe: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str] = Field(default_factory=dict)
    steps: list[Step] = Field(default_factory=list)
    rows: list[Row] = Field(default_factory=list)
    plots: list[Plot] = Field(default_factory=list)
    scatters: list[Scatter] = Field(default_factory=list)
    tables: list[Table] = Field(default_factory=list)

    @classmethod
    def begin(cls, title: str, recipe: dict[str, Any], kind: Literal["run", "compare"] = "run") -> Evidence:
        """Evidence with versions and machine filled in."""
        return cls(
            kind=kind,
            title=title,
            germane=_version("germane"),
            recipe=recipe,
            versions={name: _version(name) for name in _REPORTED if _version(name)},
            machine={
                "python": platform.python_version(),
                "system": f"{platform.system()} {platform.machine()}",
            },
        )

    @property
    def scores(self) -> list[Score]:
        """The scores of the last step, the one the result comes from."""
        return self.steps[-1].scores if self.steps else []

    @property
    def findings(self) -> list[Finding]:
        """The findings of every step."""
        return [finding for step in self.steps for finding in step.findings]

    def write(self, folder: Path) -> None:
        """Write `evidence.json` into `folder`."""
        (folder / FILE_NAME).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        """The evidence a run left in `folder`."""
        return cls.model_validate_json((folder / FILE_NAME).read_text(encoding="utf-8"))


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
