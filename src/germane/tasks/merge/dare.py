"""DARE: drop and rescale task vectors before they are merged."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from germane.method import method
from germane.tasks.merge._rule import Rule, elect_and_average, uniform_numbers
from germane.tasks.merge._stream import Block


@method("merge/dare", paper="2311.03099", code="yule-BUAA/MergeLM")
class Dare(Rule):
    """Drop elements of each task vector at random, rescale the rest, then add or let them vote.

    Yu et al., "Language Models are Super Mario", 2024.

    Use it for members whose task vectors are small and redundant, such as supervised fine-tunes of
    language models. Not with large task vectors: the rescaling by 1 / (1 - drop) then destroys.

    Which elements are dropped depends on the seed, the digest of the member's files, the tensor's
    name and the position, and on nothing else: adding a member leaves the others' masks as they were,
    and so does renaming a folder.
    """

    drop: float = Field(default=0.7, ge=0, lt=1, description="share of each task vector dropped")
    form: Literal["linear", "ties"] = Field(
        default="linear", description="add what is left, or elect signs as TIES does"
    )
    scale: float = Field(default=0.3, description="applied to the merged task vector")

    def combine(self, block: Block, survey: Any, seed: int) -> Tensor:
        kept = torch.stack(
            [
                uniform_numbers(seed, identity, block.name, block.start, len(block.base)) >= self.drop
                for identity in block.identities
            ]
        )
        deltas = block.deltas * kept / (1 - self.drop)
        merged = elect_and_average(deltas) if self.form == "ties" else deltas.sum(dim=0)
        return block.base + self.scale * merged
