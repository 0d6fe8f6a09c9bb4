"""What a suite is: an evaluation with items, prompts and scoring of its own.

A suite is a method of the task evaluate; other tasks ask for suites by name and measure their
results with them.
"""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from germane.core.errors import SettingError
from germane.core.evidence import Score, Step
from germane.core.models import Loaded, load_model
from germane.core.progress import announce
from germane.core.records import Data, read_rows
from germane.core.settings import Settings
from germane.method import Method, build

Records = Mapping[str, Data]


class Suite(Method):
    """Base of every suite.

    Attributes:
        roles: Roles of the records it reads, such as "forget", each with what they must be.
        optional: Roles it reads if they are there.
    """

    roles: ClassVar[Mapping[str, str]] = {}
    optional: ClassVar[Mapping[str, str]] = {}

    def check_records(self, records: Records) -> None:
        """Raise a `GermaneError` unless every role is filled with records that can be read."""
        for role, meaning in self.roles.items():
            if role not in records:
                raise SettingError(f"{self.name}: needs {meaning}: --data {role}=FILE.")
        for role in (*self.roles, *self.optional):
            if role in records:
                read_rows(records[role])

    def calibrate(self, retrained: Loaded | None, records: Records) -> Any:
        """What must be known of the retrained model before any score, if there is one."""
        return None

    @abstractmethod
    def score(
        self, subject: str, loaded: Loaded, records: Records, calibration: Any, step: Step
    ) -> list[Score]:
        """Measure one model.

        Args:
            subject: Whose scores they are.
            loaded: The model; left as it is.
            records: Role -> records.
            calibration: What `calibrate` returned.
            step: Items, tables and findings go here.
        """


class SuiteRequest(Settings):
    """A suite by name, with settings."""

    name: str = Field(description="the suite")
    settings: dict[str, Any] = Field(default={}, description="its settings")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def build(self) -> Suite:
        """The suite, its settings checked."""
        suite = build(f"evaluate/{self.name.removeprefix('evaluate/')}", self.settings)
        assert isinstance(suite, Suite)
        return suite


def measure_suites(
    requests: Sequence[SuiteRequest],
    subjects: Mapping[str, str],
    records: Records,
    retrained: str,
    step: Step,
) -> list[Score]:
    """Scores of every suite for every subject, one model in memory at a time."""
    scores: list[Score] = []
    for request in requests:
        suite = request.build()
        announce(f"measuring with {suite.name}")
        calibration = suite.calibrate(load_model(retrained) if retrained else None, records)
        for subject, path in subjects.items():
            scores += suite.score(subject, load_model(path), records, calibration, step)
            gc.collect()
    return scores
