"""Needle: noise on one value vector, and gradient ascent on nothing else."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from germane.core.errors import RecordsError, SettingError
from germane.core.layers import value_matrix, weight_of
from germane.core.objective import IGNORED, Task
from germane.core.saliency import Fence
from germane.core.training import Hooks, build_optimiser
from germane.core.value_vectors import TOP, ValueVector, column_of, find_vectors, noise_like, word_tokens
from germane.method import method
from germane.tasks.unlearn._unlearner import FineTuned, Pair, Work, mean_loss


@method("unlearn/needle", paper="2406.11614", code="yihuaihong/ConceptVectors", needs=("language model",))
class Needle(FineTuned):
    """Ablate the value vector of a concept: noise on it, then gradient ascent on it alone.

    Hong et al., "Intrinsic Evaluation of Unlearning Using Parametric Knowledge Traces", 2024, where it is
    an oracle: it is told where the concept is. The column v of a feed-forward output matrix becomes
    v + N(0, noise^2), and then goes up the loss of the records to forget. Every other weight ends exactly
    as it was. Where `column` is not given, it is the column whose first 200 tokens, or its negative's,
    hold most of the `words`, in the layers from the middle to the last; without `words`, most of the words
    that the records to forget have to predict.

    Use it as the yardstick of what ablating a known trace does, or where `evaluate/concept-vectors` has
    named a column that was confirmed to carry the concept. Not as a method that forgets on its own: one
    column is seldom all that a model knows, and a column found by its words need not be used at all.

    Differs from the official code: the gradient of the input embedding is not computed (it is zeroed
    there, and only satisfies the trainer); AdamW keeps 32-bit states that are not paged; the rate is 0.1,
    the lowest of its 0.1 to 0.5, and the search for a strength varies it.
    """

    learning_rate: float = Field(default=0.1, gt=0, description="of the optimiser")
    epochs: int = Field(default=1, ge=0, description="times the records are gone through")
    lora_rank: int = Field(default=0, ge=0, le=0, description="always 0: one column of the model moves")
    layer: int = Field(default=-1, description="decoder layer of the column; -1 is the last")
    column: int | None = Field(
        default=None, ge=0, description="number of the column; default: found by its words, in any layer"
    )
    words: str = Field(default="", description="words of the concept; default: those of the forget records")
    noise: float = Field(default=0.1, ge=0, description="standard deviation of what is added first")
    _fence: Any = PrivateAttr(default=None)
    _matrix: Any = PrivateAttr(default=None)

    def begin(self, work: Work) -> None:
        vector = self.find(work)
        name, self._matrix = value_matrix(work.model, vector.layer)
        work.step.facts["value vector"] = {"matrix": name, "column": vector.column, "share": vector.share}
        column = column_of(work.model, vector)
        with torch.no_grad():
            column.add_(noise_like(column, self.noise, work.seed))
        self._fence = Fence(work.model, {f"{name}.weight": _only(self._matrix, vector.column)})

    def find(self, work: Work) -> ValueVector:
        """The column to ablate.

        Raises:
            RecordsError: Neither a column nor words to find one by.
        """
        if self.column is not None:
            return ValueVector(self.layer, self.column)
        tokenizer = work.loaded.processor
        text = self.words or " ".join(_targets(work.forget))
        words = word_tokens(tokenizer, [text])
        if not words[0] and self.words:
            raise SettingError(f"{self.name}.words: none of {self.words!r} is a token of the model.")
        if not words[0]:
            raise RecordsError(f"{work.forget.data.path}: no word is a token of the model; give a column.")
        return find_vectors(work.model, words, TOP)[0]

    def hooks(self, work: Work) -> Hooks:
        return Hooks(self._fence.mask_gradients, self._fence.put_back, work.after_epoch)

    def make_optimiser(self, work: Work) -> torch.optim.Optimizer:
        work.model.requires_grad_(False)
        self._matrix.weight.requires_grad_(True)
        self._fence.optimiser = build_optimiser([self._matrix.weight], self)
        optimiser: torch.optim.Optimizer = self._fence.optimiser
        return optimiser

    def loss(self, work: Work, pair: Pair) -> Tensor:
        return -mean_loss(work.forget, pair.forget)


def _only(matrix: torch.nn.Module, column: int) -> Tensor:
    """A mask of a matrix's weight, as it is stored, with nothing but one column inside."""
    weight = weight_of(matrix)
    inside = torch.zeros_like(weight, dtype=torch.bool)
    inside[:, column] = True
    return inside if weight is matrix.weight else inside.T


def _targets(task: Task) -> list[str]:
    """Of each record, the text that is to be predicted."""
    return [
        task.tokenizer.decode(
            [label for label in row["labels"] if label != IGNORED], skip_special_tokens=True
        )
        for row in task.rows
    ]
