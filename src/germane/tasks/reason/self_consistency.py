"""The majority of sampled chains of thought."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from germane.core.chat import ChatSettings
from germane.method import method
from germane.solver import Answer, Question, Solver, Solving
from germane.tasks.reason._chains import SOLUTION, behind, check_solved, conversation, sampled, stated, vote


@method("reason/self-consistency", paper="2203.11171")
class SelfConsistency(Solver):
    """Sample chains of thought, and take the answer that most of them end in.

    Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models", ICLR 2023.
    Answers agree when they begin with the same number, or have the same words but for articles. Of
    equally frequent ones the one seen first is taken. A chain that states no answer has no vote, but
    counts in the confidence, the majority's share of all chains.

    Use it where a right answer is reached in many ways and wrong ones differ; it costs `samples` times a
    chain of thought. Not for questions whose answers are texts that are worded differently every time,
    nor where the model is wrong in the same way more often than right.

    Differs from the paper: nucleus sampling at top-p 1 instead of top-k 40; chains without an answer are
    not read for one.
    """

    shots: int = Field(default=8, gt=0, description="demonstrations shown, the first of those given")
    samples: int = Field(default=40, gt=0, description="chains of thought for each question")
    temperature: float = Field(default=0.7, gt=0, description="of the sampling")
    max_tokens: int = Field(default=512, gt=0, description="longest chain, in tokens")

    def check_questions(self, questions: Sequence[Question], demonstrations: Sequence[Question]) -> None:
        """Every demonstration has its reasoning and its answer."""
        check_solved(self.name, demonstrations[: self.shots], SOLUTION)

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        shown = solving.demonstrations[: self.shots]
        prompts = [conversation(question, shown) for question in questions]
        settings = ChatSettings(max_tokens=self.max_tokens, temperature=self.temperature)
        chains = sampled(solving, questions, prompts, "reason", settings, self.samples)
        return [majority(question, replies) for question, replies in zip(questions, chains, strict=True)]


def majority(question: Question, replies: Sequence[str]) -> Answer:
    """The answer that most replies state, with the first of them as the response."""
    answers = [stated(reply, question) for reply in replies]
    found = vote(answers, question)
    confidence = {"confidence": found.confidence, "counts": found.counts}
    return Answer(found.answer, behind(replies, answers, found), (), confidence)
