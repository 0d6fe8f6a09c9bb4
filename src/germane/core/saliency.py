"""Which weights may move, and a fence that keeps the others as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]  # by name of the parameter


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


def gradient_sizes(model: Any, losses: Iterable[Tensor]) -> Weights:
    """Of each parameter, the size of the gradient of the sum of the losses, in evaluation mode.

    Args:
        model: The losses' model; left as it is.
        losses: Scalars, each computed when it is asked for.
    """
    was_training = model.training
    model.eval()
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for loss in losses:
        found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
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
