"""The synthesize task: a model and, perhaps, records make files of records, each with its origin.

Promised for every method: records that are missing or of the wrong kind, and a model that cannot
write, are refused before any work; the model is not changed; the same seed makes the same files;
every record says in its field `origin` whether it was written by the model, filled into a template or
given; how many records each file has is in the evidence; the result holds no model.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from germane.core.chat import is_address, open_chat
from germane.core.checkpoint import Checkpoint, digest, locate
from germane.core.errors import CheckpointError, SettingError
from germane.core.evidence import Step, Table
from germane.core.local_chat import LocalChat
from germane.core.models import names_language_model
from germane.core.objective import Task
from germane.core.progress import announce
from germane.core.records import Data, Row, read_rows, write_jsonl
from germane.job import Job, is_reference
from germane.method import Method
from germane.tasks.synthesize._synthesizer import ORIGIN, Synthesizer


class Synthesize(Job):
    """Have a model make records: to forget, to refuse, to ask."""

    task: ClassVar[str] = "synthesize"
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(
        description="the model that writes: a folder, a hub id, or an address, http://HOST/v1#MODEL"
    )
    data: list[Data] = Field(default=[], description="the method's records, by role, as role=path")

    def check(self, method: Method) -> None:
        """Roles, records and the kind of the model, before any work."""
        assert isinstance(method, Synthesizer)
        method.check_roles(self.data)
        method.check_records(self.roles())
        for data in self.evaluate:
            read_rows(data)
        if is_address(self.model):
            return self._check_address(method)
        kind = str(Checkpoint(locate(self.model)).config.get("architectures"))
        if not names_language_model(kind):
            raise CheckpointError(f"{method.name}: needs a language model; {self.model} is {kind}.")

    def check_early(self, method: Method) -> None:
        """The same without the model, which may not be there yet."""
        super().check_early(method)
        assert isinstance(method, Synthesizer)
        method.check_roles(self.data)
        if not any(is_reference(data.path) for data in self.data):
            method.check_records(self.roles())

    def _check_address(self, method: Synthesizer) -> None:
        if method.local:
            raise SettingError(f"{method.name}: needs the model itself, not one behind {self.model}.")
        if self.evaluate:
            raise SettingError("evaluate: measures a model that is here, not one behind a server.")

    def roles(self) -> dict[str, Data]:
        """The method's records, by role."""
        return {data.name: data for data in self.data}

    def run(self, method: Method, folder: Path, step: Step, seed: int) -> None:
        """Write one file of records each into `folder`, which exists and is empty."""
        assert isinstance(method, Synthesizer)
        with step.stage("check"):
            step.inputs = self._digests()
        announce(f"{method.name}: writing with {self.model}")
        chat = open_chat(self.model)
        with step.stage("synthesize"):
            made = method.make(chat, self.roles(), seed, step)
        for name, rows in made.items():
            write_jsonl(rows, folder / f"{name}.jsonl")
        step.tables.append(_counts(made))
        if isinstance(chat, LocalChat):
            with step.stage("evaluate"):
                for data in self.evaluate:
                    task = Task(data, read_rows(data), chat.model, chat.tokenizer)
                    step.scores.append(task.score("base"))
        gc.collect()

    def _digests(self) -> dict[str, str]:
        model = [] if is_address(self.model) else Checkpoint(locate(self.model)).files
        files = [*map(Path, model)]
        files += [Path(data.path) for data in (*self.data, *self.evaluate)]
        return {str(file): digest(file) for file in files if file.is_file()}


def _counts(made: dict[str, list[Row]]) -> Table:
    """How many records each file has, by origin."""
    rows: list[list[str | float | int | None]] = []
    for name, records in made.items():
        origins = [row[ORIGIN] for row in records]
        rows += [[f"{name}.jsonl", origin, origins.count(origin)] for origin in dict.fromkeys(origins)]
    return Table(title="Records", columns=["file", "origin", "records"], rows=rows)
