"""Prune first: fine-tuning on what is to stay, of a model made sparse before."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from germane.core.saliency import Fence, Weights, top_share
from germane.core.training import Hooks, build_optimiser
from germane.method import method
from germane.tasks.unlearn._unlearner import FineTuned, Pair, Work, mean_loss, require_classifier, watch_all

_PRUNED = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)  # layers whose weights are pruned


@method(
    "unlearn/prune-first", paper="2304.04934", code="OPTML-Group/Unlearn-Sparse",
    needs=("classifier", "retain"),
)  # fmt: skip
class PruneFirst(FineTuned):
    """Set the smallest weights to zero for good, then fine-tune on the records to keep.

    Jia et al., "Model Sparsity Can Simplify Machine Unlearning", 2023, with fine-tuning as the unlearner.
    The largest weights of all linear and convolutional layers together are kept, as in one-shot magnitude
    pruning. The paper prunes while the model is trained: it rewinds to early weights and trains again;
    here the finished model is pruned once, so nothing but the model is needed. The released code prunes
    convolutions only, which leaves nothing to prune in other networks.

    Use it where a sparse model is welcome anyway. Not alone where something must really go: like
    fine-tuning it counts on neglect, and forgets more only at high sparsity.
    """

    uses_forget: ClassVar[bool] = False
    uses_retain: ClassVar[bool] = True

    sparsity: float = Field(
        default=0.95, ge=0, lt=1, description="share of the layers' weights set to zero"
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="of the optimiser")
    epochs: int = Field(default=10, ge=0, description="times the records to keep are gone through")
    lora_rank: int = Field(default=0, ge=0, le=0, description="always 0: the model's weights are pruned")
    _fence: Any = PrivateAttr(default=None)

    def begin(self, work: Work) -> None:
        require_classifier(self, work.forget)
        kept = largest(work.model, 1 - self.sparsity)
        with torch.no_grad():
            for name, parameter in work.model.named_parameters():
                if name in kept:
                    parameter.mul_(kept[name])
        self._fence = Fence(work.model, kept)

    def hooks(self, work: Work) -> Hooks:
        # What pruning cost comes back with training.
        return Hooks(self._fence.mask_gradients, self._fence.put_back, watch_all(work))

    def make_optimiser(self, work: Work) -> torch.optim.Optimizer:
        self._fence.optimiser = build_optimiser(work.model.parameters(), self)
        return cast(torch.optim.Optimizer, self._fence.optimiser)

    def loss(self, work: Work, pair: Pair) -> Tensor:
        return mean_loss(work.kept(), pair.retain)


def largest(model: nn.Module, share: float) -> Weights:
    """Of the weights of linear and convolutional layers, where the largest `share` of all of them are."""
    layers = {id(part.weight) for part in model.modules() if isinstance(part, _PRUNED)}
    sizes = {name: p.detach().abs() for name, p in model.named_parameters() if id(p) in layers}
    return top_share(sizes, share)
