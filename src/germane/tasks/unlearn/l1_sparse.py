"""l1-sparse unlearning: fine-tuning on what is to stay, with a price on every weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from germane.core.training import Hooks
from germane.method import method
from germane.tasks.unlearn._unlearner import FineTuned, Pair, Work, mean_loss, watch_all


@method("unlearn/l1-sparse", paper="2304.04934", code="OPTML-Group/Unlearn-Sparse", needs=("retain",))
class L1Sparse(FineTuned):
    """Fine-tune on the records to keep with an l1 penalty that falls to zero.

    Jia et al., "Model Sparsity Can Simplify Machine Unlearning", 2023: weights that nothing to keep pays
    for shrink, and what they knew goes with them. The penalty is the sum over all weights, biases and
    norms included, so a larger model needs a smaller `gamma`; the loss that is shown includes it. The
    last epochs have none: the released default is 0 such epochs, but then the probabilities of what is to
    stay end so low that the budget allows much less forgetting.

    Use it where what is to be forgotten can only be described by what is to stay, and retain records are
    plenty. Not with few of them: all that they do not show is forgotten too.
    """

    strength: ClassVar[str] = "gamma"
    uses_forget: ClassVar[bool] = False
    uses_retain: ClassVar[bool] = True

    gamma: float = Field(default=1e-3, gt=0, description="price of a weight's size in the first epoch")
    plain_epochs: int = Field(default=2, ge=0, description="epochs without the penalty, at the end")
    learning_rate: float = Field(default=0.01, gt=0, description="of the optimiser")
    epochs: int = Field(default=10, ge=0, description="times the records to keep are gone through")
    optimiser: Literal["adamw", "sgd"] = Field(default="sgd", description="AdamW, or SGD with momentum")
    lora_rank: int = Field(default=0, ge=0, le=0, description="always 0: the model's weights are to shrink")
    _price: float = PrivateAttr(default=0.0)

    def price(self, epoch: int) -> float:
        """The factor of the penalty in an epoch, from 0; constant if all epochs are plain, as released."""
        falling = self.epochs - self.plain_epochs
        if falling == 0:
            return self.gamma
        return self.gamma * (1 - epoch / falling) if epoch < falling else 0.0

    def hooks(self, work: Work) -> Hooks:
        # The penalty falls, so what is lost early comes back.
        return Hooks(after_epoch=watch_all(work))

    def pairs(self, work: Work, epoch: int) -> Iterator[Pair]:
        self._price = self.price(epoch)
        return super().pairs(work, epoch)

    def loss(self, work: Work, pair: Pair) -> Tensor:
        value = mean_loss(work.kept(), pair.retain)
        return value + self._price * l1_norm(work.model) if self._price else value


def l1_norm(model: Any) -> Tensor:
    """Sum of the sizes of all weights."""
    return torch.stack([parameter.abs().sum() for parameter in model.parameters()]).sum()
