"""TIES: trim, elect sign, merge."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from germane.method import method
from germane.tasks.merge._rule import Rule, elect_and_average, part, trim
from germane.tasks.merge._stream import Block, Stream
from germane.tasks.merge._threshold import magnitude_thresholds


@method("merge/ties", paper="2306.01708", code="prateeky2806/ties-merging")
class Ties(Rule):
    """Trim each task vector, elect one sign per element, average those that agree.

    Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023.

    Use it when task vectors contradict each other element by element.
    Not as a defence against irrelevant members: they vote like all others.

    The share kept is exact: `density` of the elements, rounded down, at least one; elements equal
    in magnitude to the last one kept are kept too. (The official code keeps one element more.)
    """

    density: float = Field(default=0.2, gt=0, le=1, description="share kept, by magnitude")
    scale: float = Field(default=1.0, description="applied to the merged task vector")
    trim: Literal["model", "tensor"] = Field(
        default="model",
        description="rank magnitudes over the whole model (the paper) or in each tensor (mergekit)",
    )

    def survey(self, stream: Stream) -> dict[str, Tensor]:
        def ranks_of(count: int) -> list[int]:
            return [count - part(self.density, count)]

        if self.density == 1:
            return {}
        return magnitude_thresholds(stream, ranks_of, per_tensor=self.trim == "tensor")

    def combine(self, block: Block, survey: dict[str, Any], seed: int) -> Tensor:
        deltas = block.deltas
        if survey:
            deltas = trim(deltas, survey[block.name if self.trim == "tensor" else ""])
        return block.base + self.scale * elect_and_average(deltas)
