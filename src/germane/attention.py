"""What a method of the task attend is, and what it gives: the same model, reading otherwise inside a block.

Nothing is trained and no model is written. Inside the block prompts go through an `Attending`; when it is
left, the model is what it was.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from germane.core.chat import pad_left, padding, stops_at
from germane.core.checkpoint import Checkpoint
from germane.core.errors import CheckpointError, SettingError
from germane.core.generation import context_of
from germane.core.models import names_language_model
from germane.method import Method, build

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Texts, and sets of texts that stand beside each other; a text of a set may itself have sets.
Prompt: TypeAlias = "Sequence[str | Sequence[str | Prompt]]"
# The same in tokens: a list is a text, a tuple a set.
Encoded: TypeAlias = "list[list[int] | tuple[Encoded, ...]]"
_WINDOWS = ("sliding_window", "attention_chunk_size")  # how configs call a layer's shorter reach


@dataclass(frozen=True)
class Layout:
    """A prompt as a model reads it.

    Attributes:
        tokens: Of all its texts, one after the other.
        positions: Of each token, the number it is said to stand at.
        sees: (tokens, tokens) whether the token of the row attends to that of the column.
        ending: Tokens of the last text.
    """

    tokens: list[int]
    positions: list[int]
    sees: Tensor
    ending: int

    def branch(self, texts: Sequence[Sequence[int]]) -> Layout:
        """The prompt with several continuations, none of which sees another."""
        first, last = len(self.tokens), self.positions[-1] + 1
        total = first + sum(map(len, texts))
        sees = torch.zeros(total, total, dtype=torch.bool)
        sees[:first, :first] = self.sees
        sees[first:, :first] = self.sees[-1]
        for text in texts:
            run = slice(first, first + len(text))
            sees[run, run] = causal(len(text))
            first += len(text)
        tokens = [token for text in texts for token in text]
        positions = [last + place for text in texts for place in range(len(text))]
        return Layout([*self.tokens, *tokens], [*self.positions, *positions], sees, self.ending)


def causal(count: int) -> Tensor:
    """(tokens, tokens) where every token sees itself and those before it."""
    return torch.ones(count, count, dtype=torch.bool).tril()


def in_a_row(prompt: Encoded) -> Layout:
    """A prompt as it is usually read: the texts of a set in the order they are given."""
    tokens = list(flat(prompt))
    ending = prompt[-1]
    return Layout(tokens, list(range(len(tokens))), causal(len(tokens)), len(ending))


def flat(prompt: Encoded) -> Iterator[int]:
    """The tokens of a prompt in the order they are given."""
    for part in prompt:
        if isinstance(part, tuple):
            for text in part:
                yield from flat(text)
        else:
            yield from part


@dataclass
class Attending:
    """A model that reads prompts in a certain way.

    Attributes:
        model: A causal language model, in evaluation mode.
        tokenizer: Its own.
        arrange: How tokens become what it reads.
        batch_size: Prompts at a time.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    arrange: Callable[[Encoded], Layout] = in_a_row
    batch_size: int = 8

    def lay_out(self, prompt: Prompt, room: int = 0) -> Layout:
        """What the model reads.

        Every text is read by itself, the first with the tokenizer's special tokens: a set's texts have the
        same tokens in any order.

        Args:
            prompt: Texts and sets, the last of them a text.
            room: Tokens that must still fit in behind.

        Raises:
            SettingError: A set or text without content, no text at the end, or more than the model reads.
        """
        if isinstance(prompt, str) or not prompt or not isinstance(prompt[-1], str):
            raise SettingError("a prompt is a list of texts and sets whose last part is a text.")
        begun = prompt if isinstance(prompt[0], str) else ["", *prompt]
        encoded = self._encode(begun)
        encoded[0] = list(self.tokenizer(begun[0])["input_ids"])
        if not encoded[-1]:
            raise SettingError(
                f"the prompt's last text, {prompt[-1]!r}, has no tokens: nothing would follow."
            )
        layout = self.arrange(encoded)
        self._require_room(layout, room)
        return layout

    @torch.no_grad()
    def logits(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Of each prompt, (tokens of its last text, vocabulary) logits of what follows each."""
        layouts = [self.lay_out(prompt) for prompt in prompts]
        found: dict[int, Tensor] = {}
        for picked, batch in self._batches(layouts):
            rows = self.read(batch, max(layout.ending for layout in batch))
            for index, row in zip(picked, rows, strict=True):
                found[index] = row[-layouts[index].ending :].cpu()
        return [found[index] for index in range(len(layouts))]

    @torch.no_grad()
    def log_probabilities(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Of each prompt, the mean log-probability of a token of each of its answers.

        A prompt's answers are read at once, beside each other: a set that no method is needed for.

        Args:
            prompts: What is answered.
            answers: Of each prompt, what may follow it, with the blank before it.

        Raises:
            SettingError: A prompt that `lay_out` refuses, or an answer without tokens.
        """
        texts = [[self._tokens(answer) for answer in group] for group in answers]
        begun = [
            self.lay_out(prompt, max(map(len, group))) for prompt, group in zip(prompts, texts, strict=True)
        ]
        layouts = [layout.branch(group) for layout, group in zip(begun, texts, strict=True)]
        found: dict[int, list[float]] = {}
        for picked, batch in self._batches(layouts):
            rows = self.read(batch, max(1 + sum(map(len, texts[index])) for index in picked))
            for index, row in zip(picked, rows, strict=True):
                found[index] = _mean_log_probabilities(row, texts[index])
        return [found[index] for index in range(len(layouts))]

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """What the model writes after each prompt, the likeliest token always, without special tokens.

        Args:
            prompts: What is continued.
            max_new_tokens: Longest continuation, in tokens.
            stop: Texts that end a continuation, and are no part of it.

        Raises:
            SettingError: A prompt that `lay_out` refuses.
        """
        layouts = [self.lay_out(prompt, max_new_tokens) for prompt in prompts]
        written: dict[int, str] = {}
        for picked, batch in self._batches(layouts):
            rows = self._continue(batch, max_new_tokens, stop)
            for index, row in zip(picked, rows, strict=True):
                text = str(self.tokenizer.decode(row, skip_special_tokens=True))
                places = [place for word in stop if (place := text.find(word)) >= 0]
                written[index] = text[: min(places)] if places else text
        return [written[index] for index in range(len(layouts))]

    def _encode(self, prompt: Prompt) -> Encoded:
        found: Encoded = []
        for part in prompt:
            if isinstance(part, str):
                found.append(list(self.tokenizer(part, add_special_tokens=False)["input_ids"]))
                continue
            texts = [self._encode([text] if isinstance(text, str) else text) for text in part]
            if not texts:
                raise SettingError("a set of the prompt is empty: it needs one text at least.")
            for text, encoded in zip(part, texts, strict=True):
                if not any(True for _ in flat(encoded)):
                    raise SettingError(f"a text of a set, {text!r}, has no tokens: leave it out.")
            found.append(tuple(texts))
        return found

    def _tokens(self, answer: str) -> list[int]:
        tokens = list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        if not tokens:
            raise SettingError(f"an answer, {answer!r}, has no tokens.")
        return tokens

    def _require_room(self, layout: Layout, room: int) -> None:
        config = self.model.config.get_text_config().to_dict()
        context = context_of(config)
        last = max(layout.positions) + 1 + room
        if context is not None and last > context:
            raise SettingError(
                f"a prompt with what is to follow reaches position {last}; the model reads {context}: "
                "shorten it."
            )
        # A mask of one's own takes the place of the model's, which would hide what lies further back.
        window = min((int(config[name]) for name in _WINDOWS if config.get(name)), default=None)
        if window is not None and len(layout.tokens) + room > window:
            raise SettingError(
                f"a prompt with what is to follow has {len(layout.tokens) + room} tokens; layers of the "
                f"model attend to the last {window} only: shorten it."
            )

    def _batches(self, layouts: Sequence[Layout]) -> Iterator[tuple[list[int], list[Layout]]]:
        order = sorted(range(len(layouts)), key=lambda index: len(layouts[index].tokens))
        for start in range(0, len(order), self.batch_size):
            picked = order[start : start + self.batch_size]
            yield picked, [layouts[index] for index in picked]

    def _inputs(self, layouts: Sequence[Layout]) -> dict[str, Tensor]:
        """Rows that all end in the last column; padding sees itself alone, and nothing sees it."""
        tokens, _ = pad_left([layout.tokens for layout in layouts], padding(self.tokenizer))
        positions, _ = pad_left([layout.positions for layout in layouts], 0)
        width = tokens.shape[1]
        sees = torch.eye(width, dtype=torch.bool).repeat(len(layouts), 1, 1)
        for row, layout in zip(sees, layouts, strict=True):
            first = width - len(layout.tokens)
            row[first:, first:] = layout.sees
        mask = torch.zeros(sees.shape, dtype=self.model.dtype)
        mask.masked_fill_(~sees, torch.finfo(self.model.dtype).min)
        inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask[:, None]}
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def read(self, layouts: Sequence[Layout], count: int) -> Tensor:
        """(layouts, count, vocabulary) logits of the last tokens of each."""
        inputs: dict[str, Any] = self._inputs(layouts)
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            inputs["logits_to_keep"] = count  # a vocabulary is wide, and most logits are not wanted
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits[:, -count:]

    def _continue(self, layouts: Sequence[Layout], count: int, stop: Sequence[str]) -> list[list[int]]:
        """New tokens of each row: the prompt is read into a cache, and `generate` goes on from there."""
        inputs = self._inputs(layouts)
        tokens = inputs["input_ids"]
        _, real = pad_left([layout.tokens for layout in layouts], 0, tokens.device)
        output: Any = self.model.generate(
            input_ids=tokens,
            attention_mask=real,
            position_ids=inputs["position_ids"],
            past_key_values=self._cache(inputs),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=padding(self.tokenizer),
            stopping_criteria=[stops_at(self.tokenizer, stop, tokens.shape[1])],
        )
        rows: list[list[int]] = output[:, tokens.shape[1] :].tolist()
        return rows

    def _cache(self, inputs: dict[str, Tensor]) -> Any:
        """All but the last token, read with its own mask; a token that is written sees all before it."""
        from transformers import DynamicCache

        cache = DynamicCache()  # without a window: no key may be dropped, or the mask would not fit
        if inputs["input_ids"].shape[1] > 1:
            self.model(
                input_ids=inputs["input_ids"][:, :-1],
                position_ids=inputs["position_ids"][:, :-1],
                attention_mask=inputs["attention_mask"][:, :, :-1, :-1],
                past_key_values=cache,
                use_cache=True,
            )
        return cache


def _mean_log_probabilities(logits: Tensor, texts: Sequence[Sequence[int]]) -> list[float]:
    """Of each text that branches off, from the logits of the token before them and of their own."""
    last = -1 - sum(map(len, texts))  # the prompt's last token, counted from the end
    found = []
    start = last + 1
    for text in texts:
        before = [last, *range(start, start + len(text) - 1)]
        chosen = logits[before].double().log_softmax(-1).cpu()
        found.append(float(chosen[range(len(text)), list(text)].mean()))
        start += len(text)
    return found


class Attention(Method):
    """A method of reading: it changes what a model attends to, and gives it back as it was."""

    def check_model(self, path: str, source: Checkpoint) -> None:
        """Raise a `CheckpointError` for a model that the method cannot work with, before it is loaded."""
        kind = str(source.config.get("architectures"))
        if not names_language_model(kind):
            raise CheckpointError(f"{self.name}: needs a language model; {path} is {kind}.")

    @abstractmethod
    def applied(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> AbstractContextManager[Attending]:
        """The model inside a block; when that is left, also by an error, its outputs are what they were."""


def attend(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, method: str, **settings: Any
) -> AbstractContextManager[Attending]:
    """A model that reads in another way inside a `with` block; see `germane explain attend`.

    Args:
        model: A language model of transformers.
        tokenizer: Its own.
        method: Name of the method, such as "set-based-prompting".
        **settings: The method's settings.

    Raises:
        CheckpointError: A model that the method cannot work with, on entering the block.
    """
    built = build(f"attend/{method.removeprefix('attend/')}", settings)
    assert isinstance(built, Attention)
    return built.applied(model, tokenizer)
