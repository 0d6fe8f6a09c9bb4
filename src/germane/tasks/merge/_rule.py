"""What a data-free merge method supplies: one rule for a block of weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from germane.core.errors import SettingError
from germane.method import Method
from germane.tasks.merge._stream import Block, Stream


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


def uniform_numbers(seed: int, identity: str, name: str, start: int, count: int) -> Tensor:
    """Random numbers in [0, 1) that belong to positions of a member's tensor.

    The same position of the same member always gets the same number, whatever else is in the pool
    and however the tensor is cut into blocks.

    Args:
        seed: Seed of the run.
        identity: Of the member, as in `Block`.
        name: The tensor.
        start: First position; a multiple of 8, since the generator steps by four 64-bit words.
        count: How many.
    """
    key = int.from_bytes(blake2b(f"{seed}/{identity}/{name}".encode(), digest_size=16).digest(), "little")
    bits = np.random.Philox(key=key)
    bits.advance(start // 8)
    return torch.from_numpy(np.random.Generator(bits).random(count, dtype=np.float32))
