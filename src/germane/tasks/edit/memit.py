"""MEMIT: many facts at once, written into the value matrices of a few layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from germane.core.layers import layer_at, value_matrix
from germane.core.progress import bar, track
from germane.edited import Edit, Editing
from germane.method import method
from germane.tasks.edit._locate import (
    LocatedEditor,
    add_to_weight,
    in_context,
    sample_contexts,
    second_moments,
    states_at,
)

_PAPER_WEIGHT, _PAPER_WIDTH = 15000, 16384  # for GPT-J: weight of its statistics, and entries of its keys


@method("edit/memit", paper="2210.07229", code="kmeng01/memit", needs=("language model", "general"))
class Memit(LocatedEditor):
    """Write all facts at once into the value matrices of a few layers, by least squares.

    Source: Meng, Sen Sharma, Andonian, Belinkov, Bau, "Mass-Editing Memory in a Transformer", ICLR 2023.

    For each edit Adam looks for the state z = h + d at the subject's last token after layer `layer` behind
    which the model says the answer (see `LocatedEditor.move`). The `layers` layers that end there then
    share the way from h to z, from the lowest up. At each, K holds the edits' keys, the inputs of the value
    matrix W at that token, mean over contexts; R is what is still missing of each z, divided by the
    number of layers left; with C = E[k k^T] over the tokens of the texts `general`

        W <- W + R K^T (w C + K K^T)^-1

    which weighs the edits against the texts, w standing for how many tokens the latter count.

    Use it when many facts must change together.
    Not when a prompt does not name its subject; for one fact edit/rome reaches its value exactly.

    Differs from the paper: contexts, `ridge` and the prompt's part in a key are as in edit/rome.
    `update_weight` left out is the paper's 15,000 for GPT-J, scaled to the width of this model's keys:
    the mean of k^T C^-1 k over the texts is that width, so an edit is then weighed against the texts as
    in the paper, where the same number in a narrow model would leave nearly nothing of an edit. With
    `layer` left out the highest layer is a third of the way up, as the authors have it for GPT-2 XL;
    with fewer layers below it than `layers`, those that are there.
    Differs from the code: all contexts count alike in a key, as in the paper; in the code no context counts
    as much as all others together. The divergence is taken as in edit/rome.
    """

    contexts: int = Field(default=5, ge=0, description="texts put before the prompt, beside no text")
    largest_move: float = Field(
        default=0.75, gt=0, description="longest move of a state, as a multiple of the state's norm"
    )
    layers: int = Field(default=5, gt=0, description="layers that share the work, up to `layer`")
    update_weight: float | None = Field(
        default=None,
        gt=0,
        description="weight of the general texts; none: the paper's, scaled to the model",
    )

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        model = editing.model.eval().requires_grad_(False)
        top = self.layer_number(model)
        _, last = layer_at(model, top)
        matrices = [value_matrix(model, n)[1] for n in range(max(0, top - self.layers + 1), top + 1)]
        contexts = sample_contexts(editing, self.contexts)
        moments = second_moments(editing, matrices, self.ridge)
        goals = self._goals(editing, edits, contexts, last)
        for number, matrix in enumerate(track(matrices, "writing", len(matrices))):
            missing = (goals - _states(editing, edits, last)) / (len(matrices) - number)
            keys = mean_keys(editing, edits, contexts, matrix)
            weight = self.update_weight or _PAPER_WEIGHT * keys.shape[1] / _PAPER_WIDTH
            add_to_weight(matrix, least_squares_change(keys.T, missing.T, moments[number], weight))
        model.requires_grad_(True)

    def _goals(
        self, editing: Editing, edits: Sequence[Edit], contexts: Sequence[str], last: nn.Module
    ) -> Tensor:
        """(edits, width) the states behind which the model gives the answers."""
        moves = []
        with bar("editing", len(edits)) as advance:
            for edit in edits:
                moves.append(self.move(editing, edit, contexts, last))
                advance()
        return _states(editing, edits, last) + torch.stack(moves)


def _states(editing: Editing, edits: Sequence[Edit], last: nn.Module) -> Tensor:
    """(edits, width) the states after a layer at each edit's subject, behind the prompt alone."""
    return states_at(editing, last, [(edit.prompt, edit.subject) for edit in edits], "output")


def mean_keys(
    editing: Editing, edits: Sequence[Edit], contexts: Sequence[str], matrix: nn.Module
) -> Tensor:
    """(edits, inputs) the input of a value matrix at each edit's subject, mean over contexts."""
    asked = [(in_context(context, edit.prompt), edit.subject) for edit in edits for context in contexts]
    states = states_at(editing, matrix, asked, "input")
    return states.unflatten(0, (len(edits), len(contexts))).mean(dim=1)


def least_squares_change(keys: Tensor, missing: Tensor, moment: Tensor, weight: float) -> Tensor:
    """(outputs, inputs) float64 D that minimises |D K - R|^2 + w tr(D C D^T).

    Args:
        keys: K, (inputs, edits).
        missing: R, (outputs, edits).
        moment: C, (inputs, inputs).
        weight: w, of C.
    """
    keys, missing = keys.to(moment), missing.to(moment)
    return missing @ torch.linalg.solve(weight * moment + keys @ keys.T, keys).T
