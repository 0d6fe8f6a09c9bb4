"""What a suite is: an evaluation with items, prompts and scoring of its own.

A suite is a method of the task evaluate; other tasks ask for suites by name and measure their
results with them.
"""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from germane.core.checkpoint import Checkpoint, locate
from germane.core.errors import CheckpointError
from germane.core.evidence import Score, Step
from germane.core.models import Loaded, load_model, names_language_model
from germane.core.progress import announce
from germane.core.records import Row, write_jsonl
from germane.core.settings import Settings
from germane.edited import load_to_measure
from germane.method import build
from germane.roles import Records, RoleMethod


@dataclass
class Measured:
    """What a suite found of one model.

    Attributes:
        scores: The numbers.
        items: One row an item, to be looked at: metric, prompt, answer, score.
    """

    scores: list[Score] = field(default_factory=list)
    items: list[Row] = field(default_factory=list)


class Suite(RoleMethod):
    """Base of every suite."""

    def check_model(self, path: str) -> None:
        """Raise a `CheckpointError` unless it is a model of the kind the suite measures."""
        kind = str(Checkpoint(locate(path)).config.get("architectures"))
        language = names_language_model(kind)
        if "language model" in self.information.needs and not language:
            raise CheckpointError(f"{self.name}: measures language models; {path} is {kind}.")
        if "classifier" in self.information.needs and language:
            raise CheckpointError(f"{self.name}: measures classifiers; {path} is {kind}.")

    def utility(self, subject: str, loaded: Loaded, records: Records) -> list[Score]:
        """The score of what should stay, if the suite has one: for what is measured again and again."""
        return []

    def calibrate(self, retrained: Loaded | None, records: Records) -> Any:
        """What must be known of the retrained model before any score, if there is one."""
        return None

    @abstractmethod
    def score(
        self, subject: str, loaded: Loaded, records: Records, calibration: Any, step: Step
    ) -> Measured:
        """Measure one model.

        Args:
            subject: Whose scores they are.
            loaded: The model; left as it is.
            records: Role -> records.
            calibration: What `calibrate` returned.
            step: Tables, facts and findings go here.
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
    folder: Path,
) -> list[Score]:
    """Scores of every suite for every subject; each suite's items go to a folder of its name."""
    scores: list[Score] = []
    for request in requests:
        suite = request.build()
        place = folder / "suites" / suite.name.rpartition("/")[2]
        place.mkdir(parents=True)
        scores += measure_suite(suite, subjects, records, retrained, step, place)
    return scores


def measure_suite(
    suite: Suite,
    subjects: Mapping[str, str],
    records: Records,
    retrained: str,
    step: Step,
    folder: Path | None = None,
) -> list[Score]:
    """Scores of one suite for every subject.

    Args:
        suite: The suite.
        subjects: Subject -> model.
        records: Role -> records.
        retrained: A model trained without what is to be unlearned, or "".
        step: Tables, facts and findings go here.
        folder: Where every subject's items go, as `items-SUBJECT.jsonl`; None keeps none.
    """
    announce(f"measuring with {suite.name}")
    calibration = suite.calibrate(load_model(retrained) if retrained else None, records)
    scores: list[Score] = []
    for subject, path in subjects.items():
        measured = suite.score(subject, load_to_measure(path), records, calibration, step)
        scores += measured.scores
        if folder is not None:
            write_jsonl(measured.items, folder / f"items-{subject}.jsonl")
        gc.collect()
    return scores
