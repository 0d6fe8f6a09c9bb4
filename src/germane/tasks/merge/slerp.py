"""Spherical linear interpolation between two models."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from germane.core.errors import SettingError
from germane.method import method
from germane.tasks.merge._rule import Rule
from germane.tasks.merge._stream import Block, Stream

_PARALLEL = 0.9995  # beyond this cosine the arc is a straight line in float32


@method("merge/slerp", code="Digitous/LLM-SLERP-Merge")
class Slerp(Rule):
    """Walk the arc from the first model to the second, tensor by tensor.

    Shoemake, "Animating rotation with quaternion curves", 1985, on flattened weight tensors.

    Use it for exactly two models, to keep the norm of the weights where a straight mean would
    shrink it. Tensors that are nearly parallel (|cosine| > 0.9995), as fine-tunes of one base
    usually are, are interpolated on the straight line, which is then the same. The base gives
    names, shapes and tokenizer only.
    """

    t: float = Field(default=0.5, ge=0, le=1, description="0 is the first model, 1 the second")

    def check_pool(self, size: int) -> None:
        if size != 2:
            raise SettingError(f"{self.name}: merges exactly two models; the pool has {size}.")

    def survey(self, stream: Stream) -> dict[str, Tensor]:
        """Tensor name -> (2,) the factors of the first and the second model."""
        return {name: self._factors(dots) for name, dots in stream.fold(_products, True)}

    def _factors(self, products: Tensor) -> Tensor:
        first, second, dot = products
        cosine = dot / (first * second).sqrt()
        if not cosine.abs() <= _PARALLEL:  # a zero tensor has no angle: NaN lands here too
            return torch.tensor([1 - self.t, self.t], dtype=torch.float64)
        angle = cosine.arccos()
        return torch.stack([(1 - self.t) * angle, self.t * angle]).sin() / angle.sin()

    def combine(self, block: Block, survey: dict[str, Tensor], seed: int) -> Tensor:
        first, second = survey[block.name].tolist()
        rest = first + second - 1
        return block.base + rest * block.base + first * block.deltas[0] + second * block.deltas[1]


def _products(block: Block) -> Tensor:
    """(3,) float64 squared norms of both models and their inner product."""
    first, second = (block.base + block.deltas).double()
    return torch.stack([first @ first, second @ second, first @ second])
