"""The question as it is."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from germane.core.chat import ChatSettings
from germane.method import method
from germane.solver import Answer, Question, Solver, Solving, instruction, read_answer


@method("reason/direct")
class Direct(Solver):
    """Ask the question, and take the answer.

    Baseline: no demonstration, no reasoning asked for; of options the letter. Greedy.

    Use it to see what the model answers by itself, which every other method has to beat. Not when the
    question needs steps that the model does not take unasked.
    """

    max_tokens: int = Field(default=64, gt=0, description="longest answer, in tokens")

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        prompts = [instruction(question) for question in questions]
        replies = solving.ask(questions, prompts, "answer", ChatSettings(max_tokens=self.max_tokens))
        return [
            Answer(read_answer(reply, question), reply)
            for reply, question in zip(replies, questions, strict=True)
        ]
