"""A chat model that answers by rule, for tests of what methods ask and make of the replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from germane.core.chat import ChatSettings, Conversation, Reply

Rule = Callable[[str, ChatSettings], str]


class Scripted:
    """Answers what its rule makes of the last message, and keeps what it was asked."""

    name = "scripted"

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.asked: list[Conversation] = []
        self.settings: list[ChatSettings] = []
        self.batches: list[int] = []

    def answer(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None = None
    ) -> list[Reply]:
        chosen = settings or ChatSettings()
        self.asked += conversations
        self.settings.append(chosen)
        self.batches.append(len(conversations))
        said = [self.rule(messages[-1]["content"], chosen) for messages in conversations]
        return [Reply(text, "stop", 1, 1, 0.0) for text in said]
