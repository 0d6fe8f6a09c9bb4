"""Solved questions before the question."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from germane.core.chat import ChatSettings
from germane.method import method
from germane.solver import Answer, Question, Solver, Solving, instruction, read_answer
from germane.tasks.reason._chains import check_solved, short_answer


@method("reason/few-shot", paper="2005.14165", needs=("demonstrations",))
class FewShot(Solver):
    """Show solved questions with their answers, then ask.

    Brown et al., "Language Models are Few-Shot Learners", NeurIPS 2020. Each demonstration is a turn of
    the user and one of the model, with its answer alone, without reasoning. Greedy.

    Use it as the baseline of methods that show demonstrations, and where the form of the answer is what
    the model gets wrong. Not when the question needs steps: the demonstrations show none.

    Differs from the paper: turns of a chat, where the paper writes one running text.
    """

    shots: int = Field(default=8, gt=0, description="demonstrations shown, the first of those given")
    max_tokens: int = Field(default=64, gt=0, description="longest answer, in tokens")

    def check_questions(self, questions: Sequence[Question], demonstrations: Sequence[Question]) -> None:
        """Every demonstration has an answer."""
        check_solved(self.name, demonstrations[: self.shots])

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        shown = [
            message
            for solved in solving.demonstrations[: self.shots]
            for message in (
                {"role": "user", "content": instruction(solved)},
                {"role": "assistant", "content": short_answer(solved)},
            )
        ]
        prompts = [[*shown, {"role": "user", "content": instruction(each)}] for each in questions]
        replies = solving.ask(questions, prompts, "answer", ChatSettings(max_tokens=self.max_tokens))
        return [
            Answer(read_answer(reply, question), reply)
            for reply, question in zip(replies, questions, strict=True)
        ]
