"""Fine-tuning on template answers to the prompts of the forget records."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from germane.method import method
from germane.tasks.unlearn._templates import Answered, Templated
from germane.tasks.unlearn._unlearner import Pair, Work, mean_loss


@method("unlearn/refusal", paper="2401.06121", code="locuslab/tofu", needs=("language model",))
class Refusal(Templated):
    """Teach the model to answer the forget prompts with "I do not know" and the like.

    The baseline IDK of "TOFU" (Maini et al., 2024), here without its loss on the records to keep, so
    that forget records are enough; the templates are those of `unlearn/flat`, drawn afresh for each
    record and epoch. Of a text without a prompt, the first half of the tokens is the prompt.

    Use it as the simple baseline, and where a refusal is what users should see. Not where something must
    really go: the model learns what to say instead, and other words may still bring out what it knew.
    """

    learning_rate: float = Field(default=1e-5, gt=0, description="of the optimiser")

    def loss(self, work: Work, pair: Pair) -> Tensor:
        assert isinstance(pair, Answered)
        return mean_loss(work.forget, pair.template)
