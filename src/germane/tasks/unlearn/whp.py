"""Who's Harry Potter: the predictions of a model that never read the records, guessed and learned."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from germane.core.training import Training
from germane.method import method
from germane.tasks.unlearn._regulariser import divergence
from germane.tasks.unlearn._reinforced import reinforce
from germane.tasks.unlearn._unlearner import FineTuned, Pair, Work


@method("unlearn/whp", paper="2310.02238", code="swj0419/muse_bench", needs=("language model",))
class WHP(FineTuned):
    """Learn predictions from which what a model that overfits the records adds has been taken away.

    Eldan and Russinovich, "Who's Harry Potter? Approximate Unlearning in LLMs", 2023. A copy is
    fine-tuned on the forget records; where it finds a token likelier than the untouched model does, that
    token owes it to the records. The target is softmax(v - alpha relu(v_reinforced - v)) of the two
    models' logits, and the model is trained towards it on the forget records (the cross-entropy with
    the whole target, less the target's entropy, so that 0 is reached).

    Leaves its sources in two places. "MUSE" (Shi et al., 2024) combines the two models at each step of
    decoding, which is no checkpoint; here, as in the original, a model is trained, which is one. The
    original trains on the likeliest token of the combination and first replaces the book's names by
    generic ones with a list made for that book; here there is the whole distribution and no list.

    Use it where what to say instead should come from the model itself. Not where memory is short: the
    untouched and the reinforced model are kept beside the one that is trained. Nor where the model knows
    the records by heart: overfitting then hardly raises them, and the combination still knows them.
    """

    learning_rate: float = Field(default=1e-5, gt=0, description="of the training towards the combination")
    alpha: float = Field(default=5.0, ge=0, description="how much of what the records added is taken away")
    reinforcement_epochs: int = Field(
        default=10, ge=0, description="times the reinforced copy goes through the forget records"
    )
    reinforcement_rate: float = Field(default=1e-5, gt=0, description="learning rate of that copy")
    _untouched: Any = PrivateAttr(default=None)
    _reinforced: Any = PrivateAttr(default=None)

    def begin(self, work: Work) -> None:
        self._untouched = work.original().model
        self._reinforced = reinforce(work, self._reinforcement()).model

    def _reinforcement(self) -> Training:
        return Training(
            learning_rate=self.reinforcement_rate, epochs=self.reinforcement_epochs, schedule="cosine",
            batch_size=self.batch_size, lora_rank=self.lora_rank,
            gradient_checkpointing=self.gradient_checkpointing,
        )  # fmt: skip

    def loss(self, work: Work, pair: Pair) -> Tensor:
        assert pair.forget is not None
        inputs = {name: value for name, value in pair.forget.items() if name != "labels"}
        with torch.no_grad():
            untouched, reinforced = (m(**inputs).logits for m in (self._untouched, self._reinforced))
            target = combined(untouched.float(), reinforced.float(), self.alpha)
        return divergence(target, work.forget.logits(pair.forget), pair.forget)


def combined(untouched: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """Logits from which what reinforcement raised is taken away, alpha times.

    Args:
        untouched: (..., vocabulary) logits.
        reinforced: (..., vocabulary) logits of the model that overfits.
        alpha: 0 or more.
    """
    return untouched - alpha * (reinforced - untouched).relu()
