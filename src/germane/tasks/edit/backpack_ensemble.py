"""A bigger model whose next words are shifted as an edited Backpack's were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from germane.core.chat import load_tokenizer
from germane.core.checkpoint import Checkpoint, locate
from germane.core.errors import CheckpointError
from germane.core.evidence import Table
from germane.core.models import load_model
from germane.edited import Edit, Editing, Editor
from germane.method import method
from germane.tasks.edit._canonical import General, general_loss, outside
from germane.tasks.edit.sense_tuning import BACKPACK

_WEIGHTS = [step / 10 for step in range(10, 0, -1)]


@dataclass
class Shift:
    """What is added to a model's logits.

    Attributes:
        edited: The edited Backpack.
        original: The same before its edits.
        weight: How much of their difference is added.
        seen: The texts so far while the bigger model generates with a cache.
    """

    edited: Any
    original: Any
    weight: float = 0.0
    seen: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))

    def after(self, _model: Any, args: tuple[Any, ...], inputs: Mapping[str, Any], output: Any) -> Any:
        """A hook of the bigger model's forward: its output with the difference added."""
        if not self.weight:
            return output
        tokens = inputs["input_ids"] if "input_ids" in inputs else args[0]
        self.seen = torch.cat([self.seen, tokens], dim=1) if self._goes_on(inputs) else tokens
        added = self.weight * self.difference(self.seen, inputs.get("attention_mask"))
        logits = output.logits
        width = min(logits.shape[-1], added.shape[-1])
        added = added[:, -logits.shape[1] :, :width].to(logits)
        output.logits = logits + functional.pad(added, (0, logits.shape[-1] - width))
        return output

    def _goes_on(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the model was given only the words after those that its cache has."""
        cache = inputs.get("past_key_values")
        # The model has put the new words into its cache by now.
        length = cache.get_seq_length() - inputs["input_ids"].shape[1] if cache is not None else 0
        return bool(length) and self.seen.shape[1] == length

    @torch.no_grad()
    def difference(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """(texts, tokens, vocabulary) log p_edited - log p_original; of words too far back, zero."""
        limit = self.edited.config.max_position_embeddings
        part, mask = tokens[:, -limit:], None if mask is None else mask[:, -limit:]
        after, before = (
            model(part, attention_mask=mask).logits.log_softmax(dim=-1)
            for model in (self.edited, self.original)
        )
        return functional.pad(after - before, (0, 0, tokens.shape[1] - part.shape[1], 0))


@method(
    "edit/backpack-ensemble",
    paper="2402.06155",
    code="john-hewitt/model-editing-canonical-examples",
    needs=("language model", "general"),
)
class BackpackEnsemble(Editor):
    """Add what editing changed in a small Backpack to the logits of a bigger model.

    Hewitt et al., "Model Editing with Canonical Examples", 2024:

        logits = logits_big + w (log p_edited - log p_original)

    where the two are a Backpack after and before edit/sense-tuning or edit/canonical on the same edits,
    with the bigger model's tokenizer. w goes down from 1 in steps of 0.1 until the bigger model's loss on
    the general texts rises by at most `ball`, relatively. No weight of the bigger model changes.

    Use it when a Backpack with the same tokenizer is there, and the bigger model generalises badly from
    its own finetuning.
    Not when two more models at every step cost too much, or for edits that the Backpack has not learned:
    the edits given here are only listed and measured.

    Differs from the code: all general texts are used for w. While the bigger model generates with a cache
    the Backpacks read the whole text again at every step, at most as many words as they have positions.
    """

    edited: str = Field(description="the edited Backpack: a folder")
    original: str = Field(description="the same Backpack before its edits: a folder or hub id")
    ball: float = Field(default=1e-3, gt=0, description="relative rise of the general loss that is allowed")

    def check(self, edits: Sequence[Edit], source: Checkpoint | None) -> None:
        vocabulary = load_tokenizer(str(source.folder)).get_vocab() if source else {}
        for path in (self.edited, self.original):
            kind = Checkpoint(locate(path)).config.get("architectures")
            if kind != [BACKPACK]:
                raise CheckpointError(f"{self.name}: {path} must be a Backpack ({BACKPACK}); it is {kind}.")
            if load_tokenizer(path).get_vocab() != vocabulary:
                raise CheckpointError(f"{self.name}: {path} has another vocabulary than the model.")

    def attach(self, editing: Editing, state: dict[str, Tensor]) -> None:
        shift = Shift(load_model(self.edited).model, load_model(self.original).model)
        shift.weight = float(state["weight"]) if state else 0.0
        editing.model.register_forward_hook(shift.after, with_kwargs=True)
        editing.memory = shift

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        shift: Shift = editing.memory
        general = General.of(editing, 0.5)
        texts = [*general.tuned, *general.held]
        shift.weight = 0.0
        before = general_loss(editing.model, texts)
        rows: list[list[str | float | int | None]] = []
        for weight in _WEIGHTS:
            shift.weight = weight
            rows.append([weight, general_loss(editing.model, texts) / before - 1])
            if float(rows[-1][1] or 0.0) <= self.ball:
                break
        else:
            shift.weight = 0.0
            editing.step.findings.append(outside(self.ball))
        editing.step.facts["weight"] = shift.weight
        editing.step.tables.append(Table(title="Weights", columns=["weight", "rise"], rows=rows))

    def state(self, editing: Editing) -> dict[str, Tensor]:
        return {"weight": torch.tensor(editing.memory.weight, dtype=torch.float64)}
