"""Ask again only what the model is not sure of, with its own reasoning or without what it never chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from germane.core.chat import ChatSettings, Conversation
from germane.core.evidence import Table
from germane.method import method
from germane.solver import Answer, Question, Solver, Solving, is_right
from germane.tasks.reason._chains import Vote, behind, conversation, sampled, stated, vote

Way = Literal["prior-knowledge", "filter-choices", "both"]
SURE, UNSURE = "sure", "asked again"


@dataclass(frozen=True)
class Round:
    """What the model said of a question the last time that it was asked.

    Attributes:
        question: As it stands now: some options may be gone.
        replies: The chains.
        answers: What each states, "" for nothing.
        found: The vote on them.
        passed: Which ways were taken to ask again.
    """

    question: Question
    replies: list[str]
    answers: list[str]
    found: Vote
    passed: tuple[str, ...] = ()


@method("reason/divide-and-conquer", paper="2401.05190", code="AiMijie/Divide-and-Conquer")
class DivideAndConquer(Solver):
    """Answer everything a few times, keep what the model agrees with itself on, and ask the rest again.

    Meng et al., "Divide and Conquer for Large Language Models Reasoning", 2024. Of `samples` sampled
    chains, the confidence score is CS = (count of the most frequent answer) / samples. Questions with CS
    above `threshold` keep that answer. The others are asked again, `samples` times, by each of
    `ways` in turn while their CS stays at or below the threshold. prior-knowledge (PKR): with the
    model's own earlier reasoning, one chain for the most frequent answer and one for the runner-up.
    filter-choices (FCR): without the options that no chain chose, in their order, lettered anew. both:
    the two in one prompt. The last vote counts.

    The table shows, for what was sure and what was asked again, accuracy before and after, and how
    often the right option was among those left.

    Use it for multiple-choice questions, where votes spread over several options: the calls go where they
    matter. Not where the model is surely wrong, which no asking again mends; nor for models of a few
    hundred million weights, whose accuracy does not rise with their CS. Some of what it gains is gained
    by more samples alone: compare with self-consistency at as many calls.

    Differs from the paper: there is no official code for the method, and neither the number of samples,
    the threshold, the temperature nor the prompts are known here; they are this project's. A
    runner-up's reasoning is shown too, so that a wrong majority does not anchor the model alone. The
    default way is filter-choices, which the paper's second version keeps. Two subsets, as there, where
    the first version speaks of several. Open questions are taken too: filter-choices then offers the
    answers that came as options.
    """

    samples: int = Field(default=5, gt=1, description="chains of thought for each question and way")
    threshold: float = Field(
        default=0.6, ge=0, le=1, description="confidence score up to which a question is asked again"
    )
    ways: list[Way] = Field(
        default=["filter-choices"],
        min_length=1,
        description="how unsure questions are asked again, in turn",
    )
    temperature: float = Field(default=0.7, gt=0, description="of the sampling")
    max_tokens: int = Field(default=512, gt=0, description="longest chain, in tokens")

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        prompts = [conversation(question) for question in questions]
        first = self._rounds(solving, questions, prompts, "reason", 0)
        last = list(first)
        for number, way in enumerate(self.ways, 1):
            places = [n for n, each in enumerate(last) if self.unsure(each)]
            changed = [prepare(way, last[n]) for n in places]
            told = [prompt for _, prompt in changed]
            again = self._rounds(solving, [q for q, _ in changed], told, way, number)
            for place, new in zip(places, again, strict=True):
                last[place] = replace(new, passed=(*last[place].passed, way))
        solving.step.tables.append(subsets(questions, first, last))
        return [as_answer(before, after) for before, after in zip(first, last, strict=True)]

    def unsure(self, asked: Round) -> bool:
        """Whether a question is to be asked again."""
        return asked.found.confidence <= self.threshold

    def _rounds(
        self, solving: Solving, questions: Sequence[Question], prompts: Sequence[Conversation],
        purpose: str, number: int,
    ) -> list[Round]:  # fmt: skip
        settings = ChatSettings(max_tokens=self.max_tokens, temperature=self.temperature)
        replies = sampled(
            solving, questions, prompts, purpose, settings, self.samples, number * self.samples
        )
        found = []
        for question, said in zip(questions, replies, strict=True):
            answers = [stated(reply, question) for reply in said]
            found.append(Round(question, said, answers, vote(answers, question)))
        return found


def prepare(way: Way, asked: Round) -> tuple[Question, Conversation]:
    """How an unsure question is asked again."""
    question = asked.question if way == "prior-knowledge" else filtered(asked)
    return question, conversation(question, before="" if way == "filter-choices" else prior(asked))


def filtered(asked: Round) -> Question:
    """The question with only the options that were chosen; of an open one, with the answers that came.

    Where fewer than two came, there is nothing to choose between, and it stays as it is.
    """
    came = list(asked.found.counts)
    kept = tuple(option for option in asked.question.options if option in came) or tuple(came)
    return replace(asked.question, options=kept) if len(kept) > 1 else asked.question


def prior(asked: Round) -> str:
    """The model's own reasoning for the two most frequent answers."""
    best = sorted(asked.found.counts, key=lambda answer: -asked.found.counts[answer])[:2]
    chains = [asked.replies[asked.answers.index(answer)] for answer in best]
    if not chains:
        return ""
    shown = "\n\n".join(f"Earlier reasoning {n}:\n{chain.strip()}" for n, chain in enumerate(chains, 1))
    return (
        f"{shown}\n\nThis is earlier reasoning on the question below. It may be wrong. Use what is right "
        "in it, and reason in more detail."
    )


def as_answer(before: Round, after: Round) -> Answer:
    """The last vote, or the first where nothing came of asking again."""
    chosen = after if after.found.answer else before
    found = {
        "subset": UNSURE if after.passed else SURE, "confidence": before.found.confidence,
        "counts": before.found.counts, "before": before.found.answer, "ways": list(after.passed),
        "options left": list(after.question.options), "counts after": after.found.counts,
    }  # fmt: skip
    return Answer(chosen.found.answer, behind(chosen.replies, chosen.answers, chosen.found), (), found)


def subsets(questions: Sequence[Question], first: Sequence[Round], last: Sequence[Round]) -> Table:
    """Accuracy before and after, and what it cost, of what was sure and what was asked again."""
    rows: list[list[str | float | int | None]] = []
    triples = list(zip(questions, first, last, strict=True))
    for name in (SURE, UNSURE):
        chosen = [each for each in triples if (UNSURE if each[2].passed else SURE) == name]
        known = [each for each in chosen if each[0].answers]
        calls = sum(len(a.replies) * (1 + len(b.passed)) for _, a, b in chosen)
        rows.append(
            [
                name, len(chosen),
                _share(known, lambda q, a, b: bool(is_right(q, a.found.answer))),
                _share(known, lambda q, a, b: bool(is_right(q, as_answer(a, b).text))),
                _share(known, _survives), calls,
            ]
        )  # fmt: skip
    columns = ["subset", "questions", "accuracy before", "accuracy after", "right option left", "calls"]
    return Table(title="What was asked again", columns=columns, rows=rows)


def _survives(question: Question, before: Round, after: Round) -> bool:
    """Whether a right answer can still be given."""
    left = after.question.options
    return not left or any(is_right(question, option) for option in left)


def _share(
    triples: Sequence[tuple[Question, Round, Round]], holds: Callable[[Question, Round, Round], bool]
) -> float | None:
    return sum(holds(*each) for each in triples) / len(triples) if triples else None
