"""SalUn: random labels, and only the weights that matter for the records to forget may move."""

from __future__ import annotations

from typing import Any, cast

import torch
from pydantic import Field, PrivateAttr

from germane.core.objective import Task
from germane.core.saliency import Fence, Weights, gradient_sizes, top_share
from germane.core.training import Hooks, build_optimiser
from germane.method import method
from germane.tasks.unlearn._unlearner import Work, mean_loss
from germane.tasks.unlearn.random_labels import RandomLabels


@method("unlearn/salun", paper="2310.12508", code="OPTML-Group/Unlearn-Saliency", needs=("classifier",))
class SalUn(RandomLabels):
    """Train on random labels, moving only the weights most salient for the records to forget.

    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
    Classification and Generation", 2024. Salient are the `share` of all weights, biases and norms
    included, whose gradient of the loss on the records to forget is largest in the untouched model; the
    gradient is the sum over batches of their means, as released. Every other weight ends exactly as it
    was, whatever momentum and weight decay do; running statistics of batch norms do move.

    Use it to forget a class, or records, of a classifier with as little change elsewhere as possible.
    Not with a large share and the hope that the mask then matters: at one half, a random mask does as
    well on small networks.
    """

    share: float = Field(default=0.5, gt=0, le=1, description="of the weights that may move")
    lora_rank: int = Field(
        default=0, ge=0, le=0, description="always 0: the mask is on the model's weights"
    )
    _fence: Any = PrivateAttr(default=None)

    def begin(self, work: Work) -> None:
        super().begin(work)
        self._fence = Fence(work.model, self.mask(work))

    def mask(self, work: Work) -> Weights:
        """Of each parameter, which of its elements may move."""
        return top_share(saliency(work.forget, self.batch_size), self.share)

    def hooks(self, work: Work) -> Hooks:
        return Hooks(self._fence.mask_gradients, self._fence.put_back, work.after_epoch)

    def make_optimiser(self, work: Work) -> torch.optim.Optimizer:
        self._fence.optimiser = build_optimiser(work.model.parameters(), self)
        return cast(torch.optim.Optimizer, self._fence.optimiser)


def saliency(task: Task, batch_size: int) -> Weights:
    """Of each parameter, the size of the gradient of the loss on the records, summed over batches."""
    return gradient_sizes(task.model, (mean_loss(task, batch) for batch in task.batches(batch_size)))
