"""Where a model looks a fact up, and what it should find there: shared by ROME and MEMIT.

Both take a feed-forward part for a memory: the input of its value matrix at the subject's last token is
the key, its output the value. Here are the keys, their statistics, and the search for a better value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from germane.core.chat import pad_left, padding
from germane.core.checkpoint import Checkpoint
from germane.core.errors import CheckpointError, RecordsError
from germane.core.layers import check_layer, decoder_layers, layer_at, weight_of
from germane.core.objective import IGNORED, Batch, language_row, token_losses
from germane.core.progress import track
from germane.core.records import Row
from germane.core.training import require_finite
from germane.edited import Edit, Editing, Editor

_BATCH = 16
_LONGEST = 512  # tokens of a general text that are read
_LENGTHS = (5, 10)  # new tokens of every other context
_LIKELIEST = 5  # tokens among which each next one of a context is drawn
_ESSENCE = "{} is a"  # begins a sentence on what the subject is, which an edit should not change


class LocatedEditor(Editor):
    """What ROME and MEMIT have in common: their settings, and how they find keys and values."""

    layer: int | None = Field(
        default=None, description="layer where the fact is written; none: a third of the way up"
    )
    steps: int = Field(default=25, gt=0, description="most steps in the search for a value")
    learning_rate: float = Field(default=0.5, gt=0, description="of Adam, in the search for a value")
    enough: float = Field(default=0.05, ge=0, description="loss at which the search for a value ends")
    largest_move: float = Field(
        default=4.0, gt=0, description="longest move of a value, as a multiple of the value's norm"
    )
    weight_decay: float = Field(default=0.5, ge=0, description="weight of the move's length in the loss")
    kl_weight: float = Field(
        default=0.0625, ge=0, description="weight of what else the model says of the subject in the loss"
    )
    contexts: int = Field(default=20, ge=0, description="texts put before the prompt, beside no text")
    ridge: float = Field(
        default=0.01, ge=0, le=1, description="added to the keys' statistics, as a share of their mean"
    )

    def check(self, edits: Sequence[Edit], source: Checkpoint | None) -> None:
        if self.layer is not None and source is not None:
            check_layer(source, self.layer)
        for edit in edits:
            require_subject(edit)

    def layer_number(self, model: nn.Module) -> int:
        """The layer of the setting, from 0.

        By default a third of the way up, where the authors' causal tracing finds the facts of GPT-2.
        """
        count = len(decoder_layers(model))
        if self.layer is None:
            return count // 3
        layer_at(model, self.layer)  # refuses one that is not there
        return self.layer % count

    def move(self, editing: Editing, edit: Edit, contexts: Sequence[str], module: nn.Module) -> Tensor:
        """(width,) what a module must add to its output at the subject for the model to say the answer.

        Adam lowers, over the move d: the mean loss of the answer behind the prompt in all contexts;
        `kl_weight` times the divergence of what follows "SUBJECT is a" from what followed it before;
        and `weight_decay` times |d| / |v|^2, where v is the output behind the prompt alone. After each
        step d is shortened to `largest_move` times |v|.

        Raises:
            Diverged: With the edit and the step at which the loss was not finite.
        """
        questions = _Questions(editing, edit, contexts, module)
        value = states_at(editing, module, [(edit.prompt, edit.subject)], "output")[0]
        length = float(value.norm())
        move = torch.zeros_like(value, requires_grad=True)
        optimiser = torch.optim.Adam([move], lr=self.learning_rate)
        for number in range(1, self.steps + 1):
            loss, divergence = questions.ask(move)
            loss = loss + self.kl_weight * divergence
            loss = loss + self.weight_decay * torch.linalg.vector_norm(move) / length**2
            require_finite(float(loss.detach()), "the loss", f"edit {edit.id}, step {number}")
            if float(loss.detach()) < self.enough:
                break
            (move.grad,) = torch.autograd.grad(loss, [move])
            optimiser.step()
            with torch.no_grad():
                move.mul_(min(1.0, self.largest_move * length / max(float(move.norm()), 1e-12)))
        return move.detach()


class _Questions:
    """The prompt in all contexts, and what the subject is: asked with a module's output moved."""

    def __init__(self, editing: Editing, edit: Edit, contexts: Sequence[str], module: nn.Module) -> None:
        tokenizer = editing.tokenizer
        answer = tokenizer(edit.answer, add_special_tokens=False)["input_ids"]
        texts = [*(in_context(context, edit.prompt) for context in contexts), _ESSENCE.format(edit.subject)]
        located = [locate_subject(tokenizer, text, edit.subject) for text in texts]
        rows = [
            language_row([*tokens, *answer], [IGNORED] * len(tokens) + answer) for tokens, _ in located[:-1]
        ]
        essence = located[-1][0]
        self.batch = _pad(editing, [*rows, language_row(essence, [IGNORED] * len(essence))])
        self.labels = self.batch.pop("labels")[:-1]
        self.places = torch.tensor([place for _, place in located], device=editing.model.device)
        self.model, self.module = editing.model, module
        self.end = len(essence) - 1
        self.before: Tensor | None = None  # what followed the essence when nothing was moved

    def ask(self, move: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of the answer, and the divergence of the essence from the first time asked."""
        with _moved(self.module, self.places, move):
            logits = self.model(**self.batch).logits
        losses, counted = token_losses(logits[:-1], self.labels)
        essence = logits[-1, self.end].float().log_softmax(dim=-1)
        self.before = essence.detach() if self.before is None else self.before
        divergence = functional.kl_div(self.before, essence, log_target=True, reduction="sum")
        return losses.sum() / counted.sum(), divergence


def require_subject(edit: Edit) -> None:
    """Refuse an edit that does not say what it is about, or says it in other words than its prompt.

    Raises:
        RecordsError: With the edit's id and what is missing.
    """
    if not edit.subject:
        raise RecordsError(
            f"edit {edit.id}: has no subject: the fact is written where the model has read whom or what "
            "it is about; give it in the field 'subject'."
        )
    if find_subject(edit.prompt, edit.subject) is None:
        raise RecordsError(
            f"edit {edit.id}: its subject {edit.subject!r} does not occur in its prompt {edit.prompt!r}: "
            "write it as the prompt has it."
        )


def find_subject(text: str, subject: str) -> int | None:
    """Where the subject's last mention in a text ends, as a whole word if there is such a mention."""
    whole = [found.end() for found in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text)]
    if whole:
        return whole[-1]
    begin = text.rfind(subject)
    return None if begin < 0 else begin + len(subject)


def locate_subject(tokenizer: Any, text: str, subject: str) -> tuple[list[int], int]:
    """The tokens of a text, and the number of the one that ends the subject's last mention.

    Raises:
        CheckpointError: The tokenizer cannot say where in the text its tokens are.
    """
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"a {type(tokenizer).__name__} cannot say where in a text its tokens are: save the model with "
            "a fast tokenizer (tokenizer.json)."
        )
    end = find_subject(text, subject)
    assert end is not None  # the edits were checked
    encoded = tokenizer(text, return_offsets_mapping=True)
    places = [place for place, (start, stop) in enumerate(encoded["offset_mapping"]) if start < end <= stop]
    return list(encoded["input_ids"]), places[-1]


def in_context(context: str, prompt: str) -> str:
    """A prompt with a text before it, if that is not empty."""
    return f"{context}. {prompt}" if context else prompt


@torch.no_grad()
def sample_contexts(editing: Editing, count: int) -> list[str]:
    """No text, and `count` short ones that the model writes, each from the first word of a general text.

    Raises:
        RecordsError: There are no general texts.
    """
    if not editing.general:
        raise RecordsError("there are no general texts, which contexts and the keys' statistics come from.")
    if not count:
        return [""]
    tokenizer, model = editing.tokenizer, editing.model
    words = [text.split()[0] for text in editing.general if text.split()]
    generator = torch.Generator().manual_seed(editing.seed)
    picked = [words[index] for index in torch.randint(len(words), (count,), generator=generator).tolist()]
    tokens, mask = pad_left(
        [tokenizer(word)["input_ids"] for word in picked], padding(tokenizer), model.device
    )
    with torch.random.fork_rng():
        torch.manual_seed(editing.seed)
        written = model.eval().generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=max(_LENGTHS), do_sample=True,
            top_k=_LIKELIEST, top_p=1.0, temperature=1.0, pad_token_id=padding(tokenizer),
        )  # fmt: skip
    width = tokens.shape[1]
    texts = [
        tokenizer.decode(row[: width + _LENGTHS[index % 2]], skip_special_tokens=True)
        for index, row in enumerate(written)
    ]
    return ["", *(" ".join(text.split()) for text in texts)]


@torch.no_grad()
def states_at(
    editing: Editing, module: nn.Module, asked: Sequence[tuple[str, str]], side: Literal["input", "output"]
) -> Tensor:
    """(texts, width) float32 what goes into a module, or comes out, at the subject's last token.

    Args:
        editing: The model.
        module: One of its parts.
        asked: Texts, each with its subject.
        side: What is wanted.
    """
    located = [locate_subject(editing.tokenizer, text, subject) for text, subject in asked]
    found = []
    for start in range(0, len(located), _BATCH):
        part = located[start : start + _BATCH]
        batch = _pad(editing, [language_row(tokens, tokens) for tokens, _ in part])
        states = _collect(editing.model, [module], batch, side)[0]
        found.append(states[range(len(part)), [place for _, place in part]].float())
    return torch.cat(found)


@torch.no_grad()
def second_moments(editing: Editing, matrices: Sequence[nn.Module], ridge: float) -> list[Tensor]:
    """Of each value matrix, (keys, keys) float64 the mean of k k^T over all tokens of the general texts.

    With fewer tokens than a key has entries the mean is singular, and with few more its smallest
    directions are mostly chance, though an edit divides by them. So `ridge` times the mean of its
    diagonal is added to the diagonal.

    Raises:
        RecordsError: There are too few texts for a mean that can be inverted.
    """
    width = weight_of(matrices[0]).shape[1]
    place = _precise_place(editing.model.device)
    sums = [torch.zeros(width, width, dtype=torch.float64, device=place) for _ in matrices]
    rows = [editing.tokenizer(text, truncation=True, max_length=_longest(editing.model))["input_ids"]
            for text in editing.general]  # fmt: skip
    rows = sorted(filter(None, rows), key=len)
    count = sum(map(len, rows))
    if not count or (count < width and not ridge):
        raise RecordsError(
            f"the general texts have {count} tokens; the statistics of keys of {width} entries need at "
            "least as many, or a ridge above 0."
        )
    for start in track(range(0, len(rows), _BATCH), "statistics of keys", -(-len(rows) // _BATCH)):
        batch = _pad(editing, [language_row(tokens, tokens) for tokens in rows[start : start + _BATCH]])
        real = batch["attention_mask"].bool()
        for total, states in zip(sums, _collect(editing.model, matrices, batch, "input"), strict=True):
            keys = states[real].float()
            total.add_((keys.T @ keys).to(total))
    for total in sums:
        total.div_(count)
        total.diagonal().add_(ridge * total.diagonal().mean())
    return sums


@torch.no_grad()
def add_to_weight(matrix: nn.Module, change: Tensor) -> None:
    """Add (outputs, inputs) to a linear map, rounded once to the weight's own dtype."""
    weight = weight_of(matrix)
    weight.copy_(weight.double().to(change) + change)


class _Collected(Exception):
    """All that was asked for has been seen, and the rest of the model need not run."""


def _collect(
    model: Any, modules: Sequence[nn.Module], batch: Batch, side: Literal["input", "output"]
) -> list[Tensor]:
    """(texts, tokens, width) of each module, what goes in or comes out."""
    found: dict[int, Tensor] = {}

    def keep(index: int, value: Any) -> None:
        found[index] = _first(value)
        if len(found) == len(modules):
            raise _Collected

    handles = [
        module.register_forward_hook(
            lambda _, inputs, output, index=index: keep(index, inputs if side == "input" else output)
        )
        for index, module in enumerate(modules)
    ]
    try:
        model(**{name: value for name, value in batch.items() if name != "labels"})
    except _Collected:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in range(len(modules))]


@contextmanager
def _moved(module: nn.Module, places: Tensor, move: Tensor) -> Iterator[None]:
    """Inside, a module adds the move to its output at one place of each row."""
    rows = torch.arange(len(places), device=places.device)

    def add(_: nn.Module, inputs: Any, output: Any) -> Any:
        states = _first(output)
        addends = move.to(states.dtype).expand(len(places), -1)
        states = states.index_put((rows, places), addends, accumulate=True)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _longest(model: Any) -> int:
    return min(_LONGEST, getattr(model.config, "max_position_embeddings", None) or _LONGEST)


def _precise_place(place: torch.device) -> torch.device:
    """Where float64 is computed for a model on this device: Apple's has none."""
    return torch.device("cpu") if place.type == "mps" else place


def _pad(editing: Editing, rows: Sequence[Row]) -> Batch:
    """Rows of language as one batch, their padding at the right."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": padding(editing.tokenizer), "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor(
            [row[name] + [value] * (width - len(row[name])) for row in rows], device=editing.model.device
        )
        for name, value in fill.items()
    }
