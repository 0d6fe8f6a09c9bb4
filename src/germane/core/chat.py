"""Language models that answer: local transformers, or any OpenAI-compatible server.

A conversation is a list of messages, each a mapping with `role` ("system", "user", "assistant") and
`content`. A chat model takes many conversations at a time and answers each; every call is recorded.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from germane.core.checkpoint import locate
from germane.core.device import device
from germane.core.errors import CheckpointError, EndpointError, MissingExtra, SettingError
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
    """

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    retries: int = 0


@dataclass(frozen=True)
class Call:
    """What a chat model was asked, how, and what it said."""

    model: str
    messages: list[dict[str, str]]
    settings: ChatSettings
    reply: Reply


class ChatModel(Protocol):
    """Anything that answers conversations, and keeps a record of it in `calls`."""

    calls: list[Call]

    @property
    def name(self) -> str:
        """What it is called in records."""
        ...

    def answer(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None = None
    ) -> list[Reply]:
        """One reply for each conversation, in their order."""
        ...


@dataclass
class LocalChat:
    """A causal language model of transformers, in this process.

    Conversations go in batches, padded on the left, through the tokenizer's own chat template, and
    are continued with a key-value cache.

    Attributes:
        model: The language model.
        tokenizer: The model's own.
        name: What it is called in records.
        batch_size: Conversations at a time.
        calls: Every call so far.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = ""
    batch_size: int = 8
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def load(cls, path: str, batch_size: int = 8) -> LocalChat:
        """The model of a folder or hub id."""
        model, tokenizer = load_language_model(path)
        return cls(model, tokenizer, path, batch_size)

    def answer(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None = None
    ) -> list[Reply]:
        """One reply for each conversation, in their order."""
        chosen = settings or ChatSettings()
        prompts = [encode_conversation(self.tokenizer, messages) for messages in conversations]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        replies: dict[int, Reply] = {}
        for start in range(0, len(order), self.batch_size):
            picked = order[start : start + self.batch_size]
            found = self._generate([prompts[index] for index in picked], chosen)
            replies.update(zip(picked, found, strict=True))
        ordered = [replies[index] for index in range(len(prompts))]
        self.calls += _calls(self.name, conversations, chosen, ordered)
        return ordered

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], settings: ChatSettings) -> list[Reply]:
        start = time.perf_counter()
        tokens, mask = pad_left(prompts, padding(self.tokenizer), self.model.device)
        sampled: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            output = self.model.eval().generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=settings.max_tokens,
                do_sample=settings.temperature > 0,
                pad_token_id=padding(self.tokenizer),
                stopping_criteria=[stops_at(self.tokenizer, settings.stop, tokens.shape[1])],
                **(sampled if settings.temperature > 0 else {}),
            )
        seconds = time.perf_counter() - start
        rows = output[:, tokens.shape[1] :].tolist()
        return [
            self._reply(len(prompt), row, settings, seconds)
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    def _reply(self, read: int, row: list[int], settings: ChatSettings, seconds: float) -> Reply:
        ends = _end_tokens(self.model, self.tokenizer)
        length = next((place for place, token in enumerate(row) if token in ends), len(row))
        text = self.tokenizer.decode(row[:length], skip_special_tokens=True)
        stops = [place for word in settings.stop if (place := text.find(word)) >= 0]
        ended = length < len(row) or bool(stops) or len(row) < settings.max_tokens
        text = text[: min(stops)] if stops else text
        finish: Literal["stop", "length"] = "stop" if ended else "length"
        return Reply(text, finish, read, min(length + 1, len(row)), seconds)


@dataclass
class EndpointChat:
    """A model behind a server that speaks the OpenAI protocol: vLLM, llama.cpp, hosted.

    Nothing is asked of the network before the first `answer`. Too many requests, server faults,
    broken connections and time-outs are tried again, with growing pauses, at most `retries` times.

    Attributes:
        endpoint: The server's address, as "http://localhost:8000/v1".
        model: The model's name on that server.
        key: Environment variable that holds the key; servers of one's own need none.
        timeout: Seconds to wait for an answer.
        retries: Times to ask again.
        parallel: Requests at a time.
        calls: Every call so far.
    """

    endpoint: str
    model: str
    key: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 4
    parallel: int = 4
    calls: list[Call] = field(default_factory=list)
    _client: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The model and where it is."""
        return f"{self.model} at {self.endpoint}"

    def answer(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None = None
    ) -> list[Reply]:
        """One reply for each conversation, in their order.

        Raises:
            EndpointError: The server did not answer, or not usefully.
        """
        chosen = settings or ChatSettings()
        if self._client is None:
            self._client = self._connect()
        with ThreadPoolExecutor(self.parallel) as pool:
            replies = list(pool.map(lambda messages: self._ask(messages, chosen), conversations))
        self.calls += _calls(self.name, conversations, chosen, replies)
        return replies

    def _connect(self) -> Any:
        try:
            from openai import OpenAI
        except ImportError:
            raise MissingExtra("openai", "endpoints", f"asking {self.endpoint}") from None
        key = os.environ.get(self.key) or "none"
        return OpenAI(base_url=self.endpoint, api_key=key, timeout=self.timeout, max_retries=self.retries)

    def _ask(self, messages: Conversation, settings: ChatSettings) -> Reply:
        import openai

        start = time.perf_counter()
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[dict(message) for message in messages],
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
                **({"stop": settings.stop} if settings.stop else {}),
            )
        except openai.OpenAIError as error:
            raise EndpointError(f"{self.name}: {self._reason(error)}") from None
        return self._reply(raw, time.perf_counter() - start)

    def _reason(self, error: Exception) -> str:
        import openai

        if isinstance(error, openai.APITimeoutError):
            return f"no answer within {self.timeout:g} seconds, asked {self.retries + 1} times."
        if isinstance(error, openai.APIConnectionError):
            return "cannot be reached; is the server running, and the address right?"
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return f"refuses the key; put a valid one into the environment variable {self.key}."
        if isinstance(error, openai.NotFoundError):
            return "knows no such address or model; the address mostly ends in /v1."
        if isinstance(error, openai.APIStatusError):
            return f"answers with status {error.status_code}: {_shorten(error.response.text)}"
        return f"did not answer usefully: {_shorten(str(error))}"

    def _reply(self, raw: Any, seconds: float) -> Reply:
        """The reply in a raw response; servers may leave out `usage`, but not the choice."""
        try:
            content = json.loads(raw.text if isinstance(raw.text, str) else raw.text())
            choice = content["choices"][0]
            text = choice["message"]["content"] or ""
        except (ValueError, LookupError, TypeError):
            got = _shorten(str(raw.text if isinstance(raw.text, str) else raw.text()))
            raise EndpointError(
                f"{self.name}: its answer is no chat completion: {got!r}; "
                "is it an OpenAI-compatible server, and the address right?"
            ) from None
        usage = content.get("usage") or {}
        return Reply(
            text=str(text),
            finish="length" if choice.get("finish_reason") == "length" else "stop",
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            seconds=seconds,
            retries=int(getattr(raw, "retries_taken", 0)),
        )


def _shorten(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 200 else words[:200] + "..."


def _calls(
    name: str, conversations: Sequence[Conversation], settings: ChatSettings, replies: Sequence[Reply]
) -> Iterator[Call]:
    for messages, reply in zip(conversations, replies, strict=True):
        yield Call(name, [dict(message) for message in messages], settings, reply)


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
        raise CheckpointError(f"{path}: not a causal language model: {_shorten(str(error))}") from None
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
        raise CheckpointError(f"{path}: has no tokenizer: {_shorten(str(error))}") from None


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


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configuration = getattr(model, "generation_config", None)
    ends = getattr(configuration, "eos_token_id", None)
    found = {ends} if isinstance(ends, int) else set(ends or ())
    return (found | {tokenizer.eos_token_id, tokenizer.pad_token_id}) - {None}
