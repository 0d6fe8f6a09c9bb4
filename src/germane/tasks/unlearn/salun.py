"""SalUn: random labels, and only the weights that matter for the records to forget may move."""

from __future__ import annotations

from typing import Any, cast

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from germane.core.objective import Task
from germane.core.training import Hooks, build_optimiser
from germane.method import method
from germane.tasks.unlearn._unlearner import Work, mean_loss
from germane.tasks.unlearn.random_labels import RandomLabels

Weights = dict[str, Tensor]  # by name of the parameter


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


class Fence:
    """Keeps weights outside a mask as they are now, whatever the optimiser does.

    Masking gradients alone is not enough: weight decay and momentum move weights without a gradient.

    Args:
        model: Whose weights they are.
        inside: Of parameters by name, which elements may move; parameters without a mask may.
    """

    def __init__(self, model: Any, inside: Weights) -> None:
        self.optimiser: torch.optim.Optimizer | None = None
        self._held = [
            (parameter, inside[name], parameter.detach().clone())
            for name, parameter in model.named_parameters()
            if name in inside
        ]

    def mask_gradients(self) -> None:
        """Clear the gradients outside."""
        for parameter, inside, _ in self._held:
            if parameter.grad is not None:
                parameter.grad.mul_(inside)

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the weights outside, and clear the optimiser's memory of them."""
        for parameter, inside, before in self._held:
            parameter.copy_(torch.where(inside, parameter, before))
            state = self.optimiser.state.get(parameter, {}) if self.optimiser else {}
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.mul_(inside)


def saliency(task: Task, batch_size: int) -> Weights:
    """Of each parameter, the size of the gradient of the loss on the records, summed over batches."""
    model = task.model
    was_training = model.training
    model.eval()
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for batch in task.batches(batch_size):
        found = torch.autograd.grad(
            mean_loss(task, batch), list(model.parameters()), materialize_grads=True
        )
        for sum_so_far, gradient in zip(total.values(), found, strict=True):
            sum_so_far.add_(gradient)
    model.train(was_training)
    return {name: gradient.abs_() for name, gradient in total.items()}


def top_share(values: Weights, share: float) -> Weights:
    """Where the largest `share` of all elements are; rounded down, but at least one."""
    flat = torch.cat([value.flatten() for value in values.values()])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(max(1, int(len(flat) * share))).indices] = True
    parts = chosen.split([value.numel() for value in values.values()])
    return {name: part.view_as(values[name]) for name, part in zip(values, parts, strict=True)}
