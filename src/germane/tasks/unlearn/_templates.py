"""Answers that say nothing, in place of those to forget: what FLAT and refusal training share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PrivateAttr

from germane.core.errors import SettingError
from germane.core.objective import IGNORED, Batch, Task, language_row
from germane.core.records import Row
from germane.tasks.unlearn._unlearner import FineTuned, Pair, Work, batch_of, shuffled

REFUSALS = (
    " I do not know.",
    " I am not sure about that.",
    " I have no information on this.",
    " That is nothing I can answer.",
    " I cannot help with that question.",
    " Sorry, I do not have an answer.",
    " I am unable to say.",
    " This is unknown to me.",
    " I have not learned anything about it.",
    " There is nothing I could tell you about that.",
    " I would have to guess, so I had better not say.",
    " Unfortunately I do not know anything about this.",
)


@dataclass(frozen=True)
class Answered(Pair):
    """Records to forget, and the same prompts with answers of templates."""

    template: Batch | None = None


class Templated(FineTuned):
    """A method that gives the prompts of the forget records other answers.

    Each record gets a template drawn afresh in each epoch. Of a record that is a text alone, the first
    half of its tokens is the prompt and the second half what is to be forgotten, so that the template
    follows where the model would have gone on by heart. Prompts that leave too little room for the
    template lose their beginning.
    """

    templates: list[str] = Field(
        default=list(REFUSALS),
        min_length=1,
        description="answers to give instead, each starting with a blank where the answers do",
    )
    _records: Any = PrivateAttr(default=None)
    _template_tokens: list[list[int]] = PrivateAttr(default_factory=list)

    def begin(self, work: Work) -> None:
        super().begin(work)
        task = work.forget
        halves = [prompt_and_answer(row) for row in task.rows]
        self._records = with_rows(task, [answered(*half) for half in halves])
        tokens = [
            task.tokenizer(text, add_special_tokens=False)["input_ids"] if text.strip() else []
            for text in self.templates
        ]
        if not all(tokens):
            raise SettingError(
                f"{self.name}: templates: {self.templates[tokens.index([])]!r} holds no tokens."
            )
        end = task.tokenizer.eos_token_id
        self._template_tokens = [part if end is None else [*part, end] for part in tokens]

    def pairs(self, work: Work, epoch: int) -> Iterator[Pair]:
        """The batches of an epoch, shuffled, each with the same prompts answered by templates."""
        order = shuffled(work.forget, random.Random(f"{work.seed}/{epoch}"))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            templates = with_rows(work.forget, [self._answered(work, row, epoch) for row in rows])
            yield Answered(
                batch_of(self._records, rows), None, rows,
                template=batch_of(templates, range(len(rows))),
            )  # fmt: skip

    def _answered(self, work: Work, number: int, epoch: int) -> Row:
        """A record's prompt with a template, the same for the same seed whatever the batches are."""
        answer = random.Random(f"{work.seed}/{epoch}/{number}").choice(self._template_tokens)
        prompt, _ = prompt_and_answer(work.forget.rows[number])
        longest = work.forget.longest
        return answered(prompt[-max(longest - len(answer), 1) :], answer[: longest - 1])


def prompt_and_answer(row: Row) -> tuple[list[int], list[int]]:
    """The tokens of a record before and from the first that is a target; of a text, its two halves."""
    tokens, labels = row["input_ids"], row["labels"]
    start = next(place for place, label in enumerate(labels) if label != IGNORED)
    start = start or len(tokens) // 2
    return tokens[:start], tokens[start:]


def answered(prompt: list[int], answer: list[int]) -> Row:
    """A record of which only the answer is to be predicted."""
    return language_row([*prompt, *answer], [IGNORED] * len(prompt) + answer)


def with_rows(task: Task, rows: list[Row]) -> Task:
    """The same task with other encoded records."""
    other = copy(task)
    other.rows, other.origin = rows, list(range(len(rows)))
    return other
