"""What sentences beside a question cost a model, that leave the answer as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from germane.core.choices import Choice, Choosing
from germane.core.errors import RecordsError
from germane.core.evidence import Finding, Score, Step
from germane.core.local_chat import LocalChat
from germane.core.models import Loaded
from germane.core.records import Data, Row, open_rows
from germane.core.statistics import bootstrap_mean, wilson
from germane.method import method
from germane.roles import Records
from germane.solver import Question, chosen_option
from germane.suite import Measured, Suite

DISTRACTED = "distracted"
# How a question is asked.
ORIGINAL, REORDERED = "original", "original, options as distracted"
UNRELATED, DISTRACTION = "with another question's sentences", "distracted"
WARNED, WARNED_ORIGINAL = "distracted, warned", "original, warned"
# What is subtracted from what.
DROPS = {
    "drop": (ORIGINAL, DISTRACTION),
    "drop by order alone": (ORIGINAL, REORDERED),
    "drop by another question's sentences": (ORIGINAL, UNRELATED),
    "drop, warned": (WARNED_ORIGINAL, WARNED),
}
_WARNING = (
    "Some of what the question says may have nothing to do with its answer. Answer from what matters, and "
    "ignore the rest."
)


@dataclass
class Item:
    """A question without and with its sentences.

    Attributes:
        id: Of the question.
        source: Where it is from.
        original: As it was.
        distracted: With sentences, and its options in their order there.
        choices: How it was asked -> what the model made of it.
    """

    id: str
    source: str
    original: Question
    distracted: Question
    choices: dict[str, Choice] = field(default_factory=dict)

    @property
    def added(self) -> tuple[str, str] | None:
        """What stands before and after the original; None where it was not kept as it is."""
        before, found, after = self.distracted.text.partition(self.original.text)
        return (before, after) if found else None

    def right(self, way: str) -> bool:
        """Whether it was answered rightly, asked in this way."""
        return self.original.answers[0] in self.choices[way].picks


@method(
    "evaluate/contextual-distraction",
    paper="2502.01609",
    code="wyf23187/LLM_CDV",
    needs=("language model",),
)
class ContextualDistractionSuite(Choosing, Suite):
    """What a model loses by sentences beside a question that leave its answer.

    Huang et al., "Breaking Focus: Contextual Distraction Curse in Large Language Models", 2025. Accuracy on
    the original questions and on the first distraction of each, and the difference, over the same
    questions; also after a warning to ignore what does not matter, the paper's remedy by prompt. Records
    are the `distracted.jsonl` of synthesize/contextual-distraction, or the files that the official code
    writes (a list with `good_questions`). Questions of several sources are also scored by source.

    Two controls say what of the drop is due to the sentences' content: the original with its options in
    the distracted order, since a search over shuffled options finds unlucky orders, and the original in
    that order with the sentences of another question, since any text costs something. (In the paper's
    TruthfulQA the right option is the first of every original, and anywhere in the distractions.) Intervals
    of drops are bootstrapped over questions.

    Distractions are found against one model. On that model the drop is what the search looked for, so it
    shows that there are such sentences, not how often they are met; on other models it shows transfer. A
    row for each of several models is the paper's transfer table.

    Use it with `base` or over several models, and before and after training on `preferences.jsonl`. Not to
    compare models by their drop on examples that were found against one of them.

    Differs from the code: in the official files, questions that were never answered stand among the
    distractions, as themselves; they are left out here. The option is read by rules, not by another model:
    one that cannot be read counts as wrong, and how many were is a fact. By likelihood, the default,
    nothing is generated. The controls are not the paper's, which has a model pad and paraphrase.
    """

    roles: ClassVar[Mapping[str, str]] = {
        DISTRACTED: "questions with distracting sentences, beside the original ones",
    }

    warning: str = Field(
        default=_WARNING,
        description="said before the question to have the sentences ignored; empty: not measured",
    )

    def check_records(self, records: Records) -> None:
        """Every record holds the question without and with its sentences."""
        if DISTRACTED not in records:
            super().check_records(records)
        read_items(records[DISTRACTED])

    def score(
        self, subject: str, loaded: Loaded, records: Records, calibration: Any, step: Step
    ) -> Measured:
        """Ask every question in every way."""
        data = records[DISTRACTED]
        items = read_items(data)
        chat = LocalChat(loaded.model, loaded.processor, subject)
        self._ask(chat, items, ORIGINAL, [item.original for item in items])
        self._ask(chat, items, REORDERED, [_reordered(item) for item in items])
        self._ask(chat, items, UNRELATED, with_others(items))
        self._ask(chat, items, DISTRACTION, [item.distracted for item in items])
        if self.warning:
            self._ask(chat, items, WARNED_ORIGINAL, [item.original for item in items], self.warning)
            self._ask(chat, items, WARNED, [item.distracted for item in items], self.warning)
        unread = sum(not any(choice.picks) for item in items for choice in item.choices.values())
        step.facts[f"answers that name no option, {subject}"] = unread
        scores = list(all_scores(subject, data.name, items))
        step.findings += by_order(subject, scores)
        return Measured(scores, [_row(item) for item in items])

    def _ask(
        self, chat: LocalChat, items: Sequence[Item], way: str, questions: Sequence[Question | None],
        note: str = "",
    ) -> None:  # fmt: skip
        """Note what the model makes of the items' questions, of those that there are."""
        asked = [(item, question) for item, question in zip(items, questions, strict=True) if question]
        choices = self.choose(chat, [question for _, question in asked], chosen_option, note=note)
        for (item, _), choice in zip(asked, choices, strict=True):
            item.choices[way] = choice


def read_items(data: Data) -> list[Item]:
    """The first distraction of each question.

    Raises:
        RecordsError: A record lacks a field, its answer is none of its options, or none is a distraction.
    """
    found: dict[tuple[str, str], Item] = {}
    for number, row in enumerate(open_rows(data), 1):
        for form in _forms(row, number):
            item = _item(form, f"{data.path}, record {number}", data.name)
            if item.distracted.text != item.original.text:
                found.setdefault((item.source, item.id), item)
    if not found:
        raise RecordsError(f"{data.path}: no record is a distraction: question and original are the same.")
    return list(found.values())


def _forms(row: Row, number: int) -> list[Row]:
    """A record in germane's form: of an official one, its first distraction, if it has any."""
    if "good_questions" not in row:
        return [{"id": number, **row}]
    return [
        {
            "id": row.get("id", number), "source": row.get("source"), "original": row.get("question"),
            "original options": row.get("choices"), "question": good.get("question"),
            "options": good.get("choices"), "answer": good.get("ground_truth"),
        }
        for good in (row["good_questions"] or [])[:1]
    ]  # fmt: skip


def _item(row: Row, place: str, name: str) -> Item:
    texts = [row.get("question"), row.get("original")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise RecordsError(
            f"{place}: needs texts in fields 'question' and 'original'. Fields: {', '.join(row)}."
        )
    options: Any = row.get("options")
    first: Any = row.get("original options") or options
    for those in (options, first):
        if not isinstance(those, list) or len(those) < 2 or row.get("answer") not in those:
            raise RecordsError(f"{place}: needs a list 'options' of two or more texts that holds 'answer'.")
    answers, key = (str(row["answer"]),), str(row["id"])
    original, distracted = (
        Question(key, str(text), answers, tuple(map(str, those)))
        for text, those in ((row["original"], first), (row["question"], options))
    )
    return Item(key, str(row.get("source") or name), original, distracted)


def _reordered(item: Item) -> Question:
    return replace(item.original, options=item.distracted.options)


def with_others(items: Sequence[Item]) -> list[Question | None]:
    """Each original, options as distracted, with the sentences of the next other question.

    None for all where there is no other question whose sentences can be told from its text.
    """
    known = [(number, item.added) for number, item in enumerate(items) if item.added]
    found: list[Question | None] = []
    for number, item in enumerate(items):
        following = [added for other, added in known if other > number]
        following += [added for other, added in known if other < number]
        if not following:
            found.append(None)
            continue
        before, after = following[0]
        found.append(replace(_reordered(item), text=f"{before}{item.original.text}{after}"))
    return found


def all_scores(subject: str, task: str, items: Sequence[Item]) -> Iterator[Score]:
    """Accuracies and drops over all items, and by source where there are several."""
    yield from _scores(subject, task, items, "")
    sources = dict.fromkeys(item.source for item in items)
    for source in sources if len(sources) > 1 else ():
        yield from _scores(subject, task, [item for item in items if item.source == source], f", {source}")


def _scores(subject: str, task: str, items: Sequence[Item], suffix: str) -> Iterator[Score]:
    ways = (ORIGINAL, REORDERED, UNRELATED, DISTRACTION, WARNED_ORIGINAL, WARNED)
    for way in ways:
        asked = [item.right(way) for item in items if way in item.choices]
        if asked:
            low, high = wilson(sum(asked), len(asked))
            yield Score(
                subject=subject, task=task, metric=f"accuracy, {way}{suffix}",
                value=sum(asked) / len(asked), n=len(asked), low=low, high=high,
            )  # fmt: skip
    for name, (before, after) in DROPS.items():
        both = [item for item in items if {before, after} <= item.choices.keys()]
        if both:
            values = np.array([float(item.right(before)) - float(item.right(after)) for item in both])
            low, high = bootstrap_mean(values)
            yield Score(
                subject=subject, task=task, metric=f"{name}{suffix}", value=float(values.mean()),
                n=len(both), low=low, high=high, higher_is_better=False,
            )  # fmt: skip


def by_order(subject: str, scores: Sequence[Score]) -> list[Finding]:
    """A drop of which the order of options, or any sentences, bring half or more."""
    values = {score.metric: score.value for score in scores}
    found = []
    for name in ("drop by order alone", "drop by another question's sentences"):
        if values["drop"] > 0 and values.get(name, 0.0) >= values["drop"] / 2:
            text = (
                f"{name}: {values[name]:.2f}, of a drop of {values['drop']:.2f}: half of it or more is not "
                "the doing of what the sentences say."
            )
            found.append(Finding(code="not-by-content", severity="warning", about=subject, message=text))
    return found


def _row(item: Item) -> Row:
    return {
        "role": DISTRACTED, "id": item.id, "source": item.source, "original": item.original.text,
        "question": item.distracted.text, "options": list(item.distracted.options),
        "answer": item.original.answers[0], "score": float(item.right(DISTRACTION)),
        "right": {way: item.right(way) for way in item.choices},
        "picks": {way: choice.picks[0] for way, choice in item.choices.items()},
        "responses": {way: choice.responses[0] for way, choice in item.choices.items()},
    }  # fmt: skip
