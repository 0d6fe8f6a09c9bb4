"""Training again from the start, without the records to forget."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from germane.core.errors import CheckpointError
from germane.core.models import initialise, load_model
from germane.method import method
from germane.tasks.unlearn._unlearner import FineTuned, Pair, Work, mean_loss


@method("unlearn/retrain", code="OPTML-Group/Unlearn-Saliency", needs=("retain",))
class Retrain(FineTuned):
    """Train the initial model, or random weights, on the records to keep only.

    The baseline and reference Retrain, exact unlearning. It starts from the task's `initial` model
    where there is one, and otherwise from the random weights of the architecture. All records to keep
    are trained on, as they were before, and it is run once: there is no strength to search for.

    Use it as what other methods are held against, when the training can be paid for again. Not where
    the training records are no longer all there: what is not in the retain records is lost.
    """

    strength: ClassVar[str] = ""
    uses_forget: ClassVar[bool] = False
    uses_retain: ClassVar[bool] = True

    learning_rate: float = Field(default=1e-3, gt=0, description="of the optimiser")
    epochs: int = Field(default=30, ge=0, description="times the records to keep are gone through")
    batch_size: int = Field(default=32, gt=0, description="records of a step that are in memory together")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="how the learning rate falls to zero, if it does"
    )

    def begin(self, work: Work) -> None:
        if not work.initial:
            initialise(work.loaded, work.seed)
            return
        try:
            work.model.load_state_dict(load_model(work.initial).model.state_dict())
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[-1].strip()
            raise CheckpointError(f"{work.initial}: is no earlier state of the model: {reason}") from None

    def loss(self, work: Work, pair: Pair) -> Tensor:
        return mean_loss(work.kept(), pair.retain)
