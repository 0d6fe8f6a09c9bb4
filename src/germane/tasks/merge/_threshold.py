"""Exact magnitudes of a given rank, found in one pass over weights that are never held at once.

Elements are counted with numpy, whose comparisons and masks are several times faster than torch's here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from germane.core.checkpoint import TensorInfo
from germane.tasks.merge._stream import Block, Place, Stream, each_on_a_core

_GROUP = 4  # members whose magnitudes are looked at together
_RUN = 4096  # elements of a sample that stand together in a tensor
_SAMPLE = (1 << 15, 1 << 22)  # fewest and most elements sampled; between them, a 128th of all
_MARGIN = 8.0  # half width of the first bracket, in standard errors of the sample's quantile

Map = Callable[..., Iterator[Any]]


def magnitude_thresholds(
    stream: Stream, ranks_of: Callable[[int], list[int]], per_tensor: bool
) -> dict[str, Tensor]:
    """The exact magnitudes of given rank in each member's task vector.

    A sample says between which two magnitudes the k-th smallest of |delta| lies; one pass counts
    what is below and keeps what is between, about a hundredth of the elements, and the k-th of all
    is then found among those. Should it not lie there, the pass is repeated with a wider bracket.
    No sort, and memory that does not grow with the number of members, taken a few at a time.

    Args:
        stream: Base and members.
        ranks_of: From a number of elements n to the ranks wanted, each counted from 0 at the
            smallest; clamped to [0, n - 1].
        per_tensor: A threshold for each tensor, or one for the whole model.

    Returns:
        Tensor name (or "" for the whole model) -> thresholds (models, ranks), float32.
    """
    groups = [
        Stream(stream.base, stream.members[start : start + _GROUP], stream.tensors)
        for start in range(0, len(stream.members), _GROUP)
    ]
    if not per_tensor:
        return {
            "": torch.tensor([row for group in groups for row in _thresholds(group, group.map, ranks_of)])
        }

    def of_tensor(info: TensorInfo) -> list[list[float]]:
        parts = [Stream(group.base, group.members, [info]) for group in groups]
        return [row for part in parts for row in _thresholds(part, part.map_here, ranks_of)]

    # The largest first, so that no core is left waiting for one at the end.
    largest = sorted(stream.tensors, key=lambda info: -info.count)
    found = dict(zip((info.name for info in largest), each_on_a_core(of_tensor, largest), strict=True))
    return {info.name: torch.tensor(found[info.name]) for info in stream.tensors}


def _thresholds(stream: Stream, apply: Map, ranks_of: Callable[[int], list[int]]) -> list[list[float]]:
    """Thresholds (models, ranks) over all tensors of the stream, as plain numbers."""
    count = stream.elements
    ranks = [min(max(rank, 0), count - 1) for rank in ranks_of(count)]
    sample = np.concatenate(list(apply(_magnitudes, list(_sample(stream.tensors, count)))), axis=1)
    margin = _MARGIN
    while True:
        brackets = [_brackets(row, ranks, count, margin) for row in sample]
        _fill(apply, brackets)
        values = [[bracket.value() for bracket in row] for row in brackets]
        if None not in chain.from_iterable(values):
            return [[float(value) for value in row if value is not None] for row in values]
        margin *= 8


def _sample(tensors: Sequence[TensorInfo], count: int) -> Iterator[Place]:
    """Runs spread evenly over the tensors; all of a stream that is small."""
    least, most = _SAMPLE
    every = max(1, count // min(max(least, count >> 7), most))
    for info in tensors:
        for start in range(0, info.count, every * _RUN):
            yield info, start, min(start + _RUN, info.count)


def _magnitudes(block: Block) -> NDArray[np.float32]:
    """(models, elements)."""
    return block.deltas.abs_().numpy()


@dataclass
class _Bracket:
    """Two magnitudes that should have the k-th smallest between them, and what a pass finds there.

    Attributes:
        rank: k, counted from 0.
        low: Lower end; below every magnitude if it is -1.
        high: Upper end.
        below: Elements smaller than `low`.
        at_low: Elements equal to `low`.
        at_high: Elements equal to `high`.
        between: The float32 elements between the ends, as bytes: one growing buffer leaves no holes
            in the heap, as many small tensors would.
    """

    rank: int
    low: float
    high: float
    below: int = 0
    at_low: int = 0
    at_high: int = 0
    between: bytearray = field(default_factory=bytearray)

    def add(self, magnitudes: NDArray[np.float32]) -> None:
        """Count these elements."""
        above = magnitudes >= self.low
        self.below += magnitudes.size - np.count_nonzero(above)
        inside = magnitudes[above & (magnitudes <= self.high)]
        if self.low < self.high:
            between = inside[(inside > self.low) & (inside < self.high)]
            at_high = np.count_nonzero(inside == self.high)
            self.at_high += at_high
            self.between += between.tobytes()
            self.at_low += inside.size - between.size - at_high
        else:
            self.at_low += inside.size

    def value(self) -> float | None:
        """The element of the wanted rank, or None where it is outside."""
        rank = self.rank - self.below
        if rank < 0:
            return None
        if rank < self.at_low:
            return self.low
        rank -= self.at_low
        count = len(self.between) // 4
        if rank < count:
            return float(np.partition(np.frombuffer(self.between, np.float32), rank)[rank])
        return self.high if rank < count + self.at_high else None


def _brackets(sample: NDArray[np.float32], ranks: list[int], count: int, margin: float) -> list[_Bracket]:
    """Where a member's sample puts the elements of these ranks among `count`, give or take `margin`."""
    size = len(sample)
    if size == count:
        values = np.partition(sample, ranks)[ranks].tolist()
        return [_Bracket(r, v, v, below=r, at_low=1) for r, v in zip(ranks, values, strict=True)]
    ends = []
    for rank in ranks:
        share = (rank + 0.5) / count
        reach = margin * (math.sqrt(share * (1 - share) / size) * size + 1)
        ends.append((math.floor(share * size - reach), math.ceil(share * size + reach)))
    inside = sorted({end for pair in ends for end in pair if 0 <= end < size})
    known = dict(zip(inside, np.partition(sample, inside)[inside].tolist(), strict=True)) if inside else {}
    return [
        _Bracket(rank, known.get(first, -1.0), known.get(last, math.inf))
        for rank, (first, last) in zip(ranks, ends, strict=True)
    ]


def _fill(apply: Map, brackets: list[list[_Bracket]]) -> None:
    """One pass that counts every member's elements into its brackets, unless all is known."""
    if all(bracket.value() is not None for row in brackets for bracket in row):
        return

    def count(block: Block) -> list[list[_Bracket]]:
        found = []
        for magnitudes, row in zip(_magnitudes(block), brackets, strict=True):
            fresh = [_Bracket(bracket.rank, bracket.low, bracket.high) for bracket in row]
            for bracket in fresh:
                bracket.add(magnitudes)
            found.append(fresh)
        return found

    for found in apply(count):
        for row, fresh in zip(brackets, found, strict=True):
            for bracket, part in zip(row, fresh, strict=True):
                bracket.below += part.below
                bracket.at_low += part.at_low
                bracket.at_high += part.at_high
                bracket.between += part.between
