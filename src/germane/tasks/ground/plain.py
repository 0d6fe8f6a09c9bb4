"""Plain retrieval-augmented generation: all passages, then the question."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from germane.core.chat import ChatSettings
from germane.method import method
from germane.solver import READING, Answer, Question, Solver, Solving, Use, quoted, read_answer


@method("ground/plain")
class Plain(Solver):
    """Show all passages and ask the question.

    Baseline: retrieval-augmented generation without any defence. Passages are quoted as JSON strings,
    numbered in their order. Greedy.

    Use it as what other methods of grounding have to beat. Not when many passages are irrelevant or
    mislead: all of them are read alike.
    """

    max_tokens: int = Field(default=64, gt=0, description="longest answer, in tokens")

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        prompts = [
            READING.format(passages=quoted(question.passages), question=question.lettered)
            for question in questions
        ]
        replies = solving.ask(questions, prompts, "answer", ChatSettings(max_tokens=self.max_tokens))
        return [
            Answer(read_answer(reply, question), reply, all_shown(question))
            for reply, question in zip(replies, questions, strict=True)
        ]


def all_shown(question: Question) -> tuple[Use, ...]:
    """Every passage, as one that was read."""
    return tuple(Use(passage.id, True, "all passages are shown") for passage in question.passages)
