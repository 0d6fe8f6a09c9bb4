"""The question alone, as if there were no passages."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from germane.core.chat import ChatSettings
from germane.method import method
from germane.solver import Answer, Question, Solver, Solving, Use, instruction, read_answer


@method("ground/no-retrieval")
class NoRetrieval(Solver):
    """Ask the question without its passages.

    Baseline: what the model knows by itself. Every passage is reported as not used. Greedy.

    Use it to see what passages add, or take away: a method of grounding that is worse is misled by them.
    Not when the model cannot know the answer.
    """

    max_tokens: int = Field(default=64, gt=0, description="longest answer, in tokens")

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        prompts = [instruction(question) for question in questions]
        replies = solving.ask(questions, prompts, "answer", ChatSettings(max_tokens=self.max_tokens))
        return [
            Answer(read_answer(reply, question), reply, none_shown(question))
            for reply, question in zip(replies, questions, strict=True)
        ]


def none_shown(question: Question) -> tuple[Use, ...]:
    """Every passage, as one that was not read."""
    return tuple(Use(passage.id, False, "no passage is shown") for passage in question.passages)
