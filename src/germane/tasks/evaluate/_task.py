"""The evaluate task: a model and records by role are measured with a suite.

Promised for every suite: a role that is missing, and records or a model of the wrong kind, are
refused before any work; no model is changed; the same model gets the same scores; the result holds
every item with its score, and no model.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from germane.core.checkpoint import Checkpoint, digest, locate
from germane.core.errors import SettingError
from germane.core.evidence import Score, Step
from germane.core.objective import Task
from germane.core.progress import announce
from germane.core.records import Data, read_rows
from germane.edited import load_to_measure
from germane.job import Job, is_reference
from germane.method import Method
from germane.suite import Suite, measure_suite


class Evaluate(Job):
    """Measure a model with a suite, beside the models it is compared with."""

    task: ClassVar[str] = "evaluate"
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(description="the model to measure: a folder or hub id")
    data: list[Data] = Field(default=[], description="the suite's records, by role, as role=path")
    base: str = Field(default="", description="a model to compare with, such as the untouched one")
    retrained: str = Field(
        default="", description="a model trained without the forget records, to compare with"
    )

    def check(self, method: Method) -> None:
        """Roles, records and the kinds of the models, before any work."""
        suite = _suite(method)
        suite.check_roles(self.data)
        suite.check_records(self.roles())
        for path in self.subjects(everything=True).values():
            suite.check_model(path)
        for data in self.evaluate:
            read_rows(data)

    def check_early(self, method: Method) -> None:
        """The same without the models, which may not be there yet."""
        super().check_early(method)
        suite = _suite(method)
        suite.check_roles(self.data)
        if not any(is_reference(data.path) for data in self.data):
            suite.check_records(self.roles())

    def roles(self) -> dict[str, Data]:
        """The suite's records, by role."""
        return {data.name: data for data in self.data}

    def subjects(self, everything: bool = False) -> dict[str, str]:
        """Whose scores there will be; with `everything`, of every model that is read."""
        named = {"result": self.model}
        if self.references or everything:
            named |= {"base": self.base, "retrained": self.retrained}
        return {subject: path for subject, path in named.items() if path}

    def run(self, method: Method, folder: Path, step: Step, seed: int) -> None:
        """Measure, and write every item into `folder`, which exists and is empty."""
        suite = _suite(method)
        with step.stage("check"):
            step.inputs = self._digests()
        with step.stage("evaluate"):
            step.scores = measure_suite(suite, self.subjects(), self.roles(), self.retrained, step, folder)
            step.scores += self._further()

    def _digests(self) -> dict[str, str]:
        models = self.subjects(everything=True).values()
        files = [Path(file) for path in models for file in Checkpoint(locate(path)).files]
        files += [Path(data.path) for data in (*self.data, *self.evaluate)]
        return {str(file): digest(file) for file in files if file.is_file()}

    def _further(self) -> list[Score]:
        """Plain scores on records outside the suite."""
        scores = []
        for subject, path in self.subjects().items() if self.evaluate else ():
            announce(f"scoring {subject}")
            loaded = load_to_measure(path)
            for data in self.evaluate:
                task = Task(data, read_rows(data), loaded.model, loaded.processor)
                scores.append(task.score(subject))
            gc.collect()
        return scores


def _suite(method: Method) -> Suite:
    if not isinstance(method, Suite):
        raise SettingError(f"{method.name}: is no suite.")
    return method
