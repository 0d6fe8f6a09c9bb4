"""The ground task: questions with passages, a chat model and a method give answers, and what they rest on.

Promised for every method: one answer for each question; of every passage whether it was used, and why;
every call to the model in `calls.jsonl`; passages are quoted, and change neither settings nor calls. With
`distractors` the questions are asked with the right passages and a growing number of others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from germane.core.errors import RecordsError
from germane.core.evidence import Row, Scatter, Table
from germane.core.records import Data
from germane.solver import ACCURACY, RIGHT, Passage, Question, Solve, read_questions, with_passages

_KNOWLEDGE = {"entities", "relations", "subgraphs"}  # what some methods answer from instead of passages


class Ground(Solve):
    """Answer questions from passages."""

    task: ClassVar[str] = "ground"

    distractors: list[int] = Field(
        default=[],
        description="numbers of passages that are not right to put beside those that are, each in turn; "
        "default: the passages as they are",
    )

    def read(self, data: Data) -> list[Question]:
        """The questions of a file, those to answer with passages enough."""
        found = read_questions(data)
        if data is not self.questions:
            return found
        wanted = max(self.distractors, default=0)
        for number, question in enumerate(found, 1):
            others = [passage for passage in question.passages if passage.kind != RIGHT]
            if not (question.passages or _KNOWLEDGE & question.more.keys()):
                raise RecordsError(f"{data.path}, record {number}: has no passages to answer from.")
            if self.distractors and (len(others) == len(question.passages) or len(others) < wanted):
                raise RecordsError(
                    f"{data.path}, record {number}: distractors needs a passage of kind 'right' and "
                    f"{wanted} others; it has {len(question.passages) - len(others)} and {len(others)}."
                )
        return found

    def variants(self, questions: list[Question], seed: int) -> dict[str, list[Question]]:
        """The questions with each number of distractors."""
        if not self.distractors:
            return {"": questions}
        return {
            f", {count} distractors": [with_distractors(each, count, seed) for each in questions]
            for count in sorted(set(self.distractors))
        }

    @classmethod
    def summarise(cls, rows: Sequence[Row], references: Sequence[Row]) -> tuple[list[Table], list[Scatter]]:
        """What a comparison shows besides its rows: accuracy by the number of distractors."""
        counts = sorted(
            {
                int(score.metric.split()[1])
                for row in rows
                for score in row.scores
                if score.metric.startswith(f"{ACCURACY}, ")
            }
        )
        if not counts:
            return [], []
        names = [f"{ACCURACY}, {count} distractors" for count in counts]
        found: list[list[str | float | int | None]] = [
            [row.label, *(row.mean(name) for name in names)] for row in rows if row.status != "failed"
        ]
        title = "Accuracy by the number of passages beside the right ones"
        return [Table(title=title, columns=["method", *map(str, counts)], rows=found)], []


def with_distractors(question: Question, count: int, seed: int) -> Question:
    """The question with its right passages and the first `count` others, in an order drawn once for each.

    Args:
        question: With passages that say their kind.
        count: Of other passages.
        seed: Of the order.
    """
    right = [passage for passage in question.passages if passage.kind == RIGHT]
    others: list[Passage] = [passage for passage in question.passages if passage.kind != RIGHT]
    mixed = right + others[:count]
    random.Random(f"{seed}/{question.id}/{count}").shuffle(mixed)
    return with_passages(question, mixed)
