"""A language model behind a server that speaks the OpenAI protocol."""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from germane.core.chat import (
    Call,
    ChatModel,
    ChatSettings,
    Continuation,
    Conversation,
    Reply,
    encode_continuation,
    load_tokenizer,
    shorten,
)
from germane.core.errors import CheckpointError, EndpointError, MissingExtra, SettingError

Item = TypeVar("Item")
Value = TypeVar("Value")
Content = dict[str, Any]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds
_PASSING = (408, 409, 429)  # statuses that may be another the next time, as all from 500 on
_LIKELIEST = 20  # tokens that a server names at most
_ECHO = (
    "gives no log-probabilities of a text; score it with the model in this process, or on a server whose "
    "/completions takes `echo` and `logprobs` together, such as vLLM."
)
_LIKELY = "gives no log-probabilities of the likeliest tokens; ask a server that takes `top_logprobs`."
_jitter = random.Random()  # of its own, so that nobody's seeded numbers move


@dataclass
class Usage:
    """What was asked of a server so far.

    Attributes:
        requests: Sent, those that failed included.
        retries: Requests that repeated another.
        prompt_tokens: Read by the server, as it counts them.
        completion_tokens: Written by the server.
        prices: Of a million tokens read and of a million written; None where nobody said.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prices: tuple[float, float] | None = None

    @property
    def cost(self) -> float | None:
        """In the currency of the prices."""
        if self.prices is None:
            return None
        read, written = self.prices
        return (self.prompt_tokens * read + self.completion_tokens * written) / 1e6


class _NoContent(Exception):
    """An answer that is no JSON; its text."""


@dataclass
class EndpointChat(ChatModel):
    """A model behind a server that speaks the OpenAI protocol: vLLM, llama.cpp, hosted.

    Nothing is asked of the network before the first call. Too many requests, server faults, cut answers,
    broken connections and time-outs are tried again at most `retries` times, after pauses that grow or
    are as long as the server says.

    Attributes:
        endpoint: The server's address, as "http://localhost:8000/v1".
        model: The model's name on that server.
        key: Environment variable that holds the key; servers of one's own need none.
        timeout: Seconds to wait for an answer, and the longest pause that a server may ask for.
        retries: Times to ask again.
        parallel: Requests at a time.
        prices: Of a million tokens read and of a million written.
        tokenizer: Folder or hub id of the model's tokenizer, which `log_probabilities` needs, since a
            server scores tokens, not conversations; default: what `model` names.
        calls: Every call so far.
        usage: What all calls took together.
    """

    endpoint: str
    model: str
    key: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 4
    parallel: int = 4
    prices: tuple[float, float] | None = None
    tokenizer: str = ""
    calls: list[Call] = field(default_factory=list)
    usage: Usage = field(init=False)
    _client: Any = field(default=None, init=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.usage = Usage(prices=self.prices)

    @property
    def name(self) -> str:
        """The model and where it is."""
        return f"{self.model} at {self.endpoint}"

    def fingerprint(self) -> str:
        """The name: what a server does behind it cannot be seen."""
        return self.name

    def answer_each(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None = None
    ) -> Iterator[tuple[int, Reply]]:
        chosen = settings or ChatSettings()
        options: dict[str, Any] = {
            "max_tokens": chosen.max_tokens,
            "temperature": chosen.temperature,
            "top_p": chosen.top_p,
            "seed": chosen.seed,
            **({"stop": chosen.stop} if chosen.stop else {}),
        }

        def ask(messages: Conversation, stopped: threading.Event) -> Reply:
            start = time.perf_counter()
            content, retries = self._request(self._chat(messages, options), stopped)
            return self._reply(content, retries, time.perf_counter() - start)

        yield from self._each(ask, conversations)

    def log_probabilities(
        self, conversations: Sequence[Conversation], continuations: Sequence[str]
    ) -> list[Continuation]:
        tokenizer = self._load_tokenizer()
        pairs = [
            encode_continuation(tokenizer, messages, continuation)
            for messages, continuation in zip(conversations, continuations, strict=True)
        ]
        found = dict(self._each(self._score, pairs))
        return [found[number] for number in range(len(pairs))]

    def option_log_probabilities(
        self, conversations: Sequence[Conversation], options: Sequence[str]
    ) -> list[dict[str, float]]:
        asked = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": _LIKELIEST}

        def ask(messages: Conversation, stopped: threading.Event) -> dict[str, float]:
            content = self._request_scores(self._chat(messages, asked), stopped, _LIKELY)
            return self._options(content, options)

        found = dict(self._each(ask, conversations))
        return [found[number] for number in range(len(conversations))]

    def _each(
        self, ask: Callable[[Item, threading.Event], Value], items: Sequence[Item]
    ) -> Iterator[tuple[int, Value]]:
        """The number of each item with what came back, as it comes.

        After a fault nothing new is asked; what is under way is waited for, and yielded too.
        """
        if self._client is None:
            self._client = self._connect()
        stopped = threading.Event()
        fault: BaseException | None = None
        answered = 0

        def work(item: Item) -> Value:
            if stopped.is_set():
                raise CancelledError
            try:
                return ask(item, stopped)
            except BaseException:
                stopped.set()
                raise

        with ThreadPoolExecutor(self.parallel) as pool:
            numbers = {pool.submit(work, item): number for number, item in enumerate(items)}
            try:
                for future in as_completed(numbers):
                    error = future.exception()
                    if error is None:
                        answered += 1
                        yield numbers[future], future.result()
                    elif not isinstance(error, CancelledError):
                        fault = fault or error
            finally:  # also where whoever asked wants no more
                stopped.set()
        if isinstance(fault, EndpointError) and len(numbers) > 1:
            raise EndpointError(f"{fault} Of {len(numbers)} conversations, {answered} were answered.")
        if fault is not None:
            raise fault

    def _connect(self) -> Any:
        try:
            from openai import OpenAI
        except ImportError:
            raise MissingExtra("openai", "endpoints", f"asking {self.endpoint}") from None
        key = os.environ.get(self.key) or "none"
        return OpenAI(base_url=self.endpoint, api_key=key, timeout=self.timeout, max_retries=0)

    def _chat(self, messages: Conversation, options: dict[str, Any]) -> Callable[[], Any]:
        create = self._client.chat.completions.with_raw_response.create
        sent = [dict(message) for message in messages]
        return lambda: create(model=self.model, messages=sent, **options)

    def _request(self, send: Callable[[], Any], stopped: threading.Event) -> tuple[Content, int]:
        """What the server answers, and how often it was asked again."""
        import openai

        attempt = 0
        while True:
            with self._lock:
                self.usage.requests += 1
                self.usage.retries += attempt > 0
            try:
                content = _content(send())
            except (openai.OpenAIError, _NoContent) as error:
                pause = self._pause(error, attempt)
                if pause is None or stopped.wait(pause):
                    raise EndpointError(f"{self.name}: {self._reason(error, attempt + 1)}") from error
                attempt += 1
                continue
            self._count(content)
            return content, attempt

    def _count(self, content: Content) -> None:
        read, written = _tokens(content)
        with self._lock:
            self.usage.prompt_tokens += read
            self.usage.completion_tokens += written

    def _pause(self, error: Exception, attempt: int) -> float | None:
        """Seconds to wait before asking again; None where that is of no use."""
        import openai

        status = getattr(error, "status_code", None)
        passing = isinstance(error, (openai.APIConnectionError, _NoContent)) or (
            status is not None and (status in _PASSING or status >= 500)
        )
        if not passing or attempt >= self.retries:
            return None
        told = _told_pause(error)
        if told is not None:
            return told if told <= self.timeout else None
        longest = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)
        return longest * _jitter.uniform(0.5, 1.0)

    def _reason(self, error: Exception, asked: int) -> str:
        import openai

        if isinstance(error, _NoContent):
            got = shorten(str(error))
            return f"its answer is {f'no JSON: {got!r}' if got else 'empty'}, asked {_times(asked)}."
        if isinstance(error, openai.APITimeoutError):
            return f"no answer within {self.timeout:g} seconds, asked {_times(asked)}."
        if isinstance(error, openai.APIConnectionError):
            cause = shorten(str(error.__cause__ or error))
            return f"cannot be reached; is the server running, and the address right? ({cause})"
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return f"refuses the key; put a valid one into the environment variable {self.key}."
        if isinstance(error, openai.NotFoundError):
            return "knows no such address or model; the address mostly ends in /v1."
        if isinstance(error, openai.APIStatusError):
            told = _told_pause(error)
            later = f" It asks to wait {told:g} seconds." if told and told > self.timeout else ""
            said = shorten(error.response.text)
            return f"answers with status {error.status_code}, asked {_times(asked)}: {said}{later}"
        return f"did not answer usefully: {shorten(str(error))}"

    def _reply(self, content: Content, retries: int, seconds: float) -> Reply:
        """The reply in an answer; servers may leave out `usage`, but not the choice."""
        choice = self._choice(content, "message")
        read, written = _tokens(content)
        finish = choice.get("finish_reason")
        return Reply(
            text=str(choice["message"].get("content") or ""),
            finish="length" if finish == "length" else "stop",
            prompt_tokens=read,
            completion_tokens=written,
            seconds=seconds,
            retries=retries,
        )

    def _choice(self, content: Content, part: str) -> Content:
        """The first choice of an answer, which must be as the protocol says."""
        choices = content.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict) or part not in choice or choice[part] is None:
            raise EndpointError(
                f"{self.name}: its answer is no completion: {shorten(json.dumps(content))!r}; "
                "is it an OpenAI-compatible server, and the address right?"
            )
        return choice

    def _load_tokenizer(self) -> Any:
        try:
            return load_tokenizer(self.tokenizer or self.model)
        except CheckpointError as error:
            raise SettingError(
                f"{self.name}: to score texts, its tokenizer is needed here; give `tokenizer` a folder "
                f"or hub id that has it ({error})"
            ) from None

    def _score(self, pair: tuple[list[int], list[int]], stopped: threading.Event) -> Continuation:
        """By having the server repeat the text, and name the log-probability of each token."""
        prompt, tokens = pair
        create = self._client.completions.with_raw_response.create
        options = {"max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
        send = lambda: create(model=self.model, prompt=prompt + tokens, **options)  # noqa: E731
        content = self._request_scores(send, stopped, _ECHO)
        choice = self._choice(content, "text")
        given = (choice.get("logprobs") or {}).get("token_logprobs") or []
        scored = given[len(prompt) : len(prompt) + len(tokens)]
        read = _tokens(content)[0]
        if len(scored) < len(tokens) or None in scored or read not in (0, len(prompt) + len(tokens)):
            raise EndpointError(f"{self.name}: {_ECHO}")
        return Continuation(math.fsum(scored), len(tokens))

    def _request_scores(self, send: Callable[[], Any], stopped: threading.Event, lacking: str) -> Content:
        """As `_request`, of what not every server offers."""
        try:
            return self._request(send, stopped)[0]
        except EndpointError as error:
            status = getattr(error.__cause__, "status_code", None)
            if status is None or status in (401, 403, *_PASSING):
                raise
            said = shorten(getattr(error.__cause__, "message", ""))
            raise EndpointError(f"{self.name}: {lacking} It answers with status {status}: {said}") from None

    def _options(self, content: Content, options: Sequence[str]) -> dict[str, float]:
        """The log-probability of each option as the first token; -inf where the server does not name it."""
        given = (self._choice(content, "message").get("logprobs") or {}).get("content") or []
        if not given or not given[0].get("top_logprobs"):
            raise EndpointError(f"{self.name}: {_LIKELY}")
        named = [(entry["token"].strip(), float(entry["logprob"])) for entry in given[0]["top_logprobs"]]
        return {
            option: _log_sum([value for token, value in named if token == option.strip()])
            for option in options
        }


def _content(raw: Any) -> Content:
    """The JSON object of a raw response."""
    text = raw.text if isinstance(raw.text, str) else raw.text()
    try:
        content = json.loads(text)
    except ValueError:
        raise _NoContent(text) from None
    return content if isinstance(content, dict) else {"": content}


def _tokens(content: Content) -> tuple[int, int]:
    """Tokens read and written, as far as a server says."""
    usage = content.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)


def _told_pause(error: Exception) -> float | None:
    """Seconds that a server asks to wait, which it may say as a number or as a date."""
    response = getattr(error, "response", None)
    told = None if response is None else response.headers.get("retry-after")
    if not told:
        return None
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return None


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _log_sum(values: Sequence[float]) -> float:
    largest = max(values, default=-math.inf)
    if largest == -math.inf:
        return largest
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))
