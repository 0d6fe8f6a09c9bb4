"""Subtraction of what fine-tuning on the forget records adds."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from germane.core.training import Training
from germane.method import method
from germane.tasks.unlearn._reinforced import reinforce
from germane.tasks.unlearn._unlearner import Unlearner, Work


@method("unlearn/task-vector", paper="2407.06460", code="swj0419/muse_bench", needs=("language model",))
class TaskVector(Unlearner, Training):
    """Fine-tune a copy on the forget records until it overfits, and go as far the other way.

    The weights become theta - alpha (theta_overfit - theta), computed in float32: in bfloat16 small
    differences are lost. The task vector of "MUSE" (Shi et al., 2024), after Ilharco et al., "Editing
    Models with Task Arithmetic", 2023, with the settings of MUSE's scripts. The search varies `alpha`,
    and the copy is trained once for all trials. While it is trained, two models are in memory.

    Use it where one number should say how much is forgotten. Not where much depends on it: in MUSE
    it forgets hardly anything, and where the model knows the records by heart already, there is little
    to overfit and so hardly a direction.
    """

    strength: ClassVar[str] = "alpha"

    learning_rate: float = Field(default=1e-5, gt=0, description="of the overfitting")
    epochs: int = Field(default=10, ge=0, description="times the copy goes through the forget records")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="how the learning rate falls to zero, if it does"
    )
    alpha: float = Field(default=5.0, ge=0, description="how far to go the other way")

    @torch.no_grad()
    def unlearn(self, work: Work) -> None:
        with torch.enable_grad():
            overfit = dict(reinforce(work, self).model.named_parameters())
        for name, parameter in work.model.named_parameters():
            parameter.copy_(negated(parameter, overfit[name], self.alpha))


def negated(before: Tensor, overfit: Tensor, alpha: float) -> Tensor:
    """`before` minus alpha times the way to `overfit`, in float32."""
    start = before.float()
    return start - alpha * (overfit.float() - start)
