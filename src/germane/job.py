"""What a task is asked to do: its own arguments, apart from the method that does it.

A task is a folder with `_task.py`, which holds one subclass of `Job`. Its fields are the task's
arguments on the command line, in recipes and in Python; `check` and `run` are all that the rest of
germane needs to know of the task.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from germane.core.evidence import Row, Scatter, Step, Table
from germane.core.records import Data, read_rows
from germane.core.settings import Settings
from germane.method import Method, names

REFERENCE = "step:"  # before the name of an earlier step of a recipe, whose result is meant


class Job(Settings):
    """Base of the tasks' arguments."""

    task: ClassVar[str]
    # Fields given by position on the command line, in this order; a list takes what is left.
    paths: ClassVar[tuple[str, ...]] = ()

    evaluate: list[Data] = Field(default=[], description="records to score on, as name=path")
    references: bool = Field(
        default=True, description="also score what the result is compared with, such as the base"
    )

    @abstractmethod
    def check(self, method: Method) -> None:
        """Raise a `GermaneError` for all that can be known to be wrong before work starts."""

    def check_early(self, method: Method) -> None:
        """The part of `check` that needs no earlier step's result, for a job that waits for one.

        Runs before the first step: a task that can tell more of itself than its records adds to it.
        """
        for data in records_of(self):
            if not is_reference(data.path):
                read_rows(data)

    @abstractmethod
    def run(self, method: Method, folder: Path, step: Step, seed: int) -> None:
        """Do the work: write the result into `folder`, and what there is to say into `step`."""

    @classmethod
    def summarise(cls, rows: Sequence[Row], references: Sequence[Row]) -> tuple[list[Table], list[Scatter]]:
        """What a comparison of methods of this task shows besides its rows."""
        return [], []


def is_reference(path: str) -> bool:
    """Whether a path stands for the result of an earlier step."""
    return path.startswith(REFERENCE)


def records_of(job: Job) -> Iterator[Data]:
    """All records that a job reads."""
    for name in type(job).model_fields:
        value = getattr(job, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Data):
                yield item


def job_class(task: str) -> type[Job]:
    """The `Job` of a task.

    Raises:
        UnknownName: With the nearest spellings.
    """
    names(task)
    module = importlib.import_module(f"germane.tasks.{task}._task")
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Job) and value.__module__ == module.__name__
    ]
    return kinds[0]
