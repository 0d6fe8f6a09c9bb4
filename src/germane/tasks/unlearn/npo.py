"""Negative preference optimisation: the forget records as answers that are not preferred."""

from __future__ import annotations

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor
from torch.nn import functional

from germane.core.objective import Batch, Task, token_losses
from germane.method import method
from germane.tasks.unlearn._regulariser import Regularised
from germane.tasks.unlearn._unlearner import Pair, Work


@method("unlearn/npo", paper="2404.05868", code="swj0419/muse_bench", needs=("language model",))
class NPO(Regularised):
    """Make the forget records less likely than the untouched model finds them, ever more gently.

    The loss is -(2 / beta) log sigmoid(-beta log(p(x) / p_untouched(x))), mean over records, of the
    probability of the whole sequence. Zhang et al., "Negative Preference Optimization: From Catastrophic
    Collapse to Effective Unlearning", 2024; with `regulariser` the NPO_GDR and NPO_KLR of "MUSE" (Shi et
    al., 2024), whose beta, rate and epochs these are. The untouched model's log-probabilities are taken
    once, before training, so that without KLR no second model is kept.

    The released code of MUSE compares the logits of every token of the vocabulary at every position, and
    not the probabilities of sequences; that is another loss, a defect, and is not offered.

    Use it where gradient ascent takes the model apart: a record that is forgotten no longer pushes.
    Not without a regulariser where much has to stay, nor with long texts in one piece: log-probabilities
    of sequences grow with length, and the push of a long text ends after very little has changed.
    """

    learning_rate: float = Field(default=1e-5, gt=0, description="of the optimiser")
    epochs: int = Field(default=10, ge=0, description="times the records are gone through")
    beta: float = Field(
        default=0.1, gt=0, description="how soon a forgotten record stops pushing; near 0: gradient ascent"
    )
    _before: list[float] = PrivateAttr(default_factory=list)

    @torch.no_grad()
    def begin(self, work: Work) -> None:
        super().begin(work)
        work.model.eval()  # dropout would make the reference random
        task = work.forget
        self._before = [
            value
            for batch in task.batches(self.batch_size)
            for value in sequence_log_probabilities(task, batch).tolist()
        ]

    def forgetting(self, work: Work, pair: Pair) -> Tensor:
        assert pair.forget is not None
        now = sequence_log_probabilities(work.forget, pair.forget)
        before = now.new_tensor([self._before[row] for row in pair.forget_rows])
        return preference_loss(now, before, self.beta)


def preference_loss(now: Tensor, before: Tensor, beta: float) -> Tensor:
    """NPO's loss, a scalar.

    Args:
        now: (records,) log-probabilities of sequences.
        before: (records,) the untouched model's.
        beta: Above 0.
    """
    return -(2 / beta) * functional.logsigmoid(-beta * (now - before)).mean()


def sequence_log_probabilities(task: Task, batch: Batch) -> Tensor:
    """(records,) log-probability in nats of all target tokens of a record together."""
    losses, _ = token_losses(task.logits(batch), batch["labels"])
    return -losses.sum(dim=1)
