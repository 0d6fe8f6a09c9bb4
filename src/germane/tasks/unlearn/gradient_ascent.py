"""Gradient ascent on the records to forget, plain or with a hold on the rest."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from germane.method import method
from germane.tasks.unlearn._regulariser import Regularised
from germane.tasks.unlearn._unlearner import Pair, Work, mean_loss


@method("unlearn/gradient-ascent", paper="2407.06460", code="swj0419/muse_bench")
class GradientAscent(Regularised):
    """Raise the loss on the records to forget; GDR or KLR holds on to the rest.

    The baseline GA of "MUSE" (Shi et al., 2024), and with `regulariser` its GA_GDR and GA_KLR; Jang et
    al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", 2023.

    Use it as the yardstick that others must beat. Not alone: the loss has no upper end, so the model
    falls apart a few steps after it has forgotten; the search stops it there.
    """

    learning_rate: float = Field(default=1e-5, gt=0, description="of the optimiser")

    def forgetting(self, work: Work, pair: Pair) -> Tensor:
        return -mean_loss(work.forget, pair.forget)
