"""Weights as a stream of blocks: a run of elements of one tensor, of the base and of every member.

A block's size is set by the number of members, so that what is in memory at a time is the same for
a pool of four and of four hundred. Blocks are independent, and are worked on by one thread a core.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from germane.core.checkpoint import Source, TensorInfo

Item = TypeVar("Item")
Value = TypeVar("Value")
Place = tuple[TensorInfo, int, int]  # elements from start to stop of a tensor

# Float32 elements a thread holds for all members of a block together: 4 MiB stay in the cache.
_BUDGET = 1 << 20
_CORES = os.cpu_count() or 1
_KEPT = 31 << 20  # just under the largest size that glibc learns to keep
# Random numbers are drawn by position; whole multiples keep every position's number the same.
_ALIGNMENT = 1024


@dataclass(frozen=True)
class Block:
    """A run of elements of one tensor, flat and in float32.

    Attributes:
        name: The tensor's name in the base.
        start: Index of the first element in the flattened tensor.
        shape: Shape of the whole tensor.
        base: (n,) the base's elements.
        deltas: (models, n) each member's elements minus the base's: its task vector.
        identities: What stays the same of each member whatever else is in the pool, in the order
            of the rows: for random numbers that belong to a member.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    base: Tensor
    deltas: Tensor
    identities: tuple[str, ...]


class Stream:
    """The blocks of a base and its members.

    Args:
        base: The model the others descend from.
        members: The models to merge.
        tensors: Which tensors flow, in which order.
        identities: The members' in the blocks; default: their labels.
    """

    def __init__(
        self,
        base: Source,
        members: Sequence[Source],
        tensors: Sequence[TensorInfo],
        identities: Sequence[str] | None = None,
    ) -> None:
        self.base = base
        self.members = list(members)
        self.tensors = list(tensors)
        self.identities = tuple(identities or (member.label for member in members))

    @property
    def elements(self) -> int:
        """Number of elements of one model in the stream."""
        return sum(info.count for info in self.tensors)

    def map(
        self, function: Callable[[Block], Value], places: Iterable[Place] | None = None
    ) -> Iterator[Value]:
        """`function` of every block, or of these places, in order, computed by one thread a core."""
        chosen = self._places() if places is None else places
        return each_on_a_core(lambda place: self._apply(function, *place), chosen)

    def map_here(
        self, function: Callable[[Block], Value], places: Iterable[Place] | None = None
    ) -> Iterator[Value]:
        """The same in the thread that asks: for work that has one thread a core already."""
        for place in self._places() if places is None else places:
            yield self._apply(function, *place)

    def fold(
        self, measure: Callable[[Block], Tensor], per_tensor: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Sums of `measure` over the blocks, in a fixed order.

        Args:
            measure: From a block to a tensor whose shape is the same for every block.
            per_tensor: One sum for each tensor, given as soon as it is complete; otherwise one sum
                of everything, under the name "".
        """
        name, total = "", None
        for block_name, part in self.map(lambda block: (block.name, measure(block))):
            key = block_name if per_tensor else ""
            if total is not None and key != name:
                yield name, total
                total = None
            name = key
            total = part if total is None else total.add_(part)
        if total is not None:
            yield name, total

    def _places(self) -> Iterator[Place]:
        rows = max(1, len(self.members))
        size = max(_ALIGNMENT, _BUDGET // rows // _ALIGNMENT * _ALIGNMENT)
        for info in self.tensors:
            for start in range(0, info.count, size):
                yield info, start, min(start + size, info.count)

    def _apply(self, function: Callable[[Block], Value], info: TensorInfo, start: int, stop: int) -> Value:
        base = self.base.read(info.name, start, stop).float()
        deltas = torch.empty(len(self.members), stop - start)
        for row, member in zip(deltas, self.members, strict=True):
            row.copy_(member.read(info.name, start, stop)).sub_(base)
        return function(Block(info.name, start, info.shape, base, deltas, self.identities))


def each_on_a_core(function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """`function` of every item, in order, computed by one thread a core, a few items ahead."""
    with _one_thread_per_operation():
        waiting: deque[Future[Value]] = deque()
        try:
            for item in items:
                waiting.append(workers().submit(function, item))
                if len(waiting) > 2 * _CORES:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@functools.cache
def workers() -> ThreadPoolExecutor:
    """One thread a core, the same for the whole process: each new thread's heap would stay behind.

    A large allocation freed once teaches glibc to keep blocks of up to that size in its heap, where
    they are used again, instead of giving the pages back and faulting them in anew for every block.
    """
    torch.empty(_KEPT, dtype=torch.uint8)
    return ThreadPoolExecutor(_CORES)


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Blocks already use every core; threads inside an operation would only get in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
