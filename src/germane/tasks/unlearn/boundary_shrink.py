"""Boundary shrink: records to forget move to the class next to them."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from germane.core.errors import SettingError
from germane.core.objective import Batch, Task
from germane.method import method
from germane.tasks.unlearn._regulariser import Regularised
from germane.tasks.unlearn._unlearner import Pair, Work, mean_loss, require_classifier


@method("unlearn/boundary-shrink", code="OPTML-Group/Unlearn-Saliency", needs=("classifier",))
class BoundaryShrink(Regularised):
    """Train the records to forget as the nearest wrong class, so that their own class shrinks.

    Chen et al., "Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision
    Boundary", 2023, as SalUn compares with it. The nearest class is found in the untouched model, a step
    of `bound` away from the record along the sign of the gradient of its loss. The released code takes
    what is predicted there even where that is still the right class, and so trains it; here the likeliest
    of the wrong classes is taken. GDR and KLR are not the paper's.

    Use it when a class must go and no records to keep are there. Not for classifiers of texts, whose
    inputs cannot be moved a little; nor without a look at the neighbours, which gain the records.
    """

    bound: float = Field(
        default=0.1, gt=0, description="length of the step: of an image's brightness, or in a row's scales"
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="of the optimiser")
    epochs: int = Field(default=10, ge=0, description="times the records to forget are gone through")
    _labels: Any = PrivateAttr(default=None)

    def begin(self, work: Work) -> None:
        super().begin(work)
        require_classifier(self, work.forget)
        if "input_ids" in work.forget.rows[0]:
            raise SettingError(f"{self.name}: reads classifiers of images and rows, not of texts.")
        work.model.eval()
        found = [self.neighbours(work.forget, b) for b in work.forget.batches(self.batch_size)]
        self._labels = torch.cat(found)

    def neighbours(self, task: Task, batch: Batch) -> Tensor:
        """(records,) the likeliest wrong class of each record after one step away from it."""
        name = "pixel_values" if "pixel_values" in batch else "values"
        inputs = batch[name].detach().clone().requires_grad_(True)
        moved = {**batch, name: inputs}
        gradient = torch.autograd.grad(mean_loss(task, moved), inputs)[0]
        with torch.no_grad():
            moved[name] = self._away(task, inputs.detach(), gradient.sign())
            logits = task.logits(moved)
            return logits.scatter(1, batch["labels"][:, None], -torch.inf).argmax(dim=1)

    def _away(self, task: Task, inputs: Tensor, direction: Tensor) -> Tensor:
        """The inputs a step further; images stay images of 256 shades."""
        if task.processor is None:
            return inputs + self.bound * task.model.scales * direction
        mean, deviation = _normalisation(task.processor, inputs)
        shades = (inputs * deviation + mean + self.bound * direction).clamp(0, 1)
        return ((255 * shades).round() / 255 - mean) / deviation

    def forgetting(self, work: Work, pair: Pair) -> Tensor:
        assert pair.forget is not None
        labels = self._labels[list(pair.forget_rows)]
        return work.forget.losses_of(work.forget.logits(pair.forget), labels, "cross-entropy").mean()


def _normalisation(processor: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, by channel, that an image processor gave brightness from 0 to 1."""
    if not getattr(processor, "do_normalize", False):
        return images.new_zeros(1), images.new_ones(1)
    mean, deviation = (images.new_tensor(v) for v in (processor.image_mean, processor.image_std))
    return mean.view(-1, 1, 1), deviation.view(-1, 1, 1)
