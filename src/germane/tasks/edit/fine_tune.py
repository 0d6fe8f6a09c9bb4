"""Fine-tuning on the edits, of one layer or of all weights, free or within a norm bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from germane.core.checkpoint import Checkpoint
from germane.core.layers import check_layer, value_matrix
from germane.core.progress import bar
from germane.core.training import require_finite
from germane.edited import Edit, Editing, Editor
from germane.method import method
from germane.tasks.edit._answers import answer_losses


@method("edit/fine-tune", needs=("language model",))
class FineTune(Editor):
    """Fine-tune on each edit in turn; the baseline that learns the fact and forgets around it.

    Baseline. AdamW lowers the cross-entropy of the answer, edit after edit, until it is below `enough`.
    With `norm_bound` no weight moves further than that from the untouched model's (FT-L of Zhu et al.,
    "Modifying Memories in Transformer Models", 2020, as Meng et al. compare with it, 2022): after every
    step each weight is put back into the bound.

    Use it to see what a method must beat, or for a single edit whose surroundings do not matter.
    Not for a stream of edits: each one overwrites what lies near the ones before.
    """

    layer: int | None = Field(
        default=None, description="layer whose feed-forward value matrix is trained; none: all weights"
    )
    learning_rate: float = Field(default=5e-5, gt=0, description="of AdamW")
    steps: int = Field(default=25, gt=0, description="most steps for an edit")
    enough: float = Field(default=0.01, ge=0, description="loss at which an edit is done")
    norm_bound: float = Field(
        default=0.0, ge=0, description="largest distance of a weight from the untouched one; 0: no bound"
    )

    def check(self, edits: Sequence[Edit], source: Checkpoint | None) -> None:
        if self.layer is not None and source is not None:
            check_layer(source, self.layer)

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        weights = self._trained(editing.model)
        bound = [weight.detach().clone() for weight in weights] if self.norm_bound else []
        editing.model.train(False)
        with bar("fine-tuning", len(edits)) as advance:
            for edit in edits:
                self._learn(editing, edit, weights, bound)
                advance()
        editing.model.requires_grad_(True)

    def _trained(self, model: nn.Module) -> list[nn.Parameter]:
        if self.layer is None:
            model.requires_grad_(True)
            return list(model.parameters())
        model.requires_grad_(False)
        _, matrix = value_matrix(model, self.layer)
        weights = list(matrix.parameters())
        for weight in weights:
            weight.requires_grad_(True)
        return weights

    def _learn(
        self, editing: Editing, edit: Edit, weights: list[nn.Parameter], bound: list[Tensor]
    ) -> None:
        optimiser = torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=0.0)
        for number in range(1, self.steps + 1):
            loss = answer_losses(editing.model, editing.tokenizer, [(edit.prompt, edit.answer)]).mean()
            require_finite(float(loss.detach()), "the loss", f"edit {edit.id}, step {number}")
            if float(loss.detach()) <= self.enough:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            _keep_within(weights, bound, self.norm_bound)
        optimiser.zero_grad()


@torch.no_grad()
def _keep_within(weights: Sequence[Tensor], centre: Sequence[Tensor], bound: float) -> None:
    """Put every entry back to at most `bound` from the centre's; without a centre, nothing."""
    for weight, middle in zip(weights, centre, strict=False):
        weight.copy_(weight.clamp(middle - bound, middle + bound))
