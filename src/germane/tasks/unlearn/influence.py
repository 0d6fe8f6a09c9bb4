"""Influence unlearning: one step that undoes what the records to forget did to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from germane.core.objective import Batch, Task
from germane.core.training import Diverged
from germane.method import method
from germane.tasks.unlearn._unlearner import Unlearner, Work, mean_loss, require_classifier


@method(
    "unlearn/influence", paper="2304.04934", code="OPTML-Group/Unlearn-Sparse",
    needs=("classifier", "retain"),
)  # fmt: skip
class Influence(Unlearner):
    """Move the weights once, along the estimated influence of the records to forget.

    The baseline IU of Jia et al., "Model Sparsity Can Simplify Machine Unlearning", 2023, after Koh and
    Liang, "Understanding Black-box Predictions via Influence Functions", 2017. The inverse Hessian is
    replaced by the WoodFisher recursion as released, with a fixed `samples` where WoodFisher has the
    number of records; that makes it a rank-one surrogate.

    Use it when one cheap step must do: two passes over the records, no training. Not on a model whose
    loss on the records is almost nothing: no gradient is left to say what to undo.
    """

    strength: ClassVar[str] = "alpha"

    alpha: float = Field(default=100.0, gt=0, description="length of the step, in influences")
    samples: int = Field(
        default=1000, gt=0, description="N of WoodFisher: it divides, and little more records are read"
    )
    batch_size: int = Field(default=64, gt=0, description="records whose gradient is taken together")

    def unlearn(self, work: Work) -> None:
        require_classifier(self, work.forget)
        work.model.eval()
        begin = influence_gradient(
            gradient_sum(work.forget, self.batch_size), gradient_sum(work.kept(), self.batch_size),
            len(work.forget.rows), len(work.kept().rows),
        )  # fmt: skip
        step = woodfisher(begin, single_gradients(work.kept()), self.samples)
        if not torch.isfinite(step).all():
            raise Diverged(f"{self.name}: the estimated influence is not finite.")
        self._move(work, step)

    @torch.no_grad()
    def _move(self, work: Work, step: Tensor) -> None:
        parameters = list(work.model.parameters())
        parts = step.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.add_(part.view_as(parameter), alpha=self.alpha)


def influence_gradient(forget: Tensor, retain: Tensor, forgotten: int, kept: int) -> Tensor:
    """(P,) gradient at the full data's optimum of the weighting that leaves the forget records out.

    Args:
        forget: (P,) sum of the gradients of the records to forget.
        retain: (P,) sum of the gradients of the records to keep.
        forgotten: How many records are to be forgotten.
        kept: How many are to be kept.
    """
    total = forgotten + kept
    return forget / total - forgotten / (total * kept) * retain


def woodfisher(begin: Tensor, gradients: Iterable[Tensor], samples: int) -> Tensor:
    """(P,) `begin` times the inverse Fisher matrix, as Unlearn-Sparse estimates it.

    Args:
        begin: (P,).
        gradients: (P,) gradients of single records; the first only starts the recursion. The released
            code ends after `samples` + 2 of them, and so does this.
        samples: N of the recursion.
    """
    result, direction = begin.clone(), None
    for number, gradient in enumerate(gradients):
        if direction is None:
            direction = gradient.clone()
        else:
            overlap = direction @ gradient
            result -= (result @ gradient) / (samples + overlap) * direction
            direction -= overlap / (samples + overlap) * direction
        if number > samples:
            break
    return result


def gradient_sum(task: Task, batch_size: int) -> Tensor:
    """(P,) sum over the records of the gradient of their losses."""
    parameters = list(task.model.parameters())
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), device=task.model.device)
    for batch in task.batches(batch_size):
        total += _gradient(task, batch, lambda batch: task.losses(batch, "cross-entropy").sum())
    return total


def single_gradients(task: Task) -> Iterator[Tensor]:
    """(P,) gradient of the loss of one record after the other, in their order."""
    for batch in task.batches(1):
        yield _gradient(task, batch, lambda batch: mean_loss(task, batch))


def _gradient(task: Task, batch: Batch, loss: Callable[[Batch], Tensor]) -> Tensor:
    found = torch.autograd.grad(loss(batch), list(task.model.parameters()), materialize_grads=True)
    return torch.cat([part.flatten() for part in found])
