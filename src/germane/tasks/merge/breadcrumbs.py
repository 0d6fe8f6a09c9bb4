"""Model breadcrumbs: mask both tails of each task vector."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from germane.method import method
from germane.tasks.merge._rule import Rule, part
from germane.tasks.merge._stream import Block, Stream
from germane.tasks.merge._threshold import magnitude_thresholds


@method("merge/breadcrumbs", paper="2312.06795", code="rezazzr/breadcrumbs")
class Breadcrumbs(Rule):
    """Drop the largest and the smallest elements of each task vector, tensor by tensor, and add.

    Davari and Belilovsky, "Model Breadcrumbs", 2024.

    Use it instead of task arithmetic for larger pools: without outliers and small noise the sum
    grows more slowly. Not as a choice among members: every one still adds its middle.
    """

    density: float = Field(default=0.9, gt=0, le=1, description="share of each tensor kept")
    outliers: float = Field(default=0.01, ge=0, lt=1, description="share dropped as too large")
    scale: float = Field(default=0.3, description="applied to the sum of the task vectors")

    def survey(self, stream: Stream) -> dict[str, Tensor]:
        def ranks_of(count: int) -> list[int]:
            largest = part(self.outliers, count)
            smallest = max(0, count - part(self.density, count) - largest)
            return [smallest, count - 1 - min(largest, count - 1)]

        return magnitude_thresholds(stream, ranks_of, per_tensor=True)

    def combine(self, block: Block, survey: dict[str, Tensor], seed: int) -> Tensor:
        low, high = survey[block.name].split(1, dim=1)
        size = block.deltas.abs()
        kept = torch.where((size >= low) & (size <= high), block.deltas, 0.0)
        return block.base + self.scale * kept.sum(dim=0)
