"""Functional tokens: how a call is written and read, and how a model learns to write it.

A call is `<route_3>('how the query is put')<route_end>`, or `<route_3>()<route_end>` where the
query goes on as it stands. The functional token alone names the node.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from germane.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END = "<route_end>"
IGNORED = -100
_HEAD = re.compile(r"\s*<route_(\d+)>\s*\(\s*")
_CLOSE = re.compile(r"\s*\)\s*" + re.escape(END))
_MARK = re.compile(r"<(?=route_(?:\d+|end)>)")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


@dataclass(frozen=True)
class Call:
    """A call as a router wrote it: the number of its token, and its argument (None: as it stands)."""

    number: int
    argument: str | None


def functional_token(number: int) -> str:
    """The token of a node."""
    return f"<route_{number}>"


def write_call(number: int, argument: str | None) -> str:
    """A call with its argument quoted; `parse_call` reads it back."""
    if argument is None:
        return f"{functional_token(number)}(){END}"
    escaped = argument.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"{functional_token(number)}('{disarm(escaped)}'){END}"


def disarm(text: str) -> str:
    """The text with what looks like a functional token broken up, so that it is read as text."""
    return _MARK.sub("< ", text)


def parse_call(output: str) -> Call | str:
    """The first call in what a router wrote, or what is wrong with it.

    The argument is quoted singly or doubly, with backslash escapes. A quote that is not escaped
    ends the argument only where a bracket and the end token follow: models forget to escape.
    Source: the grammar of Chen and Li, "Octopus v4", 2024, whose own pattern breaks on an
    apostrophe.
    """
    head = _HEAD.match(output)
    if head is None:
        return "does not begin with a functional token and a bracket"
    number, rest = int(head[1]), output[head.end() :]
    if _CLOSE.match(")" + rest[1:]) and rest.startswith(")"):
        return Call(number, None)
    quote = rest[:1]
    if quote not in ("'", '"'):
        return "its argument is not in quotes"
    argument = _read_quoted(rest[1:], quote)
    return Call(number, argument) if argument is not None else f"it does not end with ') {END}'"


def _read_quoted(text: str, quote: str) -> str | None:
    """The text up to the closing quote, escapes undone, or None where there is no closing quote."""
    read = []
    place = 0
    while place < len(text):
        character = text[place]
        if character == "\\" and place + 1 < len(text):
            read.append(_ESCAPES.get(text[place + 1], text[place + 1]))
            place += 2
            continue
        if character == quote and _CLOSE.match(text, place + 1):
            return "".join(read)
        if text.startswith(END, place):
            return None
        read.append(character)
        place += 1
    return None


def add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, noise: float, seed: int
) -> list[int]:
    """Add `count` functional tokens and the end token; their rows start at the mean of the others.

    Args:
        model: Its input and output embeddings get a row for each new token, unless they have spare
            ones. Tied embeddings stay tied.
        tokenizer: Gets the tokens.
        count: Functional tokens.
        noise: Standard deviation of what is added to the mean, in standard deviations of the rows.
        seed: Of the noise.

    Returns:
        The tokens' numbers, the end token's last.
    """
    known = len(tokenizer)
    tokenizer.add_tokens(token_names(count), special_tokens=True)
    grow(model, tokenizer)
    numbers = token_numbers(tokenizer, count)
    generator = torch.Generator().manual_seed(seed)
    for weight in embedding_weights(model):
        old = weight.data[:known].float()
        rows = torch.randn(len(numbers), old.shape[1], generator=generator).to(old.device)
        weight.data[numbers] = (old.mean(dim=0) + noise * old.std() * rows).to(weight.dtype)
    return numbers


def token_names(count: int) -> list[str]:
    """The functional tokens and the end token."""
    return [*(functional_token(number) for number in range(count)), END]


def token_numbers(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """The numbers of the functional tokens, the end token's last."""
    return [int(number) for number in tokenizer.convert_tokens_to_ids(token_names(count))]


def grow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model a row for every token; it never loses one."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def embedding_weights(model: PreTrainedModel) -> list[Any]:
    """The input rows and, where they are not the same, the output rows."""
    output = model.get_output_embeddings()
    if output is None or getattr(output, "bias", None) is not None:
        raise CheckpointError(
            f"{model.name_or_path}: functional tokens need an output layer of rows without bias; "
            "choose another base."
        )
    inputs = model.get_input_embeddings().weight
    return [inputs] if output.weight is inputs else [inputs, output.weight]


def row_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules whose rows are trained: of tied ones the input's, which leads."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    wanted = wanted[: len(embedding_weights(model))]
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)].split(".")[-1] for module in wanted]


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the target tokens, each counted by its weight.

    Args:
        logits: (records, tokens, vocabulary), each predicting the label at its own place.
        labels: (records, tokens); -100 is no target.
        weights: (records, tokens).
    """
    losses = functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
    )
    counted = weights * (labels != IGNORED)
    return (losses * counted).sum() / counted.sum().clamp(min=1e-12)


def fit_rows(
    states: Tensor, others: Tensor, labels: Tensor, rows: Tensor, steps: int, learning_rate: float
) -> tuple[Tensor, list[float]]:
    """Train only the output rows of the functional tokens, on hidden states that do not change.

    The cross-entropy is over the whole vocabulary; of all other tokens only the log of the sum of
    their exponentials is needed, which never changes, so a step costs next to nothing.

    Args:
        states: (queries, width) last hidden states after the prompt.
        others: (queries,) log-sum-exp of all other tokens' logits.
        labels: (queries,) the right row.
        rows: (nodes, width) where training starts.
        steps: Steps of AdamW over all queries.
        learning_rate: Falls to 0 in a line.

    Returns:
        The trained rows and the loss at each step.
    """
    trained = rows.detach().clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([trained], lr=learning_rate, weight_decay=0.0)
    losses = []
    for number in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * (1 - number / steps)
        logits = torch.cat([states @ trained.T, others[:, None]], dim=1)
        loss = functional.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return trained.detach(), losses


def schedule(number: int, total: int, warm: float = 0.1) -> float:
    """Factor of the learning rate: a rise over the first tenth, then a line down to 0."""
    rise = max(1, math.ceil(warm * total))
    return min((number + 1) / rise, (total - number) / max(1, total - rise))


def batches(lengths: Sequence[int], size: int, generator: torch.Generator) -> list[list[int]]:
    """Record numbers in random batches of records of like length, in random order."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    chunk = size * 8
    groups = []
    for start in range(0, len(order), chunk):
        part = sorted(order[start : start + chunk], key=lambda index: lengths[index])
        groups += [part[first : first + size] for first in range(0, len(part), size)]
    return [groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()]
