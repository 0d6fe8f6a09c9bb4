"""Fine-tuning on canonical examples inside a degradation ball, of all weights or of adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from germane.core.objective import Batch
from germane.core.training import Hooks, finish, prepare
from germane.edited import Edit, Editing
from germane.method import method
from germane.tasks.edit._canonical import CanonicalTuning, General, Tuned


@method(
    "edit/canonical",
    paper="2402.06155",
    code="john-hewitt/model-editing-canonical-examples",
    needs=("language model", "general"),
)
class Canonical(CanonicalTuning):
    """Fine-tune on one simple sentence for each wish, and stop where the model would get worse elsewhere.

    Hewitt et al., "Model Editing with Canonical Examples", 2024; the baseline of its sense finetuning. The
    loss of an example is, of the mean NLL of its answer's tokens: itself ("good"), its negative ("bad"),
    its difference from that of the other answer ("good-v-bad"), or that difference's size ("balance"). To
    it is added weight x KL(untouched || edited), summed over the positions of a random general text. After
    each epoch the loss on general texts held out is measured; the last epoch whose rise is at most `ball`,
    relatively, is kept. With `lora_rank` adapters are trained, and merged at the end.

    Use it when wishes are given as sentences, and what matters is that nothing else changes.
    Not for facts that must hold at any price: the ball may leave nothing of the training. With "balance",
    both answers can become unlikely.

    Differs from the code: the gradients of all `accumulate` batches count, where the code zeroes them at
    every batch, so that only every fifth example moves anything; AdamW without decay in place of 8-bit
    Adam; adapters are on all linear maps, not on a random choice of feed-forward maps; the epoch is chosen
    in the run itself, on the general texts held out, and not in a run on validation examples; padding does
    not count in the divergence. Without adapters a second copy of the model is kept for the divergence. The
    ball is measured from the model as it was given, so that several runs one after another can go further.
    """

    learning_rate: float = Field(default=1e-5, gt=0, description="of the optimiser")

    def begin(self, editing: Editing, edits: Sequence[Edit], general: General) -> Tuned:
        if self.lora_rank:
            adapted = prepare(editing.model, self)

            def before(batch: Batch) -> Tensor:
                with adapted.disable_adapter():
                    logits: Tensor = adapted(**batch).logits
                return logits

            return Tuned(adapted, before, Hooks())
        reference = copy.deepcopy(editing.model).requires_grad_(False) if self.divergence_weight else None
        model = prepare(editing.model, self)
        return Tuned(model, lambda batch: reference(**batch).logits, Hooks())  # type: ignore[misc]

    def end(self, editing: Editing, tuned: Tuned) -> None:
        assert editing.loaded is not None
        editing.loaded.model = finish(tuned.model)
