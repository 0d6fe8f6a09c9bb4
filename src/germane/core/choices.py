"""Questions with options put to a chat model, and which option it chooses how often."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import Field

from germane.core.chat import ChatModel, ChatSettings, Conversation, encode_conversation, encode_text
from germane.core.generation import context_of
from germane.core.local_chat import LocalChat
from germane.core.settings import Settings

Reader = Callable[[str, Sequence[str]], str]  # a response and the options -> the option it names, or ""
_SEEDS = 1000  # seeds of sampled rounds that two seeds of a run do not share


class Choosable(Protocol):
    """A question with options."""

    @property
    def text(self) -> str: ...

    @property
    def options(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Choice:
    """What a model makes of a question.

    Attributes:
        rates: Option -> how often it is chosen: its share of the responses, or of the likelihood.
        picks: The option that each response names, "" where that is unclear.
        responses: What was written; by likelihood, the option alone.
    """

    rates: dict[str, float]
    picks: tuple[str, ...]
    responses: tuple[str, ...]


class Choosing(Settings):
    """How a model answers questions with options; methods that ask such questions inherit it."""

    answering: Literal["likelihood", "reasoning"] = Field(
        default="likelihood",
        description="an answer is the option likeliest per token, or what a step-by-step response names",
    )
    answer_tokens: int = Field(default=256, gt=0, description="longest step-by-step response")

    def choose(
        self, chat: ChatModel, questions: Sequence[Choosable], read: Reader, *, samples: int = 1,
        temperature: float = 0.0, seed: int = 0, note: str = "",
    ) -> list[Choice]:  # fmt: skip
        """What a model chooses, all questions at a time.

        Args:
            chat: The model.
            questions: Each with its options.
            read: How the option is read out of a response.
            samples: Responses to each question; by likelihood one is all there is.
            temperature: Of the responses.
            seed: Of the responses.
            note: What is said before every question.
        """
        conversations = [self.conversation(question, note) for question in questions]
        if self.answering == "likelihood":
            return _by_likelihood(chat, questions, conversations)
        written: list[list[str]] = [[] for _ in questions]
        for number in range(samples if questions else 0):
            settings = ChatSettings(
                max_tokens=self.answer_tokens, temperature=temperature, seed=_SEEDS * seed + number
            )
            for responses, reply in zip(written, chat.answer(conversations, settings), strict=True):
                responses.append(reply.text)
        return [
            _choice(question, tuple(said), read) for question, said in zip(questions, written, strict=True)
        ]

    def conversation(self, question: Choosable, note: str = "") -> Conversation:
        """What a model is asked."""
        return [{"role": "user", "content": self.prompt(question, note)}]

    def prompt(self, question: Choosable, note: str = "") -> str:
        """A question with its options, and what is wanted."""
        before = f"{note}\n\n" if note else ""
        if self.answering == "likelihood":
            shown = "\n".join(f"- {option}" for option in question.options)
            return f"{before}{question.text}\n{shown}\n\nReply with the right one of these only."
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        shown = "\n".join(
            f"{letter}. {option}" for letter, option in zip(letters, question.options, strict=False)
        )
        return (
            f"{before}{question.text}\n{shown}\n\nThink step by step. End with a line that says "
            "'The answer is', and the letter of the right option."
        )

    def fits(self, chat: ChatModel, question: Choosable) -> bool:
        """Whether a model in this process reads so long a question; servers are not asked."""
        if not isinstance(chat, LocalChat):
            return True
        context = context_of(chat.model.config.to_dict())
        longest = self.answer_tokens
        if self.answering == "likelihood":
            longest = max(len(encode_text(chat.tokenizer, option)) for option in question.options)
        asked = len(encode_conversation(chat.tokenizer, self.conversation(question)))
        return context is None or asked + longest <= context


def _by_likelihood(
    chat: ChatModel, questions: Sequence[Choosable], conversations: Sequence[Conversation]
) -> list[Choice]:
    pairs = [
        (conversation, option)
        for question, conversation in zip(questions, conversations, strict=True)
        for option in question.options
    ]
    scored = iter(chat.log_probabilities([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
    found = []
    for question in questions:
        means = {}
        for option in question.options:
            score = next(scored)
            means[option] = score.log_probability / score.tokens
        highest = max(means.values())
        weights = {option: math.exp(mean - highest) for option, mean in means.items()}
        rates = {option: weight / sum(weights.values()) for option, weight in weights.items()}
        likeliest = max(rates, key=rates.__getitem__)
        found.append(Choice(rates, (likeliest,), (likeliest,)))
    return found


def _choice(question: Choosable, responses: tuple[str, ...], read: Reader) -> Choice:
    picks = tuple(read(response, question.options) for response in responses)
    rates = {option: picks.count(option) / len(picks) for option in question.options}
    return Choice(rates, picks, responses)
