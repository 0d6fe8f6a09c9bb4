"""Sense finetuning: of a Backpack, only the senses that matter to the examples are moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from germane.core.backpack import Sense, SenseChanges
from germane.core.checkpoint import Checkpoint
from germane.core.errors import CheckpointError
from germane.core.objective import IGNORED, Batch, next_tokens
from germane.core.training import Hooks
from germane.edited import Edit, Editing, Pair
from germane.method import method
from germane.tasks.edit._answers import encode_pair
from germane.tasks.edit._canonical import CanonicalTuning, General, Tuned, padded

BACKPACK = "BackpackForCausalLM"


@method(
    "edit/sense-tuning",
    paper="2402.06155",
    code="john-hewitt/model-editing-canonical-examples",
    needs=("language model", "general"),
)
class SenseTuning(CanonicalTuning):
    """Move the sense vectors of a Backpack that weigh most in the examples, and nothing else.

    Hewitt et al., "Model Editing with Canonical Examples", 2024. In a Backpack (k senses c(x)_l a word,
    summed with weights alpha_lij) the importance of sense l of word w for an example is

        r(w, l) = sum over predicted positions i and places j of w of alpha_lij,

    of "balance" that of both answers, of "good-v-bad" the first's less the second's; less `background`
    times its mean over general texts. Of senses with r > 0 the `senses` most important ones of each example
    are chosen, and each gets a difference vector, from zero, which is all that is trained: losses,
    divergence and ball are those of edit/canonical. The differences are part of the saved model
    (`sense_changes`).

    Use it when the model is a Backpack: a sense's part in the logits is the same wherever its word stands,
    so a lesson from one sentence holds in others.
    Not when an answer hangs on no single word of its prompt.

    Differs from the code: where fewer senses than asked for have r > 0 the rest is not filled with others,
    as it is there, even where "good-v-bad" weighs two answers of one token each, of which r is zero for all
    words: here the first answer's importance counts then. Base senses are not changed in place, which
    counts the change twice where they are used again. Gradients are accumulated (see edit/canonical).
    """

    learning_rate: float = Field(default=2e-3, gt=0, description="of the optimiser")
    senses: int = Field(default=8, gt=0, description="senses that are chosen for each example")
    background: float = Field(
        default=1000.0, ge=0, description="weight of a sense's importance in general texts, against it"
    )
    lora_rank: int = Field(default=0, ge=0, le=0, description="adapters are not used here")

    def check(self, edits: Sequence[Edit], source: Checkpoint | None) -> None:
        kind = source.config.get("architectures") if source else None
        if kind != [BACKPACK]:
            raise CheckpointError(f"{self.name}: edits Backpacks ({BACKPACK}); the model is {kind}.")

    def attach(self, editing: Editing, state: dict[str, Tensor]) -> None:
        if not editing.edits:  # the untouched model, perhaps from a folder of the edited one
            editing.model.forget_changes()

    def begin(self, editing: Editing, edits: Sequence[Edit], general: General) -> Tuned:
        chosen = self.choose(editing, edits, general)
        changes: SenseChanges = editing.model.change_senses(chosen)
        editing.model.requires_grad_(False)
        changes.vectors.requires_grad_(True)
        editing.step.facts["senses moved"] = len(chosen)
        wanted = torch.tensor([[place in chosen] for place in changes.listed()]).to(editing.model.device)
        first = changes.vectors.detach().clone()

        def only_chosen() -> None:
            assert changes.vectors.grad is not None
            changes.vectors.grad.mul_(wanted)

        def before(batch: Batch) -> Tensor:
            with _as_it_was(changes, first):
                logits: Tensor = editing.model(**batch).logits
            return logits

        return Tuned(editing.model, before, Hooks(after_backward=only_chosen))

    def choose(self, editing: Editing, edits: Sequence[Edit], general: General) -> set[Sense]:
        """The most important senses of each example together, as (token, sense)."""
        rows = (padded([row], editing.model.device) for row in general.tuned)
        background = torch.stack([importance(editing.model, row) for row in rows]).mean(dim=0)
        chosen: set[Sense] = set()
        for edit in edits:
            raw = example_importance(editing.model, editing.tokenizer, edit)
            scores = (raw - self.background * background).where(raw > 0, -torch.inf).flatten()
            best = scores.topk(min(self.senses, int((raw > 0).sum()))).indices.tolist()
            chosen |= {divmod(int(place), raw.shape[1]) for place in best}
        return chosen

    def end(self, editing: Editing, tuned: Tuned) -> None:
        editing.model.requires_grad_(True)


@torch.no_grad()
def importance(model: Any, batch: Batch) -> Tensor:
    """(vocabulary, senses) how much each word's sense weighs where the labels are predicted, summed.

    Args:
        model: A Backpack.
        batch: Texts, with labels -100 where nothing is predicted.
    """
    tokens = batch["input_ids"]
    weights = model.backpack.weights(tokens, batch["attention_mask"])
    predicting = (next_tokens(batch["labels"]) != IGNORED)[:, None, :, None]
    sums = (weights * predicting).sum(dim=2).transpose(1, 2)  # (texts, tokens, senses)
    found = sums.new_zeros(model.config.vocab_size, sums.shape[-1])
    return found.index_add_(0, tokens.flatten(), sums.flatten(0, 1))


def example_importance(model: Any, tokenizer: Any, edit: Edit) -> Tensor:
    """(vocabulary, senses) the importance of each sense for an example."""
    found = _pair_importance(model, tokenizer, (edit.prompt, edit.answer))
    if not edit.other:
        return found
    other = _pair_importance(model, tokenizer, (edit.prompt, edit.other))
    if edit.loss == "balance":
        return found + other
    # Answers of one token are predicted from the same place, so that their difference is zero everywhere.
    return found - other if bool((found - other > 0).any()) else found


def _pair_importance(model: Any, tokenizer: Any, pair: Pair) -> Tensor:
    row = encode_pair(tokenizer, pair)
    batch = {name: torch.tensor([values], device=model.device) for name, values in row.items()}
    return importance(model, batch)


@contextmanager
def _as_it_was(changes: SenseChanges, first: Tensor) -> Iterator[None]:
    """Inside, the differences are those of before the tuning."""
    now, changes.vectors.data = changes.vectors.data, first
    try:
        yield
    finally:
        changes.vectors.data = now
