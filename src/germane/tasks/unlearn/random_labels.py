"""Random labels for the records to forget."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from germane.core.errors import RecordsError
from germane.method import method
from germane.tasks.unlearn._unlearner import FineTuned, Pair, Work, mean_loss, require_classifier


@method("unlearn/random-labels", code="OPTML-Group/Unlearn-Saliency", needs=("classifier",))
class RandomLabels(FineTuned):
    """Train on wrong labels for the records to forget, and on the right ones for the rest.

    The baseline RL of SalUn (Fan et al., 2024), after Golatkar et al., "Eternal Sunshine of the Spotless
    Net", 2020. A step has a batch of both kinds of records, and goes through as many retain records as
    there are records to forget; the released code goes through all forget records, then all retain
    records. It also draws labels from all classes, so that one in C is right: `any_label` does that.

    Use it to forget a class, or records, of a classifier when records to keep are at hand. Not where
    being suspiciously wrong on the forgotten records would itself tell that they were known.
    """

    uses_retain: ClassVar[bool] = True

    learning_rate: float = Field(default=3e-4, gt=0, description="of the optimiser")
    epochs: int = Field(default=10, ge=0, description="times the records to forget are gone through")
    weight: float = Field(default=1.0, ge=0, description="of the loss on the records to keep")
    any_label: bool = Field(
        default=False, description="draw from all classes, the right one too, as the released code does"
    )

    def begin(self, work: Work) -> None:
        require_classifier(self, work.forget)
        if not work.forget.labelled:
            data = work.forget.data
            raise RecordsError(f"{data.path}: has no field {data.label!r}, so no label is wrong.")

    def loss(self, work: Work, pair: Pair) -> Tensor:
        assert pair.forget is not None
        drawn = self.draw(pair.forget["labels"], int(work.model.config.num_labels))
        task = work.forget
        value = task.losses_of(task.logits(pair.forget), drawn, "cross-entropy").mean()
        if pair.retain is None or not self.weight:
            return value
        return value + self.weight * mean_loss(work.kept(), pair.retain)

    def draw(self, labels: Tensor, classes: int) -> Tensor:
        """(records,) a random label for each; drawn anew on every call, so fresh in each epoch."""
        if self.any_label:
            return torch.randint(classes, labels.shape).to(labels)
        others = torch.randint(classes - 1, labels.shape).to(labels)
        return others + (others >= labels)  # one step up from the right label, so every other is as likely
