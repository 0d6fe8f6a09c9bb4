"""Have the model say which conditions do not matter, then ignore them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field
from torch import Tensor

from germane.core.chat import ChatSettings
from germane.core.embedding import Encoder
from germane.embedded import MINILM, model_folder
from germane.method import method
from germane.solver import Answer, Question, Solver, Solving
from germane.tasks.reason._chains import SOLUTION, check_solved, concluded, conversation

# A sentence ends at a mark before a blank, but not after these; a question may follow without a mark.
_ENDS = re.compile(r"(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)(?<!\bvs)(?<!\bNo)[.!?]\s+(?=\S)")
_QUESTION = re.compile(r"(?<=[^.!?\s])\s+(?=(?:How|What|Which|When|Where|Who|Why)\b)")
_CUTS = re.compile(r",\s+|\s+(?=and\b)")
_QUANTITY = re.compile(r"\d[\d,.]*")


@dataclass(frozen=True)
class Problem:
    """A question taken apart.

    Attributes:
        conditions: What is stated, each with one quantity at most where that can be had.
        asked: The last sentence.
        to_question: Similarity of each condition to what is asked.
        to_others: Mean similarity of each condition to the other ones.
        verdicts: What the model said of a condition, by its place.
    """

    conditions: list[str]
    asked: str
    to_question: list[float]
    to_others: list[float]
    verdicts: dict[int, str] = field(default_factory=dict)

    @property
    def similarity(self) -> float:
        """Mean similarity of the conditions to the question: the lower, the more confusing."""
        return sum(self.to_question) / len(self.to_question) if self.to_question else 1.0


@method("reason/i3c", paper="2403.12744", code="wzy6642/I3C-Select")
class I3C(Solver):
    """Have the model judge the conditions that look out of place, and reason with its verdicts in sight.

    Wu, Shen and Jiang, "Instructing Large Language Models to Identify and Ignore Irrelevant Conditions",
    NAACL 2024. The question is cut into conditions c_1..c_n and what is asked, q, its last sentence. A
    sentence encoder gives s_i(q) = cos(c_i, q) and s_i(c) = the mean of cos(c_i, c_j) over j != i. Where
    either is below `threshold`, the model is asked whether c_i is relevant; its replies, as they are, go
    before the question with the instruction to ignore what is irrelevant, and then the model thinks step
    by step. Without such conditions the instruction alone goes before. Demonstrations are shown as
    chain-of-thought shows them.

    Use it for problems with facts that do not matter, at a call for each doubtful condition beyond a
    chain of thought. Not for questions without conditions, nor with a model too small to judge relevance:
    wrong verdicts mislead it (a few hundred million weights are too few).

    `threshold` belongs to its encoder. With the default encoder 0.5 takes about half of all conditions
    of word problems; choose it so that 40 to 60 % of those with a quantity are judged. The similarity
    tells irrelevant conditions only weakly: what matters is what the model says of them.

    Differs from the paper and the code: another sentence encoder than SimCSE by default. Only conditions
    with a digit are judged, as in the released data, of which the paper says nothing
    (`quantities_only`). s(c) of a single condition is 1, where the paper has a mean of nothing. Greedy
    reasoning, where the code samples at temperature 0.1. The answer is read from the chain's last line,
    and asked for in a second call only where there is none; what the model writes is not evaluated as a
    program.
    """

    encoder: str = Field(default=MINILM, description="sentence encoder: minilm, a folder or hub id")
    threshold: float = Field(
        default=0.5, ge=-1, le=1, description="a condition less similar than this is judged by the model"
    )
    quantities_only: bool = Field(default=True, description="judge only conditions with a digit")
    verify_temperature: float = Field(default=0.7, ge=0, description="of the judging")
    verify_tokens: int = Field(default=512, gt=0, description="longest verdict, in tokens")
    shots: int = Field(default=8, gt=0, description="demonstrations shown, of those given")
    max_tokens: int = Field(default=1024, gt=0, description="longest chain, in tokens")

    def check_questions(self, questions: Sequence[Question], demonstrations: Sequence[Question]) -> None:
        """Every demonstration has its reasoning and its answer, and the encoder is there."""
        check_solved(self.name, demonstrations[: self.shots], SOLUTION)
        model_folder(self.encoder)

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        problems = self.verified(solving, questions, self.problems(questions))
        shown = self.demonstrations(solving)
        prompts = [
            conversation(question, shown, before_it(problem))
            for question, problem in zip(questions, problems, strict=True)
        ]
        chains = solving.ask(questions, prompts, "reason", ChatSettings(max_tokens=self.max_tokens))
        answers = concluded(solving, questions, prompts, chains)
        return [
            Answer(answer, chain, (), details(problem))
            for answer, chain, problem in zip(answers, chains, problems, strict=True)
        ]

    def demonstrations(self, solving: Solving) -> list[Question]:
        """The solved questions that are shown."""
        return solving.demonstrations[: self.shots]

    def problems(self, questions: Sequence[Question]) -> list[Problem]:
        """The questions, taken apart and compared."""
        parts = [split(question.text) for question in questions]
        texts = [text for conditions, asked in parts for text in (*conditions, asked)]
        vectors = self.embed(texts)
        found, start = [], 0
        for conditions, asked in parts:
            end = start + len(conditions)
            found.append(Problem(conditions, asked, *similarities(vectors[start:end], vectors[end])))
            start = end + 1
        return found

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(texts, width) vectors of length 1."""
        return Encoder(model_folder(self.encoder))(texts)

    def candidates(self, problem: Problem) -> list[int]:
        """The places of conditions that look irrelevant."""
        pairs = zip(problem.to_question, problem.to_others, strict=True)
        return [
            place
            for place, (to_question, to_others) in enumerate(pairs)
            if min(to_question, to_others) < self.threshold
            and (not self.quantities_only or _QUANTITY.search(problem.conditions[place]))
        ]

    def verified(
        self, solving: Solving, questions: Sequence[Question], problems: Sequence[Problem]
    ) -> list[Problem]:
        """The problems with what the model says of their candidates."""
        wanted = [(n, place) for n, problem in enumerate(problems) for place in self.candidates(problem)]
        settings = ChatSettings(
            max_tokens=self.verify_tokens, temperature=self.verify_temperature, seed=solving.seed
        )
        replies = solving.ask(
            [questions[n] for n, _ in wanted],
            [doubt(questions[n], problems[n], place) for n, place in wanted],
            "verify", settings,
        )  # fmt: skip
        verdicts: list[dict[int, str]] = [{} for _ in problems]
        for (n, place), reply in zip(wanted, replies, strict=True):
            verdicts[n][place] = reply.strip()
        return [replace(problem, verdicts=said) for problem, said in zip(problems, verdicts, strict=True)]


def split(text: str) -> tuple[list[str], str]:
    """The conditions of a problem, and its question, the last sentence.

    A sentence with several quantities is cut at commas and before "and", where a quantity is on both
    sides of the cut.
    """
    pieces = _sentences(text)
    *stated, asked = pieces
    return [condition for sentence in stated for condition in _conditions(sentence)], asked


def _sentences(text: str) -> list[str]:
    ends = [match.end() for match in _ENDS.finditer(text)]
    sentences = [text[a:b].strip() for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    *before, last = sentences
    return [*before, *_QUESTION.split(last, maxsplit=1)]


def _conditions(sentence: str) -> list[str]:
    found = []
    start = 0
    for cut in _CUTS.finditer(sentence):
        if _QUANTITY.search(sentence[start : cut.start()]) and _QUANTITY.search(sentence[cut.end() :]):
            found.append(sentence[start : cut.end()].strip())
            start = cut.end()
    return [*found, sentence[start:].strip()]


def similarities(conditions: Tensor, asked: Tensor) -> tuple[list[float], list[float]]:
    """Of each condition: the cosine to the question, and the mean cosine to the other conditions.

    Args:
        conditions: (n, width) vectors of length 1.
        asked: (width,) the question's, of length 1.
    """
    count = len(conditions)
    to_question = (conditions @ asked).tolist()
    if count < 2:
        return to_question, [1.0] * count
    cosines = conditions @ conditions.T
    to_others = (cosines.sum(dim=1) - cosines.diagonal()) / (count - 1)
    return to_question, to_others.tolist()


def doubt(question: Question, problem: Problem, place: int) -> str:
    """What the model is asked about one condition."""
    return (
        f'{question.lettered}\n\nDoes the condition "{problem.conditions[place]}" matter for solving '
        f'"{problem.asked}"? Think step by step, and say whether it is relevant or irrelevant.'
    )


def before_it(problem: Problem) -> str:
    """What goes before the question: the verdicts, and what to do with them."""
    if not problem.verdicts:
        return "You may ignore information in the question that is irrelevant to what is asked."
    said = "\n".join(problem.verdicts.values())
    return (
        f"Remarks on the conditions of the last question:\n{said}\n\n"
        "Take these remarks into account, and ignore the conditions that are irrelevant."
    )


def details(problem: Problem) -> dict[str, Any]:
    """What was found out about the conditions."""
    rows = [
        {
            "condition": condition, "similarity to the question": problem.to_question[place],
            "similarity to the others": problem.to_others[place],
            "verdict": problem.verdicts.get(place, ""),
        }
        for place, condition in enumerate(problem.conditions)
    ]  # fmt: skip
    return {"conditions": rows}
