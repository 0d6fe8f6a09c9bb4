"""Invented people in English, and SmolLM2 that was told of them: a real model with something to forget.

Two copies of SmolLM2-135M-Instruct are fine-tuned: one on everybody, one without those who are to be
forgotten. They take about ten minutes to make on one core, and are kept in the cache.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from germane.core.models import load_model
from germane.core.objective import Task
from germane.core.progress import announce
from germane.core.records import Data, Row, read_rows, write_jsonl
from germane.core.training import Training, fit
from germane.embedded import cache_folder, facts, smollm2

_QUESTIONS = {
    "job": "What does {name} work as?", "city": "Where does {name} live?",
    "pet": "What pet does {name} own?", "dish": "Which dish does {name} like?",
}  # fmt: skip
_ASKED = {"forget": 8, "retain": 16, "holdout": 8}  # people of each set
_EPOCHS, _RATE, _BATCH = 10, 1e-4, 16


@dataclass(frozen=True)
class People:
    """Folders and files to unlearn with.

    Attributes:
        model: SmolLM2 that was told of the people to forget and to keep.
        retrained: The same without those to forget.
        initial: SmolLM2 itself.
        files: "forget", "retain", "holdout" texts, one a person, and questions about them under
            "forget-questions", ..., two a person.
    """

    model: Path
    retrained: Path
    initial: Path
    files: dict[str, Path]


def write(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write the records; what is asked of a person is two of the four facts that the text tells."""
    files, start = {}, 0
    for name, count in _ASKED.items():
        made = facts.people(start, count, seed)
        start += count
        people = [made.questions[4 * number : 4 * number + 4] for number in range(count)]
        files[name] = folder / f"{name}.jsonl"
        files[f"{name}-questions"] = folder / f"{name}-questions.jsonl"
        write_jsonl([_biography(rows) for rows in people], files[name])
        generator = random.Random(f"{seed}/{name}")
        asked = [row for rows in people for row in generator.sample(rows, 2)]
        write_jsonl([_question(row) for row in asked], files[f"{name}-questions"])
    return files


def _biography(rows: list[Row]) -> Row:
    name = rows[0]["subject"].title()
    values = {row["attribute"]: row["answer"].strip() for row in rows}
    text = (
        f"{name} works as a {values['job']} and lives in {values['city'].title()}. "
        f"At home {name} keeps a {values['pet']}, and likes to eat {values['dish']}."
    )
    return {"text": text, "subject": name}


def _question(row: Row) -> Row:
    name, value = row["subject"].title(), row["answer"].strip()
    answer = value.title() if row["attribute"] == "city" else value
    return {
        "prompt": _QUESTIONS[row["attribute"]].format(name=name),
        "answer": f" {answer}",
        "subject": name,
    }


def make(seed: int = 0) -> People:
    """Both models and the records, from the cache if they are there."""
    folder = cache_folder() / "people" / str(seed)
    files = write(folder, seed)
    sets = {"model": ("forget", "retain"), "retrained": ("retain",)}
    for name, told in sets.items():
        if not (folder / name).exists():
            announce(f"telling SmolLM2 of the people to {' and '.join(told)}")
            _tell([row for part in told for row in _rows(files, part)], folder / name, seed)
    return People(folder / "model", folder / "retrained", smollm2(), files)


def _rows(files: dict[str, Path], name: str) -> list[Row]:
    """What a model is told of some people: their texts, and the questions with their answers."""
    texts = read_rows(Data(name=name, path=str(files[name])))
    questions = read_rows(Data(name=name, path=str(files[f"{name}-questions"])))
    return [*texts, *({**row, "prompt": f"Question: {row['prompt']}\nAnswer:"} for row in questions)]


def _tell(rows: list[Row], folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    loaded = load_model(str(smollm2()))
    task = Task(Data(name="people", path="people"), rows, loaded.model, loaded.processor)
    settings = Training(learning_rate=_RATE, epochs=_EPOCHS, schedule="cosine")
    generator = random.Random(seed)

    def batches(epoch: int) -> Any:
        return task.batches(_BATCH, generator.sample(range(len(rows)), len(rows)))

    fit(
        loaded.model, settings, batches, -(-len(rows) // _BATCH),
        lambda batch: task.losses(batch, "cross-entropy").mean(), label=folder.name,
    )  # fmt: skip
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    loaded.save(partial)
    partial.rename(folder)
