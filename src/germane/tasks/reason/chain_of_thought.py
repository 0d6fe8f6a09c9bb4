"""Reasoning before the answer."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from germane.core.chat import ChatSettings
from germane.method import method
from germane.solver import Answer, Question, Solver, Solving
from germane.tasks.reason._chains import SOLUTION, check_solved, concluded, conversation


@method("reason/chain-of-thought", paper="2201.11903")
class ChainOfThought(Solver):
    """Have the model think step by step, after worked demonstrations if there are any.

    Wei et al., "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models", NeurIPS 2022;
    without demonstrations as Kojima et al., "Large Language Models are Zero-Shot Reasoners", NeurIPS
    2022. A demonstration shows its field `solution`, then its answer. Greedy. A chain that states no
    answer is followed by a second call that asks for it.

    Use it for questions that take several steps, with a model large enough to take them. Not with models
    of a few hundred million weights, whose chains lead astray more often than not.

    Differs from the papers: the chain is asked to state its answer in a fixed form, and Kojima et al.'s
    second call, made of every question there, is made only where it does not. Turns of a chat, where the
    papers write one running text.
    """

    shots: int = Field(default=8, gt=0, description="demonstrations shown, the first of those given")
    max_tokens: int = Field(default=512, gt=0, description="longest chain, in tokens")

    def check_questions(self, questions: Sequence[Question], demonstrations: Sequence[Question]) -> None:
        """Every demonstration has its reasoning and its answer."""
        check_solved(self.name, demonstrations[: self.shots], SOLUTION)

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        shown = solving.demonstrations[: self.shots]
        prompts = [conversation(question, shown) for question in questions]
        chains = solving.ask(questions, prompts, "reason", ChatSettings(max_tokens=self.max_tokens))
        answers = concluded(solving, questions, prompts, chains)
        return [Answer(answer, chain) for answer, chain in zip(answers, chains, strict=True)]
