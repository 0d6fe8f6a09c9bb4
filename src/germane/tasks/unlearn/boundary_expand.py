"""Boundary expanding: records to forget move to a class that is taken away afterwards."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from germane.core.errors import SettingError
from germane.core.objective import Batch, Task
from germane.core.training import build_optimiser
from germane.method import method
from germane.tasks.unlearn._regulariser import Regularised
from germane.tasks.unlearn._unlearner import Pair, Work, require_classifier


@method("unlearn/boundary-expand", code="OPTML-Group/Unlearn-Saliency", needs=("classifier",))
class BoundaryExpand(Regularised):
    """Train the records to forget as a class of their own, then drop that class.

    Chen et al., "Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision
    Boundary", 2023, as SalUn compares with it. The head gets one more row, which begins at random and is
    never part of the model: it is hung on while the loss is taken. The released code leaves it in the
    model; here it is dropped, as in the paper, so the result has the classes it had. GDR and KLR are not
    the paper's.

    Use it when no records to keep are there and the neighbours of a class should not gain its records.
    Not where forgetting must be certain: what the dropped class took over can fall back to where it was.
    """

    learning_rate: float = Field(default=1e-4, gt=0, description="of the optimiser")
    epochs: int = Field(default=10, ge=0, description="times the records to forget are gone through")
    lora_rank: int = Field(default=0, ge=0, le=0, description="always 0: the head itself is trained")
    _row: Any = PrivateAttr(default=None)
    _head: Any = PrivateAttr(default=None)

    def begin(self, work: Work) -> None:
        super().begin(work)
        classes = require_classifier(self, work.forget)
        self._head = head_of(work.model, classes)
        if self._head is None:
            raise SettingError(f"{self.name}: the model has no linear head with {classes} outputs.")
        weight = self._head.weight
        self._row = nn.Linear(self._head.in_features, 1, device=weight.device, dtype=weight.dtype)

    def make_optimiser(self, work: Work) -> torch.optim.Optimizer:
        return build_optimiser([*work.model.parameters(), *self._row.parameters()], self)

    def forgetting(self, work: Work, pair: Pair) -> Tensor:
        assert pair.forget is not None
        logits = self.expanded(work.forget, pair.forget)
        labels = torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
        return work.forget.losses_of(logits, labels, "cross-entropy").mean()

    def expanded(self, task: Task, batch: Batch) -> Tensor:
        """(records, classes + 1) logits with the further class last."""
        handle = self._head.register_forward_hook(self._append)
        try:
            return task.logits(batch)
        finally:
            handle.remove()

    def _append(self, head: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([output, self._row(inputs[0])], dim=-1)


def head_of(model: nn.Module, classes: int) -> nn.Linear | None:
    """The last linear layer with an output a class, or None."""
    linear = [part for part in model.modules() if isinstance(part, nn.Linear)]
    return next((part for part in reversed(linear) if part.out_features == classes), None)
