"""Task arithmetic: add the task vectors to the base."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from germane.method import method
from germane.tasks.merge._rule import Rule, check_weights, task_weights
from germane.tasks.merge._stream import Block


@method("merge/task-arithmetic", paper="2212.04089", code="mlfoundations/task_vectors")
class TaskArithmetic(Rule):
    """Base plus the scaled sum of the members' task vectors.

    Ilharco et al., "Editing models with task arithmetic", 2023.

    Use it for a few members with different tasks, when there is no data to choose by.
    Not for large pools: the sum grows with every member, and past a handful leaves the region in
    which the base's features hold.
    """

    scale: float = Field(default=0.3, description="applied to the sum of the task vectors")
    weights: list[float] = Field(default=[], description="one weight a member, in pool order")

    def check_pool(self, size: int) -> None:
        check_weights(self.name, self.weights, size)

    def combine(self, block: Block, survey: Any, seed: int) -> Tensor:
        weights = task_weights(self.weights, block.deltas)
        return block.base + (self.scale * weights) @ block.deltas
