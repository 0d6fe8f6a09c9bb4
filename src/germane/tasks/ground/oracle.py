"""Only the right passages, as the records say which they are."""

from __future__ import annotations

from collections.abc import Sequence

from germane.core.errors import RecordsError
from germane.method import method
from germane.solver import RIGHT, Answer, Question, Solving, Use, with_passages
from germane.tasks.ground.plain import Plain


@method("ground/oracle")
class Oracle(Plain):
    """Show only the passages that the records call right.

    Upper reference: what `plain` would answer if whatever chooses passages made no mistake. It is told
    which passages are right, and so is no method to answer unsolved questions with.

    Use it to see how much there is to gain by leaving passages out. Not when the records do not say which
    passages are right: they are refused.
    """

    def check_questions(self, questions: Sequence[Question], demonstrations: Sequence[Question]) -> None:
        """Every question has a passage of kind "right"."""
        for question in questions:
            if all(passage.kind != RIGHT for passage in question.passages):
                raise RecordsError(
                    f"{self.name}: question {question.id!r} has no passage of kind {RIGHT!r}: say in the "
                    "records which passages are right, or take another method."
                )

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        shown = [
            with_passages(each, [passage for passage in each.passages if passage.kind == RIGHT])
            for each in questions
        ]
        return [
            Answer(answer.text, answer.response, _uses(question))
            for question, answer in zip(questions, super().solve(solving, shown), strict=True)
        ]


def _uses(question: Question) -> tuple[Use, ...]:
    return tuple(
        Use(each.id, each.kind == RIGHT, f"the records call it {each.kind or 'nothing'}")
        for each in question.passages
    )
