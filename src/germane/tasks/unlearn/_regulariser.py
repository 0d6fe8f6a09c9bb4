"""What keeps a language model or classifier as it was while it forgets: GDR and KLR."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor
from torch.nn import functional

from germane.core.errors import SettingError
from germane.core.objective import IGNORED, Batch, next_tokens
from germane.tasks.unlearn._unlearner import FineTuned, Pair, Work, mean_loss


class Regularised(FineTuned):
    """A loss on the records to forget, and one of MUSE's two regularisers on the records to keep.

    KLR keeps a second copy of the model, the untouched one; with LoRA the adapters are switched off
    instead.
    """

    uses_retain: ClassVar[bool] = True

    regulariser: Literal["none", "gdr", "klr"] = Field(
        default="none",
        description="gdr adds the loss on the retain records, klr the divergence from the untouched model",
    )
    weight: float = Field(default=1.0, ge=0, description="of the regulariser")
    _reference: Any = PrivateAttr(default=None)

    @abstractmethod
    def forgetting(self, work: Work, pair: Pair) -> Tensor:
        """The loss on the records to forget, a scalar."""

    def begin(self, work: Work) -> None:
        if self.regulariser != "none" and work.retain is None:
            raise SettingError(
                f"{self.name}: regulariser={self.regulariser} needs records to keep: --retain."
            )
        if self.regulariser == "klr" and not self.lora_rank:
            self._reference = work.original().model

    def loss(self, work: Work, pair: Pair) -> Iterator[Tensor]:
        yield self.forgetting(work, pair)
        if self.regulariser == "gdr":
            yield self.weight * mean_loss(work.kept(), pair.retain)
        if self.regulariser == "klr":
            yield self.weight * self._divergence(work, pair.retain)

    def _divergence(self, work: Work, batch: Batch | None) -> Tensor:
        """Mean KL divergence of the model's predictions from the untouched model's."""
        assert batch is not None
        retain = work.kept()
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            if self._reference is None:
                with work.adapted.disable_adapter():
                    before = retain.model(**inputs).logits
            else:
                before = self._reference(**inputs).logits
        return divergence(before, retain.logits(batch), batch if retain.generative else None)


def divergence(before: Tensor, after: Tensor, batch: Batch | None) -> Tensor:
    """Mean of KL(before || after) in nats, over positions that predict something.

    The released code of MUSE gives raw logits to `kl_div` as if they were log-probabilities; that is
    no divergence, and is not offered.

    Args:
        before: (..., classes) logits of the reference.
        after: (..., classes) logits of the model.
        batch: The batch of language, or None where every row is a prediction.
    """
    values = functional.kl_div(
        after.float().log_softmax(-1), before.float().log_softmax(-1), reduction="none", log_target=True
    ).sum(dim=-1)
    if batch is None:
        return values.mean()
    counted = next_tokens(batch["labels"]) != IGNORED
    return (values * counted).sum() / counted.sum().clamp(min=1)
