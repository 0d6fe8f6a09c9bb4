"""What the methods for canonical examples share: their losses, the regulariser and the degradation ball.

Hewitt et al., "Model Editing with Canonical Examples", 2024.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from germane.core.errors import SettingError
from germane.core.evidence import Finding, Step, Table
from germane.core.objective import IGNORED, Batch, token_losses
from germane.core.training import Hooks, Training, build_optimiser, fit
from germane.edited import Edit, Editing, Editor, Pair
from germane.tasks.edit._answers import answer_losses

_MAX_TOKENS = 256  # of a general text
_BATCH = 8
_BETAS = (0.9, 0.995)


def example_losses(model: Any, tokenizer: Any, edits: Sequence[Edit]) -> Tensor:
    """(edits,) what each example asks to be lowered, of the means over its answers' tokens."""
    pairs: list[Pair] = [(edit.prompt, edit.answer) for edit in edits]
    two = [number for number, edit in enumerate(edits) if edit.other]
    pairs += [(edits[number].prompt, edits[number].other) for number in two]
    found = answer_losses(model, tokenizer, pairs)
    others = dict(zip(two, found[len(edits) :], strict=True))
    return torch.stack([edit.weigh(found[number], others.get(number)) for number, edit in enumerate(edits)])


@dataclass(frozen=True)
class General:
    """Texts that have nothing to do with the examples, as tokens.

    Attributes:
        tuned: For the regulariser and the background.
        held: For the ball.
    """

    tuned: list[list[int]]
    held: list[list[int]]

    @classmethod
    def of(cls, editing: Editing, share: float) -> General:
        """The general texts of an editing, this share of them held out.

        Raises:
            SettingError: There are fewer than two of more than one token.
        """
        limit = min(_MAX_TOKENS, getattr(editing.model.config, "max_position_embeddings", _MAX_TOKENS))
        rows = [list(editing.tokenizer(text)["input_ids"])[:limit] for text in editing.general]
        rows = [row for row in rows if len(row) > 1]
        if len(rows) < 2:
            raise SettingError("general: at least two texts are needed: one to tune with, one held out.")
        random.Random(editing.seed).shuffle(rows)
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        return cls(rows[count:], rows[:count])


def padded(rows: Sequence[Sequence[int]], device: Any) -> Batch:
    """Texts of any length as one batch, every token of theirs a label."""
    width = max(map(len, rows))

    def filled(value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)

    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return {"input_ids": filled(0), "attention_mask": mask, "labels": filled(IGNORED)}


@torch.no_grad()
def general_loss(model: Any, rows: Sequence[Sequence[int]]) -> float:
    """Mean cross-entropy in nats over all tokens of general texts."""
    total, count = 0.0, 0
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), _BATCH):
        batch = padded(ordered[start : start + _BATCH], model.device)
        labels = batch.pop("labels")
        losses, counted = token_losses(model(**batch).logits, labels)
        total, count = total + float(losses.double().sum()), count + int(counted.sum())
    return total / count


def divergence(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """KL(before || after) in nats, summed over positions and divided by texts.

    Args:
        before: (texts, tokens, vocabulary) logits of the untouched model.
        after: The same of the edited one.
        mask: (texts, tokens) 1 for tokens, 0 for padding.
    """
    values = functional.kl_div(
        after.float().log_softmax(-1), before.float().log_softmax(-1), reduction="none", log_target=True
    ).sum(dim=-1)
    return (values * mask).sum() / len(mask)


@dataclass
class Tuned:
    """A model as it is tuned.

    Attributes:
        model: What is trained, perhaps with adapters.
        before: From a batch without labels to the untouched model's logits.
        hooks: What a method adds to a step.
    """

    model: Any
    before: Callable[[Batch], Tensor]
    hooks: Hooks


class CanonicalTuning(Training, Editor):
    """Fine-tuning on canonical examples, kept near the untouched model, and stopped at the ball."""

    epochs: int = Field(default=10, ge=0, description="times the examples are gone through")
    batch_size: int = Field(default=1, gt=0, description="examples that are in memory together")
    accumulate: int = Field(default=5, gt=0, description="batches whose gradients make one step")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="how the learning rate falls to zero, if it does"
    )
    divergence_weight: float = Field(default=0.3, ge=0, description="of the divergence on general texts")
    ball: float = Field(default=1e-3, gt=0, description="relative rise of the general loss that is allowed")
    held_out: float = Field(
        default=0.5, gt=0, lt=1, description="share of the general texts that the ball is measured on"
    )

    @abstractmethod
    def begin(self, editing: Editing, edits: Sequence[Edit], general: General) -> Tuned:
        """The model with what is to be trained requiring gradients, and nothing else."""

    @abstractmethod
    def end(self, editing: Editing, tuned: Tuned) -> None:
        """Make the trained model the edited one."""

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        general = General.of(editing, self.held_out)
        editing.model.eval()
        tuned = self.begin(editing, edits, general)
        ball = Ball(tuned.model, general.held, self.ball)
        generator = random.Random(editing.seed)
        steps = -(-len(edits) // self.batch_size)

        def batches(epoch: int) -> Iterator[list[Edit]]:
            order = generator.sample(list(edits), len(edits))
            for start in range(0, len(order), self.batch_size):
                yield order[start : start + self.batch_size]

        def loss(examples: list[Edit]) -> Tensor:
            value = example_losses(tuned.model, editing.tokenizer, examples).mean()
            return value + self._kept(tuned, generator.sample(general.tuned, 1))

        hooks = Hooks(tuned.hooks.after_backward, tuned.hooks.after_step, ball.after_epoch)
        history = fit(tuned.model, self, batches, steps, loss, hooks, self._adam(tuned.model), "tuning")
        ball.restore()
        ball.report(editing.step, history.epochs)
        self.end(editing, tuned)

    def _kept(self, tuned: Tuned, rows: Sequence[Sequence[int]]) -> Tensor:
        """The regulariser on a few general texts."""
        if not self.divergence_weight:
            return torch.zeros((), device=tuned.model.device)
        batch = padded(rows, tuned.model.device)
        batch.pop("labels")
        with torch.no_grad():
            before = tuned.before(batch)
        after = tuned.model(**batch).logits
        return self.divergence_weight * divergence(before, after, batch["attention_mask"])

    def _adam(self, model: nn.Module) -> torch.optim.Optimizer:
        optimiser = build_optimiser([p for p in model.parameters() if p.requires_grad], self)
        if self.optimiser == "adamw":
            for group in optimiser.param_groups:
                group["betas"] = _BETAS
        return optimiser


class Ball:
    """Which epochs stay inside the ball, and the weights of the last of them.

    The last one, not the most successful: choosing by success on the examples would flatter.
    """

    def __init__(self, model: Any, held: Sequence[Sequence[int]], size: float) -> None:
        self._model, self._held, self._size = model, held, size
        self._before = general_loss(model, held)
        self.rises: list[float] = []
        self.kept = 0
        self._weights = self._put_aside()

    def _put_aside(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._model.parameters() if p.requires_grad]

    def after_epoch(self, epoch: int) -> bool:
        """Measure, and put the weights aside if they are inside; training goes on anyway."""
        self.rises.append(general_loss(self._model, self._held) / self._before - 1)
        if self.rises[-1] <= self._size:
            self.kept, self._weights = epoch, self._put_aside()
        return False

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model the weights of the last epoch inside."""
        trained = (p for p in self._model.parameters() if p.requires_grad)
        for parameter, weight in zip(trained, self._weights, strict=True):
            parameter.copy_(weight)

    def report(self, step: Step, losses: Sequence[float]) -> None:
        """Say which epoch was kept."""
        rows: list[list[str | float | int | None]] = [
            [number, loss, rise, "kept" if number == self.kept else ""]
            for number, (loss, rise) in enumerate(zip(losses, self.rises, strict=True), 1)
        ]
        step.tables.append(
            Table(title="Epochs", columns=["epoch", "loss", "rise of the general loss", ""], rows=rows)
        )
        step.facts["kept epoch"] = self.kept
        if not self.kept:
            step.findings.append(outside(self._size))


def outside(size: float) -> Finding:
    """A finding on an editing of which nothing stayed inside the ball."""
    text = (
        f"every try raised the loss on general texts by more than {size:g} of it: nothing was changed. "
        "Smaller steps, a stronger regulariser or a larger ball would leave something."
    )
    return Finding(code="outside-ball", severity="serious", about="result", message=text)
