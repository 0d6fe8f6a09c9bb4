"""Mend noisy demonstrations by contrast with a clean one, then sample and vote."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field, field_validator

from germane.core.chat import ChatSettings, Conversation
from germane.core.errors import RecordsError
from germane.core.evidence import Table
from germane.method import method
from germane.solver import Answer, Question, Solver, Solving, is_right
from germane.tasks.reason._chains import SOLUTION, check_solved, conversation, sampled, short_answer, stated
from germane.tasks.reason.self_consistency import majority

CLEAN = "clean"  # the field of a demonstration that says whether its reasoning is clean
_MARK = re.compile(r"corrected reasoning\s*:", flags=re.IGNORECASE)


@method("reason/cd-cot", paper="2410.23856", code="tmlr-group/NoisyRationales", needs=("demonstrations",))
class CDCoT(Solver):
    """Rewrite noisy demonstrations after the model of a clean one, and vote over what they lead to.

    Zhou et al., "Can Language Models Perform Robust Reasoning in Chain-of-thought Prompting with Noisy
    Rationales?", NeurIPS 2024. One demonstration has clean reasoning: the first whose field `clean` is
    true, else the first of all; `shots` others may be noisy, with right answers. Each noisy one is
    rewritten `rephrasings` times by contrast with the clean one; those that still reach its given answer
    survive. A context is the clean one and a survivor of each noisy one, drawn at random. With context m
    the question is reasoned out split[m] times, and the majority of all answers counts, of equals the
    one seen first.

    Use it where demonstrations come from users or from another model and their reasoning cannot be
    trusted, but their answers can; one clean one is enough. Not without one: by contrast with noise the
    model mends nothing. Nor with a model too small to rewrite reasoning (a few hundred million weights).

    Differs from the paper and the code: the code keeps every rewriting that has the form asked for; here,
    as in the paper, it must reach the right answer. Where none does, the demonstration stays as it was;
    the code fails. Contexts are drawn from the run's seed, not from the clock. The demonstrations are the
    same for every question, so they are rewritten once; the paper's sets have other ones for every
    question.
    """

    shots: int = Field(default=3, gt=0, description="noisy demonstrations shown, the first of those given")
    rephrasings: int = Field(default=5, gt=0, description="rewritings of each noisy demonstration")
    split: list[int] = Field(
        default=[3, 2], min_length=1, description="samples with each context, one number a context"
    )
    temperature: float = Field(default=1.0, gt=0, description="of rewriting and reasoning")
    max_tokens: int = Field(default=512, gt=0, description="longest chain or rewriting, in tokens")

    @field_validator("split")
    @classmethod
    def _counts(cls, value: list[int]) -> list[int]:
        if min(value) < 1:
            raise ValueError("every context needs one sample at least")
        return value

    def check_questions(self, questions: Sequence[Question], demonstrations: Sequence[Question]) -> None:
        """There are a clean and a noisy demonstration, with reasoning and answer."""
        clean, noisy = apart(demonstrations)
        if not noisy:
            raise RecordsError(
                f"{self.name}: needs a clean demonstration and a noisy one; there is one only."
            )
        check_solved(self.name, [clean, *noisy[: self.shots]], SOLUTION)

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        clean, noisy = apart(solving.demonstrations)
        survivors = self.rewritten(solving, clean, noisy[: self.shots])
        contexts = [self.contexts(solving, question, clean, survivors) for question in questions]
        settings = ChatSettings(max_tokens=self.max_tokens, temperature=self.temperature)
        chains: list[list[str]] = [[] for _ in questions]
        for number, count in enumerate(self.split):
            prompts = [
                conversation(question, shown[number])
                for question, shown in zip(questions, contexts, strict=True)
            ]
            first = self.rephrasings + sum(self.split[:number])
            drawn = sampled(solving, questions, prompts, "reason", settings, count, first)
            chains = [before + new for before, new in zip(chains, drawn, strict=True)]
        return [majority(question, replies) for question, replies in zip(questions, chains, strict=True)]

    def rewritten(
        self, solving: Solving, clean: Question, noisy: Sequence[Question]
    ) -> list[list[Question]]:
        """Of each noisy demonstration the rewritings that reach its answer; without any, itself."""
        settings = ChatSettings(max_tokens=self.max_tokens, temperature=self.temperature)
        prompts = [contrast(clean, shown) for shown in noisy]
        replies = sampled(solving, noisy, prompts, "rephrase", settings, self.rephrasings)
        found = [survivors(shown, said) for shown, said in zip(noisy, replies, strict=True)]
        rows: list[list[str | float | int | None]] = [
            [shown.id, len(said), len(kept)]
            for shown, said, kept in zip(noisy, replies, found, strict=True)
        ]
        columns = ["demonstration", "rewritings", "that reach its answer"]
        solving.step.tables.append(Table(title="Rewritten demonstrations", columns=columns, rows=rows))
        return [kept or [shown] for shown, kept in zip(noisy, found, strict=True)]

    def contexts(
        self, solving: Solving, question: Question, clean: Question, survivors: Sequence[list[Question]]
    ) -> list[list[Question]]:
        """For each context the clean demonstration, and one rewriting of every other."""
        generator = random.Random(f"{solving.seed}/{question.id}")
        return [[clean, *(generator.choice(kept) for kept in survivors)] for _ in self.split]


def apart(demonstrations: Sequence[Question]) -> tuple[Question, list[Question]]:
    """The clean demonstration, and those that may be noisy: all others that do not say they are clean."""
    marked = [shown for shown in demonstrations if shown.more.get(CLEAN)]
    clean = marked[0] if marked else demonstrations[0]
    return clean, [shown for shown in demonstrations if shown is not clean and shown not in marked]


def contrast(clean: Question, noisy: Question) -> Conversation:
    """What is asked to have a demonstration rewritten."""
    shown = "\n\n".join(
        f"{title}\nQuestion: {each.lettered}\nReasoning: {each.more[SOLUTION]}\n"
        f"Answer: {short_answer(each)}"
        for title, each in (("First example", clean), ("Second example", noisy))
    )
    request = (
        f"{shown}\n\nBoth answers are right. The reasoning of the first example is clean; that of the "
        "second holds steps that are irrelevant or wrong. Write the reasoning of the second example anew, "
        "in the way of the first. Reply with 'Corrected reasoning:', the reasoning, and a last line that "
        "says 'The answer is', and its answer."
    )
    return [{"role": "user", "content": request}]


def survivors(noisy: Question, replies: Sequence[str]) -> list[Question]:
    """The demonstration with each rewriting that reaches its given answer."""
    found = []
    for reply in replies:
        reasoning = _MARK.split(reply)[-1].strip()
        if is_right(noisy, stated(reasoning, noisy)):
            found.append(replace(noisy, more={**noisy.more, SOLUTION: without_answer(reasoning)}))
    return found


def without_answer(reasoning: str) -> str:
    """Reasoning without its last line, where that states the answer, which is shown after it anyway."""
    lines = reasoning.rstrip().split("\n")
    if len(lines) > 1 and re.match(r"\W*(?:the )?answer\b", lines[-1], flags=re.IGNORECASE):
        lines = lines[:-1]
    return "\n".join(lines).strip()
