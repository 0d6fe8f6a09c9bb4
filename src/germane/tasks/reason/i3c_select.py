"""I3C with the most confusing solved problems as demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from germane.core.chat import ChatSettings
from germane.core.evidence import Finding
from germane.embedded import model_folder
from germane.method import method
from germane.solver import Question, Solving, is_right
from germane.tasks.reason._chains import SOLUTION, check_solved, conversation, stated
from germane.tasks.reason.i3c import I3C, Problem


@method("reason/i3c-select", paper="2403.12744", code="wzy6642/I3C-Select", needs=("demonstrations",))
class I3CSelect(I3C):
    """I3C, with the most confusing of the solved problems, reasoned out by the model, shown first.

    Wu, Shen and Jiang, "Instructing Large Language Models to Identify and Ignore Irrelevant Conditions",
    NAACL 2024. A problem is the more confusing, the lower the mean similarity of its conditions to its
    question is. The model thinks the `shots` most confusing of the demonstrations through step by step;
    its chains are shown, most confusing first, and the question is asked as in i3c.

    Use it where I3C is used and a few hundred solved problems are at hand; it costs `shots` more calls,
    once for all questions. Not where the model fails on the confusing problems themselves: the chains
    that do not reach the given answer are left out, and none may remain.

    Differs from the paper and the code: the chains that end in a wrong answer are left out; the paper
    speaks of no such check. The paper ranks by the inverse of the mean similarity, and the released
    scores rise from the first demonstration to the last: they are the mean similarities themselves, so
    both say what is done here. What `i3c` says applies too.
    """

    shots: int = Field(default=8, gt=0, description="most confusing demonstrations shown")

    def check_questions(self, questions: Sequence[Question], demonstrations: Sequence[Question]) -> None:
        """Every demonstration has an answer, and the encoder is there."""
        check_solved(self.name, demonstrations)
        model_folder(self.encoder)

    def demonstrations(self, solving: Solving) -> list[Question]:
        """The most confusing solved problems, as far as the model solves them, with its own chains."""
        problems = self.problems(solving.demonstrations)
        chosen = [solving.demonstrations[place] for place in most_confusing(problems, self.shots)]
        prompts = [conversation(each) for each in chosen]
        chains = solving.ask(chosen, prompts, "demonstrate", ChatSettings(max_tokens=self.max_tokens))
        found = [
            replace(each, more={**each.more, SOLUTION: chain})
            for each, chain in zip(chosen, chains, strict=True)
            if is_right(each, stated(chain, each))
        ]
        solving.step.facts["demonstrations"] = [each.id for each in found]
        if not found:
            solving.step.findings.append(nothing_shown(len(chosen)))
        return found


def most_confusing(problems: Sequence[Problem], count: int) -> list[int]:
    """Places of the problems whose conditions are the least similar to what is asked, the least first."""
    return sorted(range(len(problems)), key=lambda place: problems[place].similarity)[:count]


def nothing_shown(count: int) -> Finding:
    """That the model solves none of the most confusing demonstrations."""
    return Finding(
        code="no-demonstrations", severity="warning", about="demonstrations",
        message=f"The model solved none of the {count} most confusing demonstrations, so none was shown.",
    )  # fmt: skip
