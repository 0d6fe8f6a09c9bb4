"""Whether a record was trained on: signals, and how well they tell members from others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from germane.core.objective import Task, token_losses

_SHARE = 0.4  # of Min-K


@torch.no_grad()
def token_log_probabilities(task: Task, batch_size: int = 16) -> list[Tensor]:
    """Of each record of a language task, the log-probabilities of its target tokens."""
    task.model.eval()
    order = task.sorted_order()
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        batch = next(task.batches(len(picked), picked))
        losses, counted = token_losses(task.logits(batch), batch["labels"])
        for index, row, mask in zip(picked, losses, counted, strict=True):
            found[index] = -row[mask].double().cpu()
    return [found[index] for index in range(len(order))]


def min_k(log_probabilities: Tensor, share: float = _SHARE) -> float:
    """Mean of the lowest `share` of a text's token log-probabilities, of one token at least.

    Shi et al., "Detecting Pretraining Data from Large Language Models", 2024.
    """
    count = max(1, int(len(log_probabilities) * share))
    return float(log_probabilities.topk(count, largest=False).values.mean())


@torch.no_grad()
def signal(task: Task) -> list[float]:
    """Of each record, how familiar it is to the model: Min-40 % of texts, log-probability of classes."""
    if task.generative:
        return [min_k(values) for values in token_log_probabilities(task)]
    task.model.eval()
    found: list[float] = []
    for batch in task.batches(32):
        found += (-task.losses(batch, "cross-entropy")).tolist()
    return found


def area(members: Sequence[float], others: Sequence[float]) -> float:
    """AUC: the probability that one of the others is more familiar than a member; ties count half.

    0 where members are always the more familiar ones, 0.5 where they cannot be told apart.
    """
    first, second = np.asarray(members), np.sort(np.asarray(others))
    above = len(second) - np.searchsorted(second, first, side="right")
    equal = len(second) - np.searchsorted(second, first, side="left") - above
    return float((above + 0.5 * equal).mean() / len(second))


def area_interval(
    members: Sequence[float], others: Sequence[float], draws: int = 500, seed: int = 0
) -> tuple[float, float, float]:
    """AUC with its 95 % bootstrap interval, resampling both sides."""
    generator = np.random.default_rng(seed)
    first, second = np.asarray(members), np.asarray(others)

    def pick(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values[generator.integers(0, len(values), len(values))]

    areas = [area(pick(first).tolist(), pick(second).tolist()) for _ in range(draws)]
    low, high = np.quantile(areas, [0.025, 0.975])
    return area(members, others), float(low), float(high)
