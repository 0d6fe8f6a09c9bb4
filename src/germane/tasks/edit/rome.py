"""ROME: a fact written into one layer's value matrix by a change of rank one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from germane.core.layers import value_matrix, weight_of
from germane.core.progress import bar
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


@method("edit/rome", paper="2202.05262", code="kmeng01/rome", needs=("language model", "general"))
class Rome(LocatedEditor):
    """Write each fact into the value matrix of one layer by a change of rank one.

    Source: Meng, Bau, Andonian, Belinkov, "Locating and Editing Factual Associations in GPT", NeurIPS 2022.

    The value matrix W of layer `layer` is taken for a memory. The key k of an edit is the mean input of W
    at the subject's last token, over the prompt alone and behind `contexts` short texts that the model
    writes. Adam looks for the value v = W k + d behind which the model says the answer (see
    `LocatedEditor.move`). With C = E[k k^T] over the tokens of the texts `general`, the change

        W <- W + (v - W k) (C^-1 k)^T / (k^T C^-1 k)

    is, of all that map k to v, the one that moves the outputs for those texts least.

    Use it when a single fact about a named subject must change, and the rest of the model may not.
    Not when there are many facts (each change is blind to those before it: see edit/memit), nor when a
    prompt does not name its subject.

    Differs from the paper: the key is taken behind context and prompt, as the official code does, not
    behind context and subject alone, since the words before a subject change its key. The paper's
    contexts begin with nothing; here each begins with the first word of a general text, since many
    models never saw an empty beginning. `ridge` is added to C, which the paper estimates from 100,000
    articles. With `layer` left out a third of the depth is used, as the authors do for GPT-2 medium, large
    and XL; their layer for GPT-J is lower.
    Differs from the code: W k is the mean key's output, as in the paper; the code maps the key of the
    prompt alone to v, but in the direction of the mean key, which divides by a small number where the two
    keys are unlike. The divergence is that of what follows "SUBJECT is a", as in the paper, not of
    what follows the subject in it. Of several mentions of a subject the last one counts.
    """

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        model = editing.model.eval().requires_grad_(False)
        _, matrix = value_matrix(model, self.layer_number(model))
        contexts = sample_contexts(editing, self.contexts)
        moment = second_moments(editing, [matrix], self.ridge)[0]
        with bar("editing", len(edits)) as advance:
            for edit in edits:
                asked = [(in_context(context, edit.prompt), edit.subject) for context in contexts]
                key = states_at(editing, matrix, asked, "input").mean(dim=0)
                value = weight_of(matrix).float() @ key + self.move(editing, edit, contexts, matrix)
                add_to_weight(matrix, rank_one_change(weight_of(matrix), key, value, moment))
                advance()
        model.requires_grad_(True)


def rank_one_change(weight: Tensor, key: Tensor, value: Tensor, moment: Tensor) -> Tensor:
    """(outputs, inputs) float64 the least change of a matrix that maps the key to the value.

    Args:
        weight: (outputs, inputs).
        key: (inputs,).
        value: (outputs,).
        moment: (inputs, inputs) E[k k^T] of keys whose outputs should move little.
    """
    weight, key, value = weight.to(moment), key.to(moment), value.to(moment)
    direction = torch.linalg.solve(moment, key)
    return torch.outer(value - weight @ key, direction / (direction @ key))
