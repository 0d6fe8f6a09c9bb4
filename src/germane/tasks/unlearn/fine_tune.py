"""Fine-tuning on what is to stay, and nothing else."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from germane.method import method
from germane.tasks.unlearn._unlearner import FineTuned, Pair, Work, mean_loss


@method("unlearn/fine-tune", code="OPTML-Group/Unlearn-Saliency", needs=("retain",))
class FineTune(FineTuned):
    """Train on the records to keep, and count on forgetting by neglect.

    The baseline FT of SalUn and Unlearn-Sparse.

    Use it as the mildest baseline. Not where something must really go: what is not contradicted
    mostly stays.
    """

    uses_forget: ClassVar[bool] = False
    uses_retain: ClassVar[bool] = True

    learning_rate: float = Field(default=1e-4, gt=0, description="of the optimiser")

    def loss(self, work: Work, pair: Pair) -> Tensor:
        return mean_loss(work.kept(), pair.retain)
