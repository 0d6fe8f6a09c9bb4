"""FLAT: towards template answers and away from the forget answers, weighted by an f-divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from germane.core.objective import token_losses
from germane.method import method
from germane.tasks.unlearn._templates import Answered, Templated
from germane.tasks.unlearn._unlearner import Pair, Work

Divergence = Literal[
    "total-variation", "kl", "jensen-shannon", "pearson", "jeffrey", "reverse-kl", "squared-hellinger",
    "neyman",
]  # fmt: skip
Function = Callable[[Tensor], Tensor]

# Of each divergence: the best variational function g*, and f*(g*), both of a probability v.
DIVERGENCES: dict[Divergence, tuple[Function, Function]] = {
    "total-variation": (lambda v: v.tanh() / 2, lambda v: v.tanh() / 2),
    "kl": (lambda v: v, lambda v: (v - 1).exp()),
    "jensen-shannon": (
        lambda v: math.log(2) - functional.softplus(-v),
        lambda v: v + functional.softplus(-v) - math.log(2),
    ),
    "pearson": (lambda v: v, lambda v: v**2 / 4 + v),
    "jeffrey": (lambda v: v, lambda v: v + v**2 / 4 + v**3 / 16),
    "reverse-kl": (lambda v: -(-v).exp(), lambda v: v - 1),
    "squared-hellinger": (lambda v: 1 - (-v).exp(), lambda v: v.exp() - 1),
    "neyman": (lambda v: 1 - (-v).exp(), lambda v: 2 - 2 * (-v / 2).exp()),
}


@method("unlearn/flat", paper="2410.11143", code="UCSC-REAL/FLAT", needs=("language model",))
class Flat(Templated):
    """Raise the probability of template answers and lower that of the forget answers, and nothing else.

    The loss is -g*(P(template)) + f*(g*(P(forget))), a variational f-divergence, where P is the mean
    probability of the right token over the answer, and over the batch: g* and f* are applied to the two
    means. Wang et al., "LLM Unlearning via Loss Adjustment with Only Forget Data", 2024. Settings are
    those of the official configuration; its rate for a model of seven billion weights that read one
    book is 2e-7. The template is drawn afresh for each record and epoch. Of a text without a
    prompt, the first half of the tokens is the prompt.

    Leaves the official code in three places. There reverse KL, squared Hellinger and Neyman have e^v
    for e^-v, which makes the templates less likely (and under the first two the forget answers more);
    here all eight have the right signs. There the mean is over all positions, prompts and padding
    among them, so that long prompts weaken the loss; here over the answer, its end token included. Its
    warm-up is an epoch at least; here it is `warmup`.

    Use it where there are no records to keep. Not where answers are very unlikely already: the loss is
    a probability, not its logarithm, so its gradient vanishes there. `unlearn/refusal` is simpler, and
    may well keep more.
    """

    learning_rate: float = Field(default=1e-5, gt=0, description="of the optimiser")
    batch_size: int = Field(default=16, gt=0, description="records whose probabilities are averaged")
    accumulate: int = Field(default=4, gt=0, description="batches whose gradients make one step")
    weight_decay: float = Field(default=0.01, ge=0, description="of the optimiser")
    warmup: int = Field(default=2, ge=0, description="steps in which the learning rate rises")
    divergence: Divergence = Field(
        default="total-variation", description="which f-divergence weighs template against forget answers"
    )

    def loss(self, work: Work, pair: Pair) -> Tensor:
        assert isinstance(pair, Answered)
        assert pair.forget is not None
        assert pair.template is not None
        task = work.forget
        template = answer_probability(task.logits(pair.template), pair.template["labels"])
        forget = answer_probability(task.logits(pair.forget), pair.forget["labels"])
        return adjusted_loss(template, forget, self.divergence)


def adjusted_loss(template: Tensor, forget: Tensor, divergence: Divergence) -> Tensor:
    """FLAT's loss of the two mean probabilities, which are scalars."""
    best, conjugate = DIVERGENCES[divergence]
    return conjugate(forget) - best(template)


def answer_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over records of the mean probability of the right token, over target tokens only.

    Args:
        logits: (records, tokens, vocabulary); the softmax is taken in float32.
        labels: (records, tokens), -100 where a token is not to be predicted.
    """
    losses, counted = token_losses(logits, labels)
    means = ((-losses).exp() * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    return means.mean()
