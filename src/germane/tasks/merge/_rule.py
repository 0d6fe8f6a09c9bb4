"""What a data-free merge method supplies: one rule for a block of weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from germane.core.errors import SettingError
from germane.method import Method
from germane.tasks.merge._stream import Block, Stream

_GROUP = 4  # members whose bits are counted at a time


class Rule(Method):
    """A data-free merge: a function of the base and the members' task vectors.

    A method implements `combine`; one that needs a statistic of whole tensors or models first,
    such as a threshold, gathers it in `survey` with `Stream.fold`.
    """

    def check_pool(self, size: int) -> None:
        """Raise `SettingError` where the rule cannot merge `size` models."""

    def survey(self, stream: Stream) -> Any:
        """What `combine` needs to know of the whole stream; runs once, before the first block."""
        return None

    @abstractmethod
    def combine(self, block: Block, survey: Any, seed: int) -> Tensor:
        """The merged elements, (n,) float32, of one block.

        Args:
            block: Base elements (n,) and task vectors (models, n).
            survey: What `survey` returned.
            seed: Seed of the run, for rules that draw random numbers.
        """


def magnitude_thresholds(
    stream: Stream, ranks_of: Callable[[int], list[int]], per_tensor: bool
) -> dict[str, Tensor]:
    """The exact magnitudes of given rank in each member's task vector.

    The k-th smallest of |delta| is found by counting bit patterns: non-negative float32 numbers
    sort as their bits do. One pass counts the upper 16 bits, a second the lower 16 of those in the
    bin where the k-th lies. No sort, and memory that depends neither on the size of the tensors
    nor on the number of members, which are taken a few at a time.

    Args:
        stream: Base and members.
        ranks_of: From a number of elements n to the ranks wanted, each counted from 0 at the
            smallest; clamped to [0, n - 1].
        per_tensor: A threshold for each tensor, or one for the whole model.

    Returns:
        Tensor name (or "" for the whole model) -> thresholds (models, ranks), float32.
    """
    groups = [
        _thresholds(
            Stream(stream.base, stream.members[start : start + _GROUP], stream.tensors),
            ranks_of,
            per_tensor,
        )
        for start in range(0, len(stream.members), _GROUP)
    ]
    return {name: torch.cat([group[name] for group in groups]) for name in groups[0]}


def _thresholds(
    stream: Stream, ranks_of: Callable[[int], list[int]], per_tensor: bool
) -> dict[str, Tensor]:
    sizes = {info.name: info.count for info in stream.tensors} | {"": stream.elements}
    # Small tensors kept between large ones that come and go would keep the heap from being reused:
    # what is remembered of each tensor is kept as plain numbers.
    bins: dict[str, list[list[int]]] = {}
    remaining: dict[str, list[list[int]]] = {}
    for name, counts in stream.fold(_count_upper_bits, per_tensor):
        ranks = torch.tensor(ranks_of(sizes[name])).clamp(0, sizes[name] - 1)
        found, rest = _find(counts, ranks.expand(len(counts), -1))
        bins[name], remaining[name] = found.tolist(), rest.tolist()

    def count_lower(block: Block) -> Tensor:
        return _count_lower_bits(block.deltas, bins[block.name if per_tensor else ""])

    bits: dict[str, list[list[int]]] = {}
    for name, counts in stream.fold(count_lower, per_tensor):
        ranks = torch.tensor(remaining[name])
        lower, _ = _find(counts.flatten(0, 1), ranks.reshape(-1, 1))
        bits[name] = (torch.tensor(bins[name]) << 16 | lower.reshape(ranks.shape)).tolist()
    return {
        name: torch.tensor(values, dtype=torch.int32).view(torch.float32) for name, values in bits.items()
    }


def _bits(values: Tensor) -> Tensor:
    return values.abs().view(torch.int32)


def _count_upper_bits(block: Block) -> Tensor:
    """(models, 32768) how many elements have each pattern of upper bits."""
    upper = _bits(block.deltas) >> 16
    return torch.stack([torch.bincount(row, minlength=1 << 15) for row in upper])


def _count_lower_bits(deltas: Tensor, bins: list[list[int]]) -> Tensor:
    """(models, thresholds, 65536) patterns of lower bits of the elements in the wanted bins."""
    counts = torch.zeros(len(bins), len(bins[0]), 1 << 16, dtype=torch.int64)
    for row, values in enumerate(_bits(deltas)):
        upper = values >> 16
        for column, wanted in enumerate(bins[row]):
            inside = values[upper == wanted] & 0xFFFF
            counts[row, column] = torch.bincount(inside, minlength=1 << 16)
    return counts


def _find(counts: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, the bin that holds the element of each rank, and its rank inside that bin.

    Args:
        counts: (rows, bins).
        ranks: (rows, k), counted from 0.
    """
    cumulative = counts.cumsum(dim=1)
    bins = torch.searchsorted(cumulative, ranks.contiguous(), right=True)
    before = cumulative.gather(1, bins) - counts.gather(1, bins)
    return bins, ranks - before


def part(share: float, count: int) -> int:
    """`share` of `count` elements, rounded down; 0.29 of 100 is 29, though as floats it is less."""
    return math.floor(round(share * count, 6))


def elect_and_average(deltas: Tensor) -> Tensor:
    """The TIES vote: per element, the mean of the task vectors that have the elected sign.

    The elected sign is that of the sum; where the sum is exactly zero nothing is elected and the
    result is zero. (The official code gives such elements the sign most others have; there the
    winner would be decided by unrelated weights.)

    Args:
        deltas: (models, n) trimmed task vectors; zeros do not vote.

    Returns:
        (n,)
    """
    elected = deltas.sum(dim=0).sign_()
    agreeing = (deltas * elected).clamp_(min=0)  # magnitudes of those with the elected sign
    total = agreeing.sum(dim=0)
    count = agreeing.sign_().sum(dim=0).clamp_(min=1)
    return total.div_(count).mul_(elected)


def trim(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """Zero what is smaller in magnitude than its row's threshold.

    Args:
        deltas: (models, n).
        thresholds: (models, 1), at least 0.
    """
    # hardshrink keeps what is strictly larger, and is many times faster than a mask.
    below = torch.nextafter(thresholds, -torch.ones(())).clamp_(min=0)
    rows = zip(deltas, below.squeeze(1).tolist(), strict=True)
    return torch.stack([functional.hardshrink(row, bound) for row, bound in rows])


def task_weights(weights: list[float], deltas: Tensor) -> Tensor:
    """(models,) the weights given, or ones."""
    return deltas.new_tensor(weights) if weights else deltas.new_ones(len(deltas))


def check_weights(owner: str, weights: list[float], models: int) -> None:
    """Raise `SettingError` unless there is no weight at all or one for each model."""
    if weights and len(weights) != models:
        raise SettingError(f"{owner}.weights: {len(weights)} given for a pool of {models}.")


def uniform_numbers(seed: int, label: str, name: str, start: int, count: int) -> Tensor:
    """Random numbers in [0, 1) that belong to positions of a member's tensor.

    The same position of the same member always gets the same number, whatever else is in the pool
    and however the tensor is cut into blocks.

    Args:
        seed: Seed of the run.
        label: The member.
        name: The tensor.
        start: First position; a multiple of 8, since the generator steps by four 64-bit words.
        count: How many.
    """
    key = int.from_bytes(blake2b(f"{seed}/{label}/{name}".encode(), digest_size=16).digest(), "little")
    bits = np.random.Philox(key=key)
    bits.advance(start // 8)
    return torch.from_numpy(np.random.Generator(bits).random(count, dtype=np.float32))
