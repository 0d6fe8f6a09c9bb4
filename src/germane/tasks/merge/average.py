"""Plain average of checkpoints."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from germane.core.errors import SettingError
from germane.method import method
from germane.tasks.merge._rule import Rule, check_weights, task_weights
from germane.tasks.merge._stream import Block


@method("merge/average", paper="2203.05482", code="mlfoundations/model-soups")
class Average(Rule):
    """Mean of the members' weights.

    The "uniform soup" of Wortsman et al., "Model soups", 2022.

    Use it when the members are fine-tunes of one base on the same or kindred tasks.
    Not when some may be irrelevant: each pulls the result away by its full share.
    """

    weights: list[float] = Field(
        default=[], description="one weight a member, in pool order; scaled to sum to 1"
    )

    def check_pool(self, size: int) -> None:
        check_weights(self.name, self.weights, size)
        if self.weights and sum(self.weights) == 0:
            raise SettingError(f"{self.name}.weights: sum to 0, so there is no mean.")

    def combine(self, block: Block, survey: Any, seed: int) -> Tensor:
        weights = task_weights(self.weights, block.deltas)
        return block.base + (weights / weights.sum()) @ block.deltas
