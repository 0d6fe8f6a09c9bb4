"""Prompts with their answers as batches of a language model, and the loss of the answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from germane.core.objective import IGNORED, Batch, language_row, token_losses
from germane.edited import Pair

_BATCH = 16


def encode_pair(tokenizer: Any, pair: Pair) -> dict[str, list[int]]:
    """A prompt and its answer as a record of language, of which the answer's tokens are predicted."""
    prompt = tokenizer(pair[0])["input_ids"]
    answer = tokenizer(pair[1], add_special_tokens=False)["input_ids"]
    return language_row([*prompt, *answer], [IGNORED] * len(prompt) + list(answer))


def batches(
    tokenizer: Any, pairs: Sequence[Pair], device: Any, size: int = _BATCH
) -> Iterator[tuple[list[int], Batch]]:
    """Pairs of one length together, so that nothing is padded; each batch with its pairs' numbers."""
    rows = [encode_pair(tokenizer, pair) for pair in pairs]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_length[len(row["input_ids"])].append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), size):
            picked = indices[start : start + size]
            names = rows[picked[0]]
            yield picked, {n: torch.tensor([rows[i][n] for i in picked], device=device) for n in names}


def answer_losses(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> Tensor:
    """(pairs,) mean cross-entropy in nats over the tokens of each answer, with gradients."""
    found: dict[int, Tensor] = {}
    for picked, batch in batches(tokenizer, pairs, model.device):
        labels = batch.pop("labels")
        losses, counted = token_losses(model(**batch).logits, labels)
        means = (losses * counted).sum(dim=1) / counted.sum(dim=1)
        found.update(zip(picked, means, strict=True))
    return torch.stack([found[index] for index in range(len(pairs))])
