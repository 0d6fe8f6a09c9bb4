"""A language model of transformers, in this process, that answers and scores conversations."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import xxhash
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from germane.core.chat import (
    Call,
    ChatModel,
    ChatSettings,
    Continuation,
    Conversation,
    Reply,
    encode_continuation,
    encode_conversation,
    load_language_model,
    pad_left,
    padding,
    stops_at,
)
from germane.core.errors import SettingError
from germane.core.generation import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SCORED_SHARE = 4  # a scored token needs its row of logits, an answered one only its keys and values


@dataclass
class LocalChat(ChatModel):
    """A causal language model of transformers, in this process.

    Conversations go through the tokenizer's own chat template in batches of like lengths, padded on the
    left, and are continued with a key-value cache.

    Attributes:
        model: The language model.
        tokenizer: The model's own.
        name: What it is called in records.
        batch_tokens: Tokens at a time, read and written, padding included.
        calls: Every call so far.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = ""
    batch_tokens: int = 8192
    calls: list[Call] = field(default_factory=list)
    _words: dict[str, list[int]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: str, batch_tokens: int = 8192) -> LocalChat:
        """The model of a folder or hub id."""
        model, tokenizer = load_language_model(path)
        return cls(model, tokenizer, path, batch_tokens)

    def fingerprint(self) -> str:
        """A digest of the weights as they are now, the tokenizer and how answers are generated.

        What hooks do to the model is not seen.
        """
        state = xxhash.xxh3_128()
        for name, tensor in sorted(self.model.state_dict().items()):
            state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            state.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
        state.update(self.model.generation_config.to_json_string().encode())
        state.update(str(self.tokenizer.chat_template).encode())
        state.update(str(sorted(self.tokenizer.get_vocab().items())).encode())
        return state.hexdigest()

    def answer_each(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None = None
    ) -> Iterator[tuple[int, Reply]]:
        chosen = settings or ChatSettings()
        prompts = [encode_conversation(self.tokenizer, messages) for messages in conversations]
        lengths = [len(prompt) + chosen.max_tokens for prompt in prompts]
        for picked in batches(lengths, self.batch_tokens):
            found = self._generate([prompts[number] for number in picked], chosen)
            yield from zip(picked, found, strict=True)

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

    def log_probabilities(
        self, conversations: Sequence[Conversation], continuations: Sequence[str]
    ) -> list[Continuation]:
        pairs = [
            encode_continuation(self.tokenizer, messages, continuation)
            for messages, continuation in zip(conversations, continuations, strict=True)
        ]
        found: dict[int, Continuation] = {}
        lengths = [len(prompt) + len(tokens) for prompt, tokens in pairs]
        self._require_context(lengths)
        for picked in batches(lengths, self.batch_tokens // _SCORED_SHARE):
            for number, likely in zip(picked, self._likely([pairs[n] for n in picked]), strict=True):
                tokens = pairs[number][1]
                chosen = likely.gather(1, torch.tensor(tokens, device=likely.device)[:, None])
                found[number] = Continuation(float(chosen.sum()), len(tokens))
        return [found[number] for number in range(len(pairs))]

    def option_log_probabilities(
        self, conversations: Sequence[Conversation], options: Sequence[str]
    ) -> list[dict[str, float]]:
        spellings = {option: self._spellings(option) for option in options}
        prompts = [encode_conversation(self.tokenizer, messages) for messages in conversations]
        found: dict[int, dict[str, float]] = {}
        lengths = [len(prompt) for prompt in prompts]
        self._require_context(lengths)
        for picked in batches(lengths, self.batch_tokens // _SCORED_SHARE):
            # Only the place right after each prompt is read, so any one token stands for what follows.
            asked = [(prompts[number], [0]) for number in picked]
            for number, likely in zip(picked, self._likely(asked), strict=True):
                found[number] = {
                    option: float(likely[0, tokens].logsumexp(0)) for option, tokens in spellings.items()
                }
        return [found[number] for number in range(len(prompts))]

    @torch.no_grad()
    def _likely(self, pairs: list[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Of each (prompt, continuation), the (tokens, vocabulary) log-probabilities of the latter."""
        # The last token of a continuation is predicted, never read.
        rows = [torch.tensor([*prompt, *tokens[:-1]]) for prompt, tokens in pairs]
        ends = torch.tensor([len(row) for row in rows])
        padded = pad_sequence(rows, batch_first=True, padding_value=padding(self.tokenizer))
        mask = (torch.arange(padded.shape[1]) < ends[:, None]).long()
        first = min(len(prompt) for prompt, _ in pairs) - 1
        place = self.model.device
        kept: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            kept["logits_to_keep"] = torch.arange(first, padded.shape[1], device=place)
        output = self.model.eval()(input_ids=padded.to(place), attention_mask=mask.to(place), **kept)
        logits = output.logits[:, 0 if kept else first :]
        return [
            logits[row, len(prompt) - 1 - first :][: len(tokens)].float().log_softmax(-1)
            for row, (prompt, tokens) in enumerate(pairs)
        ]

    def _spellings(self, option: str) -> list[int]:
        """The tokens that are an option, but for blanks around it."""
        if not self._words:
            size = min(len(self.tokenizer), int(self.model.config.get_text_config().vocab_size))
            for token, text in enumerate(self.tokenizer.batch_decode([[token] for token in range(size)])):
                self._words.setdefault(text.strip(), []).append(token)
        if not option.strip() or option.strip() not in self._words:
            raise SettingError(
                f"{option!r}: is no token of {self.name}; options must be one token each, or be scored "
                "as continuations."
            )
        return self._words[option.strip()]

    def _require_context(self, lengths: Sequence[int]) -> None:
        context = context_of(self.model.config.to_dict())
        longest = max(lengths, default=0)
        if context is not None and longest > context:
            raise SettingError(
                f"{self.name}: a conversation has {longest} tokens with its continuation, and the model "
                f"reads {context} at most; shorten it."
            )


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """The numbers of rows, like lengths together, as many as fit when all are padded to the longest."""
    picked: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if picked and (len(picked) + 1) * lengths[number] > budget:
            yield picked
            picked = []
        picked.append(number)
    if picked:
        yield picked


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configuration = getattr(model, "generation_config", None)
    ends = getattr(configuration, "eos_token_id", None)
    found = {ends} if isinstance(ends, int) else set(ends or ())
    return (found | {tokenizer.eos_token_id, tokenizer.pad_token_id}) - {None}
