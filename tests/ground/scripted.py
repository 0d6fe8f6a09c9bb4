"""A chat model that replies by a rule of the test, and notes what it was asked."""

from __future__ import annotations

from collections.abc import Callable

from germane.core.chat import Reply
from germane.solver import Passage, Question, Solving


class Scripted:
    """Replies what `rule` says to the last message of each conversation."""

    name = "scripted"

    def __init__(self, rule: Callable[[str], str]):
        self.rule, self.asked, self.settings = rule, [], []
        self.calls = []

    def answer(self, conversations, settings=None):
        self.asked += [messages[-1]["content"] for messages in conversations]
        self.settings += [settings for _ in conversations]
        return [Reply(self.rule(messages[-1]["content"]), "stop", 1, 1, 0.0) for messages in conversations]


def replying(*replies: str) -> Scripted:
    """Replies these one after the other, then the last for ever."""
    waiting = list(replies)
    return Scripted(lambda _: waiting.pop(0) if len(waiting) > 1 else waiting[0])


def question(*texts: str, kinds: tuple[str, ...] = (), **more) -> Question:
    """A question about passages p1, p2, ..."""
    passages = tuple(
        Passage(f"p{number}", text, "", kinds[number - 1] if kinds else "")
        for number, text in enumerate(texts, 1)
    )
    return Question("q", "Where does Ada live?", ("Rome",), passages=passages, **more)


def solve_one(method, chat, asked, **solving):
    """The answer of a method to one question."""
    return method.solve(Solving(chat, seed=1, **solving), [asked])[0]


def kept(answer) -> list[str]:
    """Ids of the passages that were answered from."""
    return [use.passage for use in answer.uses if use.kept]
