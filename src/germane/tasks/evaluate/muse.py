"""MUSE: verbatim memory, knowledge memory, privacy leak and utility of an unlearned language model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from germane.core.checkpoint import Checkpoint, locate
from germane.core.errors import MissingExtra, RecordsError
from germane.core.evidence import Score, Step
from germane.core.generation import context_of, continue_texts, require_room
from germane.core.membership import area, area_interval, min_k, token_log_probabilities
from germane.core.models import Loaded
from germane.core.objective import Task
from germane.core.records import Data, Row, read_rows
from germane.core.statistics import bootstrap_mean
from germane.method import method
from germane.roles import Records, require_fields, with_places
from germane.suite import Measured, Suite

VERBATIM, KNOWLEDGE, UTILITY = "VerbMem", "KnowMem", "KnowMem utility"
LEAK = "PrivLeak (0 is ideal)"
DISTANCE = "PrivLeak distance from 0"
_STOP = ("\n\n", "\nQuestion", "Question:")
_QUESTION = "{question}"


@dataclass(frozen=True)
class Item:
    """Something to continue.

    Attributes:
        prompt: What the model reads.
        answer: What it would write if it knew.
    """

    prompt: str
    answer: str


@method(
    "evaluate/muse",
    paper="2407.06460",
    code="swj0419/muse_bench",
    needs=("language model",),
)
class Muse(Suite):
    """Verbatim memory, knowledge memory, privacy leak and utility of an unlearned language model.

    Shi et al., "MUSE: Machine Unlearning Six-Way Evaluation for Language Models", ICLR 2025. VerbMem:
    the first part of a forget text is continued greedily and compared with the rest by ROUGE-L F1; of
    records with a prompt and an answer, the prompt is continued and compared with the answer. KnowMem:
    answers to questions, after examples in the context, by ROUGE-L F1; of the forget set memory, of
    the retain set utility. PrivLeak: the AUC of telling holdout from forget records by the lowest
    40 % of their token log-probabilities, as the change in per cent from the retrained model's AUC:
    about -100 says that the forget records are still known, far above 0 that they are suspiciously
    unlikely; within 5 of 0 is ideal, so models are ranked by its distance from 0. The others are shares
    between 0 and 1, where the paper prints them times 100. The AUC of the retrained model is
    `reference_auc`, else measured on --retrained, else 0.5; published for Llama-2 7B and the News
    set 0.4772, for ICLM-7B and the Books set 0.5393.

    Use it when a language model has unlearned texts, and questions about them and others are at hand.
    Not when the forget set is a behaviour, or when only one number is wanted.

    Scalability (criterion 5) and sustainability (criterion 6) need several unlearning runs: `requests` of
    the task unlearn makes them, and measures the utility of each with this suite.

    Differs from the paper: the examples in
    the context are the last records of the same set, which are then not asked, where it has at least
    twice as many. A text longer than `max_tokens` of its records is read in pieces, all of which count
    for Min-K. A text too short for 40 % of its tokens to be one has its least likely token taken,
    where the official code gives NaN. A prompt too long for the model loses its beginning.
    """

    roles: ClassVar[Mapping[str, str]] = {
        "forget": "texts that were unlearned",
        "forget-questions": "questions about what was unlearned, each with a prompt and an answer",
        "retain-questions": "questions about what was kept, each with a prompt and an answer",
        "holdout": "records like the forget records that the model never saw",
    }

    items: int = Field(default=100, gt=0, description="records of each role that are used, the first")
    verbatim_tokens: int = Field(default=128, gt=0, description="longest continuation of a text")
    answer_tokens: int = Field(default=32, gt=0, description="longest answer to a question")
    prompt_share: float = Field(
        default=0.5, gt=0, lt=1, description="share of a forget text's words that is the prompt"
    )
    examples: int = Field(default=10, ge=0, description="answered questions before each question")
    question: str = Field(
        default=r"Question: {question}\nAnswer: ",
        description=r"how a question is put to the model; \n begins a new line",
    )
    reference_auc: float = Field(
        default=0.0, ge=0, lt=1, description="AUC of the retrained model; 0: measured, or 0.5 without one"
    )
    batch_size: int = Field(default=16, gt=0, description="texts at a time")

    @field_validator("question")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        return with_places(value, _QUESTION)

    def check_records(self, records: Records) -> None:
        """Roles, their fields, and the library of ROUGE."""
        super().check_records(records)
        scorer()
        for role in ("forget-questions", "retain-questions"):
            require_fields(role, records[role], [records[role].prompt, records[role].answer])
        kinds = {_has_prompts(records[role]) for role in ("forget", "holdout")}
        if len(kinds) > 1:
            raise RecordsError(
                f"{records['holdout'].path}: must be texts if the forget records are, and questions if "
                "they are: else they are told apart by their form."
            )
        for number, item in enumerate(self.verbatim_items(records["forget"]), 1):
            if not item.prompt.strip() or not item.answer.strip():
                raise RecordsError(
                    f"{records['forget'].path}, record {number}: is too short to be continued."
                )

    def verbatim_items(self, data: Data) -> list[Item]:
        """What is to be continued word for word."""
        rows = read_rows(data)[: self.items]
        if _has_prompts(data):
            return [Item(row[data.prompt], row[data.answer]) for row in rows]
        return [Item(*cut(row[data.text], self.prompt_share)) for row in rows]

    def question_items(self, data: Data) -> tuple[list[Item], int]:
        """What is to be answered, and how many examples come before each."""
        rows = read_rows(data)
        count = self.examples if len(rows) >= 2 * self.examples else 0
        asked, shown = rows[: len(rows) - count], rows[len(rows) - count :]
        context = "".join(f"{self._put(row[data.prompt])}{row[data.answer].strip()}\n\n" for row in shown)
        items = [Item(context + self._put(row[data.prompt]), row[data.answer]) for row in asked]
        return items[: self.items], count

    def _put(self, question: str) -> str:
        return self.question.replace(r"\n", "\n").replace(_QUESTION, question)

    def calibrate(self, retrained: Loaded | None, records: Records) -> float:
        """The AUC that PrivLeak is measured from."""
        if self.reference_auc:
            return self.reference_auc
        if retrained is None:
            return 0.5
        forget, holdout = (self._familiarity(retrained, records[role]) for role in ("forget", "holdout"))
        # A retrained model that tells them apart wholly would make the leak infinite.
        return max(area(forget, holdout), 1 / (len(forget) * len(holdout)))

    def score(
        self, subject: str, loaded: Loaded, records: Records, calibration: Any, step: Step
    ) -> Measured:
        """The four numbers of one model."""
        found = Measured()
        self._verbatim(found, subject, loaded, records["forget"])
        asked = {"forget-questions": KNOWLEDGE, "retain-questions": UTILITY}
        for role, metric in asked.items():
            count = self._knowledge(found, subject, loaded, records[role], metric)
            step.facts[f"examples in the context, {role}"] = count
        self._leak(found, subject, loaded, records, calibration)
        step.facts["AUC of PrivLeak's reference"] = calibration
        return found

    def utility(self, subject: str, loaded: Loaded, records: Records) -> list[Score]:
        """Answers to the questions about what was kept."""
        found = Measured()
        self._knowledge(found, subject, loaded, records["retain-questions"], UTILITY)
        return found.scores

    def check_model(self, path: str) -> None:
        """A language model with room for what it is to write."""
        super().check_model(path)
        config = Checkpoint(locate(path)).config
        require_room(context_of(config), max(self.verbatim_tokens, self.answer_tokens), path)

    def _verbatim(self, found: Measured, subject: str, loaded: Loaded, data: Data) -> None:
        tokenizer, size = loaded.processor, self.verbatim_tokens
        items = [
            Item(item.prompt, shorten(tokenizer, item.answer, size)) for item in self.verbatim_items(data)
        ]
        written = self._continue(loaded, items, size, ())
        _compare(found, subject, VERBATIM, data.name, items, written)

    def _knowledge(self, found: Measured, subject: str, loaded: Loaded, data: Data, metric: str) -> int:
        items, count = self.question_items(data)
        written = self._continue(loaded, items, self.answer_tokens, _STOP)
        _compare(found, subject, metric, data.name, items, written)
        return count

    def _continue(
        self, loaded: Loaded, items: Sequence[Item], tokens: int, stop: Sequence[str]
    ) -> list[str]:
        prompts = [item.prompt for item in items]
        return continue_texts(loaded.model, loaded.processor, prompts, tokens, stop, self.batch_size)

    def _leak(
        self, found: Measured, subject: str, loaded: Loaded, records: Records, reference: float
    ) -> None:
        sides = [self._familiarity(loaded, records[role]) for role in ("forget", "holdout")]
        value, low, high = (leak(each, reference) for each in area_interval(sides[0], sides[1]))
        found.scores += leak_scores(
            subject, records["forget"].name, (value, low, high), sum(map(len, sides))
        )
        for role, values in zip(("forget", "holdout"), sides, strict=True):
            data = records[role]
            for row, score in zip(read_rows(data), values, strict=False):
                prompted = data.prompt in row
                prompt, answer = (row[data.prompt], row[data.answer]) if prompted else (row[data.text], "")
                found.items.append(
                    {"metric": LEAK, "role": role, "prompt": prompt, "answer": answer, "score": score}
                )

    def _familiarity(self, loaded: Loaded, data: Data) -> list[float]:
        """Of each record, Min-40 %: the higher, the better it is known."""
        rows = read_rows(data)[: self.items]
        task = Task(data, rows, loaded.model, loaded.processor, split=True)
        parts: list[list[Tensor]] = [[] for _ in rows]
        for origin, values in zip(task.origin, token_log_probabilities(task, self.batch_size), strict=True):
            parts[origin].append(values)
        for number, pieces in enumerate(parts, 1):
            if not pieces:
                raise RecordsError(f"{data.path}, record {number}: is a single token, which none predicts.")
        return [min_k(torch.cat(pieces)) for pieces in parts]


def leak(value: float, reference: float) -> float:
    """PrivLeak in per cent: how far an AUC is from that of a retrained model."""
    return (value - reference) / reference * 100


def leak_scores(subject: str, task: str, values: tuple[float, float, float], n: int) -> list[Score]:
    """PrivLeak with its sign, and its distance from 0, by which models can be ranked.

    Args:
        subject: Whose scores they are.
        task: Name of the forget records.
        values: PrivLeak and the ends of its interval, in per cent.
        n: Records behind it.
    """
    value, low, high = values
    ends = sorted((abs(low), abs(high)))
    nearest = 0.0 if low <= 0 <= high else ends[0]
    signed = Score(subject=subject, task=task, metric=LEAK, value=value, n=n, low=low, high=high)
    distance = Score(
        subject=subject, task=task, metric=DISTANCE, value=abs(value), n=n,
        low=nearest, high=ends[1], higher_is_better=False,
    )  # fmt: skip
    return [signed, distance]


def cut(text: str, share: float) -> tuple[str, str]:
    """A text's first words, and the rest; together they are the text."""
    words = list(re.finditer(r"\S+", text))
    count = max(1, int(len(words) * share))
    place = words[count - 1].end() if words else 0
    return text[:place], text[place:]


def shorten(tokenizer: Any, text: str, count: int) -> str:
    """The text's first `count` tokens, as a text."""
    tokens = tokenizer(text)["input_ids"]
    return str(tokenizer.decode(tokens[:count], skip_special_tokens=True))


@cache
def scorer() -> Any:
    """ROUGE-L on lower-case words of letters and digits, without stemming.

    Raises:
        MissingExtra: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtra("rouge-score", "suites", "evaluate/muse") from None
    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(reference: str, written: str) -> float:
    """ROUGE-L F1 of what was written: by the longest common subsequence of words.

    Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
    """
    return float(scorer().score(reference, written)["rougeL"].fmeasure)


def _has_prompts(data: Data) -> bool:
    return data.prompt in read_rows(data)[0]


def _compare(
    found: Measured, subject: str, metric: str, role: str, items: Sequence[Item], written: Sequence[str]
) -> None:
    """Add the score of what was written, and every item."""
    values = []
    for item, text in zip(items, written, strict=True):
        values.append(rouge_l(item.answer, text))
        row: Row = {"metric": metric, "role": role, "prompt": item.prompt, "answer": item.answer}
        found.items.append(row | {"response": text, "score": values[-1]})
    low, high = bootstrap_mean(np.array(values))
    found.scores.append(
        Score(
            subject=subject, task=role, metric=metric, value=float(np.mean(values)), n=len(values),
            low=low, high=high, higher_is_better=metric == UTILITY,
        )
    )  # fmt: skip
