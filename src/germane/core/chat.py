"""Language models that answer: local transformers, or any OpenAI-compatible server.

A conversation is a list of messages, each a mapping with `role` ("system", "user", "assistant") and
`content`. A chat model takes many conversations at a time and answers each; every call is recorded.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from germane.core.checkpoint import locate
from germane.core.device import device
from germane.core.errors import CheckpointError, SettingError
from germane.core.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from germane.core.models import Loaded

Message = Mapping[str, str]
Conversation = Sequence[Message]

# Private characters of Unicode that no text has, around what is not to be read as a special token.
_OPEN, _CLOSE = "\U000f6e00", "\U000f6e01"
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]")


class ChatSettings(Settings):
    """How an answer is generated."""

    max_tokens: int = Field(default=256, gt=0, description="longest answer, in tokens")
    temperature: float = Field(default=0.0, ge=0, description="0 takes the likeliest token always")
    top_p: float = Field(default=1.0, gt=0, le=1, description="share of probability sampled from")
    stop: list[str] = Field(default=[], description="texts that end the answer")
    seed: int = Field(default=0, ge=0, description="of the sampling")


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: What the model said, without special tokens.
        finish: "stop" when the model ended, "length" when it was cut.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens written.
        seconds: From asking to answer; of a batch, the batch's.
        retries: Times the server was asked again.
        cached: Whether it was answered before, and nobody asked now.
    """

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    retries: int = 0
    cached: bool = False


@dataclass(frozen=True)
class Continuation:
    """How likely a model finds a text.

    Attributes:
        log_probability: Natural, summed over the tokens.
        tokens: How many the text has.
    """

    log_probability: float
    tokens: int


@dataclass(frozen=True)
class Call:
    """What a chat model was asked, how, and what it said."""

    model: str
    messages: list[dict[str, str]]
    settings: ChatSettings
    reply: Reply


class ChatModel(ABC):
    """Anything that answers conversations, and keeps a record of it in `calls`."""

    calls: list[Call]

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called in records."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A text that differs where another model would answer, so that no cache confuses them."""

    @abstractmethod
    def answer_each(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None = None
    ) -> Iterator[tuple[int, Reply]]:
        """The number of each conversation with its reply, as soon as it is there; nothing is recorded.

        Raises:
            EndpointError: A server did not answer, or not usefully; what did come was yielded before.
        """

    @abstractmethod
    def log_probabilities(
        self, conversations: Sequence[Conversation], continuations: Sequence[str]
    ) -> list[Continuation]:
        """How likely the model finds each continuation as the beginning of its conversation's answer.

        The end of the answer is not counted.

        Raises:
            SettingError: A continuation without tokens, or longer than what the model reads.
            EndpointError: A server that gives no log-probabilities, or did not answer.
        """

    @abstractmethod
    def option_log_probabilities(
        self, conversations: Sequence[Conversation], options: Sequence[str]
    ) -> list[dict[str, float]]:
        """For each conversation, the log-probability that its answer's first token is each option.

        Blanks around a token do not count, so " A" is the option "A" too.

        Raises:
            SettingError: An option that is no token of the model.
            EndpointError: A server that gives no log-probabilities, or did not answer.
        """

    def answer(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None = None
    ) -> list[Reply]:
        """One reply for each conversation, in their order.

        Raises:
            EndpointError: A server did not answer, or not usefully; what did come is in `calls`.
        """
        chosen = settings or ChatSettings()
        replies: dict[int, Reply] = {}
        try:
            for number, reply in self.answer_each(conversations, chosen):
                replies[number] = reply
        finally:
            for number in sorted(replies):
                messages = [dict(message) for message in conversations[number]]
                self.calls.append(Call(self.name, messages, chosen, replies[number]))
        return [replies[number] for number in range(len(conversations))]


def shorten(text: str) -> str:
    """A text on one line, cut where it would fill the screen."""
    words = " ".join(text.split())
    return words if len(words) <= 200 else words[:200] + "..."


def is_address(path: str) -> bool:
    """Whether a path names a model behind a server: `http://HOST/v1#MODEL`."""
    return path.startswith(("http://", "https://"))


def open_chat(path: str, loaded: Loaded | None = None) -> ChatModel:
    """A model that answers, by where it is.

    Args:
        path: A folder, a hub id, or the address of an OpenAI-compatible server with the model's name
            behind it, as `http://localhost:8000/v1#MODEL`.
        loaded: The model, where it is in memory already.

    Raises:
        CheckpointError: No such model.
        SettingError: An address without a model's name.
    """
    from germane.core.endpoint_chat import EndpointChat
    from germane.core.local_chat import LocalChat

    if loaded is not None:
        return LocalChat(loaded.model, loaded.processor, path)
    if not is_address(path):
        return LocalChat.load(path)
    endpoint, _, model = path.partition("#")
    if not model:
        raise SettingError(f"{path}: must also name the model: {path}#MODEL.")
    return EndpointChat(endpoint, model)


def load_language_model(
    path: str, dtype: torch.dtype | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, on the device, ready to be read.

    Args:
        path: A folder or hub id.
        dtype: Of the weights; default: float32 on a CPU, else the file's own.
        tokenizer: One that is loaded already.

    Raises:
        CheckpointError: No such model.
    """
    from transformers import AutoModelForCausalLM

    from germane.core import backpack  # noqa: F401 - makes its class known to AutoModelForCausalLM

    place = device()
    chosen: Any = dtype or (torch.float32 if place.type == "cpu" else "auto")
    folder = locate(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a causal language model: {shorten(str(error))}") from None
    return model.to(place).eval(), tokenizer or load_tokenizer(path)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        CheckpointError: There is none.
    """
    from transformers import AutoTokenizer

    folder = locate(path)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: has no tokenizer: {shorten(str(error))}") from None


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> list[int]:
    """The tokens of a conversation in the model's chat format, up to where its answer begins.

    A template that knows no system message gets it at the head of the first user message; a
    tokenizer without a template gets the contents, a line each. Only the template speaks in special
    tokens: what looks like one in a message is read as text, so no message can end or begin another.
    """
    if not tokenizer.chat_template:
        text = "".join(f"{message['content']}\n" for message in messages)
        return list(tokenizer(text, split_special_tokens=True)["input_ids"])
    messages = [{**message, "content": mark_special(tokenizer, message["content"])} for message in messages]
    from jinja2 import TemplateError

    def render(chosen: Conversation) -> str:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in chosen], tokenize=False, add_generation_prompt=True
            )
        )

    try:
        text = render(messages)
    except TemplateError:
        text = render(_without_system(messages))
    return encode_marked(tokenizer, text)


def encode_continuation(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, continuation: str
) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and of a text that continues it.

    Raises:
        SettingError: The text has no tokens.
    """
    tokens = encode_text(tokenizer, continuation)
    if not tokens:
        raise SettingError(f"{continuation!r}: has no tokens, so there is nothing to score.")
    return encode_conversation(tokenizer, messages), tokens


def _without_system(messages: Conversation) -> list[Message]:
    first, *rest = messages
    if first["role"] != "system" or not rest:
        return list(messages)
    content = f"{first['content']}\n\n{rest[0]['content']}"
    return [{"role": rest[0]["role"], "content": content}, *rest[1:]]


def mark_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with each special token in it marked, so that `encode_marked` reads it as text."""
    text = text.replace(_OPEN, "").replace(_CLOSE, "")
    found = [token for token in _special_tokens(tokenizer) if token in text]
    if not found:
        return text
    pattern = "|".join(re.escape(token) for token in sorted(found, key=len, reverse=True))
    return re.sub(pattern, lambda match: f"{_OPEN}{match[0]}{_CLOSE}", text)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens, and those that the chat template speaks in though they are not called special."""
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.values()
    return [
        token.content
        for token in added
        if token.content.strip() and (token.special or token.content in template)
    ]


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, what `mark_special` marked in it as text; without marks, as ever."""
    tokens: list[int] = []
    for number, piece in enumerate(_MARKED.split(text)):
        # Cut in two, since tokens that are not called special are found whatever the tokenizer is told.
        parts = [piece[:1], piece[1:]] if number % 2 and piece else [piece]
        for part in filter(None, parts):
            encoded = tokenizer(part, add_special_tokens=False, split_special_tokens=number % 2 == 1)
            tokens += encoded["input_ids"]
    return tokens


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text by someone else: nothing in it is a special token."""
    return encode_marked(tokenizer, mark_special(tokenizer, text))


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with: the tokenizer's own, else its end token, else the first."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def pad_left(
    rows: Sequence[Sequence[int]], fill: int, place: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(rows, width) tokens that all end in the last column, and the mask of what is no padding."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        if row:
            tokens[index, width - len(row) :] = torch.tensor(row)
            mask[index, width - len(row) :] = 1
    return tokens.to(place), mask.to(place)


def stops_at(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], begin: int) -> Callable[..., Tensor]:
    """A criterion for `generate`: (rows,) whether a row has said, from `begin` on, a text that ends it."""

    def stopped(written: Tensor, scores: Any, **_: Any) -> Tensor:
        rows = written[:, begin:] if stop else written[:, :0]
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        found = [any(word in text for word in stop) for text in texts]
        return torch.tensor(found, device=written.device)

    return stopped
