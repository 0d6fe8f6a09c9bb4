"""The attend task: a model answers multiple-choice questions, read as usual and with a method.

Promised for every method: records and a model of the wrong kind are refused before any work; a model that
leaves the method's block gives outputs identical to the bit to those before it; no model is written; the
same seed gives the same scores; the result holds every question with what was chosen in every order.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from germane.attention import Attending, Attention, Prompt
from germane.core.checkpoint import Checkpoint, digest, locate
from germane.core.errors import RecordsError
from germane.core.evidence import Score, Step
from germane.core.models import Loaded
from germane.core.objective import Task
from germane.core.progress import announce, track
from germane.core.records import Data, Row, read_rows, write_jsonl
from germane.core.statistics import bootstrap_mean, wilson
from germane.edited import load_to_measure
from germane.job import Job, is_reference
from germane.method import Method
from germane.solver import Question, read_questions

Order = tuple[int, ...]


@dataclass(frozen=True)
class Answered:
    """A question in several orders of its options.

    Attributes:
        question: The question, with options.
        orders: Of each time it was asked, the numbers of its options in the order they were shown.
        scores: Of each order, of each option as numbered in the question, its log-probability.
    """

    question: Question
    orders: list[Order]
    scores: list[list[float]]

    @property
    def chosen(self) -> list[int]:
        """Of each order, the likeliest option; of equals the first in the question."""
        return [int(np.argmax(row)) for row in self.scores]

    @property
    def hits(self) -> list[bool]:
        """Of each order, whether the chosen option is a right one."""
        return [self.question.options[index] in self.question.answers for index in self.chosen]

    @property
    def spread(self) -> float:
        """Largest difference that order makes to the log-probability of any option."""
        return float(np.ptp(np.array(self.scores), axis=0).max())


class Attend(Job):
    """Have a model read prompts in another way, and measure that on multiple-choice questions."""

    task: ClassVar[str] = "attend"
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(description="the model that reads: a folder or hub id")
    questions: Data = Field(
        description="records with question, options (a list) and answer (an option, or its letter, or its "
        "number from 0)"
    )
    question_form: str = Field(
        default="Question: {question}\nOptions:", description="what comes before the options"
    )
    option_form: str = Field(default="\n- {option}", description="how an option is shown")
    ending: str = Field(
        default="\nAnswer:", min_length=1, description="what comes after the options, before the answer"
    )
    orders: int = Field(
        default=24,
        gt=0,
        description="orders of a question's options: all if there are no more, else a sample",
    )

    def check(self, method: Method) -> None:
        """Records and the kind of the model, before any work."""
        assert isinstance(method, Attention)
        method.check_model(self.model, Checkpoint(locate(self.model)))
        read_choices(self.questions)
        for data in self.evaluate:
            read_rows(data)

    def check_early(self, method: Method) -> None:
        """The same without the model, which may not be there yet."""
        if not is_reference(self.questions.path):
            read_choices(self.questions)
        for data in self.evaluate:
            if not is_reference(data.path):
                read_rows(data)

    def run(self, method: Method, folder: Path, step: Step, seed: int) -> None:
        """Measure, and write every item into `folder`, which exists and is empty."""
        assert isinstance(method, Attention)
        with step.stage("check"):
            step.inputs = self._digests()
        loaded = load_to_measure(self.model)
        with step.stage("evaluate"):
            if self.references:
                self._measure("base", Attending(loaded.model, loaded.processor), loaded, folder, step, seed)
            with method.applied(loaded.model, loaded.processor) as attending:
                self._measure("result", attending, loaded, folder, step, seed)
        gc.collect()

    def _measure(
        self, subject: str, attending: Attending, loaded: Loaded, folder: Path, step: Step, seed: int
    ) -> None:
        announce(f"asking {subject}")
        answered = self.ask(attending, seed)
        step.scores += scores_of(answered, subject, self.questions.name)
        write_jsonl([_item(found) for found in answered], folder / f"items-{subject}.jsonl")
        for data in self.evaluate:
            task = Task(data, read_rows(data), loaded.model, loaded.processor)
            step.scores.append(task.score(subject))

    def ask(self, attending: Attending, seed: int) -> list[Answered]:
        """Every question in its orders, the given one first; too long a question is found before any."""
        asked = []
        for number, question in enumerate(read_choices(self.questions)):
            generator = random.Random(f"{seed}/{number}")
            orders = orders_of(len(question.options), self.orders, generator)
            asked.append((question, orders))
            attending.lay_out(self._prompt(question, orders[0]))
        answered = []
        for question, orders in track(asked, "asking", len(asked)):
            prompts = [self._prompt(question, order) for order in orders]
            answers = [[f" {option}" for option in question.options]] * len(orders)
            answered.append(Answered(question, orders, attending.log_probabilities(prompts, answers)))
        return answered

    def _prompt(self, question: Question, order: Order) -> Prompt:
        shown = [self.option_form.replace("{option}", question.options[index]) for index in order]
        return [self.question_form.replace("{question}", question.text), shown, self.ending]

    def _digests(self) -> dict[str, str]:
        files = [Path(file) for file in Checkpoint(locate(self.model)).files]
        files += [Path(data.path) for data in (self.questions, *self.evaluate)]
        return {str(file): digest(file) for file in files if file.is_file()}


def orders_of(options: int, count: int, generator: random.Random) -> list[Order]:
    """All orders of so many options, or a sample of `count`; the given order is the first."""
    if math.factorial(options) <= count:
        return list(itertools.permutations(range(options)))
    found = {tuple(range(options)): None}
    while len(found) < count:
        found[tuple(generator.sample(range(options), options))] = None
    return list(found)


def read_choices(data: Data) -> list[Question]:
    """The questions of a file, each with options to choose from.

    Raises:
        RecordsError: Unreadable, empty, or a record without a question, options and an answer among them.
    """
    found = read_questions(data)
    for number, question in enumerate(found, 1):
        place = f"{data.path}, record {number}"
        if len(question.options) < 2 or not all(option.strip() for option in question.options):
            raise RecordsError(f"{place}: needs at least two texts in field 'options', none of them empty.")
        if not question.answers:
            raise RecordsError(f"{place}: field 'answer' must say which of the options is right.")
    return found


def scores_of(answered: Sequence[Answered], subject: str, task: str) -> list[Score]:
    """How often the model is right, and what order does to it."""
    return list(_scores(answered, subject, task))


def _scores(answered: Sequence[Answered], subject: str, task: str) -> Iterator[Score]:
    def share(metric: str, true: Callable[[Answered], bool], higher: bool = True) -> Score:
        count, n = sum(map(true, answered)), len(answered)
        return _score(metric, count / n, wilson(count, n), higher)

    def mean(metric: str, value: Callable[[Answered], float], higher: bool = True) -> Score:
        values = np.array([value(found) for found in answered])
        return _score(metric, float(values.mean()), bootstrap_mean(values), higher)

    def _score(metric: str, value: float, interval: tuple[float, float], higher: bool) -> Score:
        low, high = interval
        return Score(
            subject=subject, task=task, metric=metric, value=value, n=len(answered), low=low, high=high,
            higher_is_better=higher,
        )  # fmt: skip

    yield mean("accuracy", lambda found: float(np.mean(found.hits)))
    yield share("accuracy, given order", lambda found: found.hits[0])
    yield share("accuracy, worst order", lambda found: all(found.hits))
    yield share("accuracy, best order", lambda found: any(found.hits))
    yield share("answers that change with order", lambda found: len(set(found.chosen)) > 1, False)
    yield mean("largest effect of order (nats)", lambda found: found.spread, False)


def _item(found: Answered) -> Row:
    question = found.question
    return {
        "question": question.text, "options": list(question.options), "answer": list(question.answers),
        "orders": [list(order) for order in found.orders], "chosen": found.chosen,
        "scores": found.scores, "effect of order": found.spread,
    }  # fmt: skip
