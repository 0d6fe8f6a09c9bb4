"""How strongly a method is applied: a small search within a budget of utility.

A learning rate too low leaves everything as it was, one too high leaves no model. So a method is
tried at its own strength first, then weaker where the utility fell below the budget, stronger where
hardly anything was forgotten; and after every epoch the model is looked at, so that an epoch too
many costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from germane.core.checkpoint import save_tensors
from germane.core.evidence import Table
from germane.core.objective import Task

_FACTOR = 4.0  # between a strength and the next
_LOOKED_AT = 64  # records a look at the model takes


@torch.no_grad()
def confidence(task: Task, batch_size: int = 16, limit: int | None = None) -> list[float]:
    """Of each record, the probability of what is right: of language, the geometric mean over tokens."""
    was_training = task.model.training
    task.model.eval()
    order = task.sorted_order()
    if limit and len(order) > limit:
        order = order[:: len(order) // limit][:limit]
    values: list[float] = []
    for batch in task.batches(batch_size, order):
        values += torch.exp(-task.losses(batch, "cross-entropy").float()).tolist()
    task.model.train(was_training)
    return values


@dataclass(frozen=True)
class Look:
    """What was seen of a model: mean confidence on what should be forgotten, and on what should stay."""

    forget: float
    utility: float


@dataclass(frozen=True)
class Limits:
    """What the search keeps to.

    Attributes:
        before: What was seen of the untouched model.
        budget: Share of the utility that may be lost.
        target: Confidence at which a record counts as unknown; 0 where nobody knows.
    """

    before: Look
    budget: float
    target: float

    @property
    def floor(self) -> float:
        """The least utility that is within the budget."""
        return self.before.utility * (1 - self.budget)

    def better(self, one: Look, other: Look | None) -> bool:
        """Whether `one` is within the budget and forgets more, or enough, as `other` does not."""
        if not one.utility >= self.floor:
            return False
        if other is None:
            return True
        if max(one.forget, other.forget) <= self.target:
            return one.utility > other.utility
        return one.forget < other.forget


def look(forget: Task, utility: Task) -> Look:
    """Mean confidence on some records of both."""
    means = [sum(values) / len(values) for values in (_some(forget), _some(utility))]
    return Look(*means)


def _some(task: Task) -> list[float]:
    return confidence(task, limit=_LOOKED_AT)


class Watch:
    """Looks at a model after every epoch and keeps its best weights on disk."""

    def __init__(self, limits: Limits, forget: Task, utility: Task, file: Path) -> None:
        self.limits = limits
        self.forget = forget
        self.utility = utility
        self.file = file
        self.best: Look | None = None
        self.epoch = 0
        self.spent = False  # whether the budget was used up

    @property
    def model(self) -> Any:
        """The model that is looked at."""
        return self.forget.model

    def after_epoch(self, epoch: int) -> bool:
        """Keep the weights where they are the best so far; end where the budget is spent."""
        seen = look(self.forget, self.utility)
        if self.limits.better(seen, self.best):
            self.best, self.epoch = seen, epoch
            save_tensors(moving(self.model), self.file)
        self.spent = not seen.utility >= self.limits.floor
        return self.spent or seen.forget <= self.limits.target

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back, if any were within the budget."""
        from safetensors import safe_open

        if self.best is None:
            return
        with safe_open(self.file, "pt") as kept:
            for name, tensor in moving(self.model).items():
                tensor.copy_(kept.get_tensor(name))
        self.file.unlink()


def moving(model: Any) -> dict[str, torch.Tensor]:
    """What training changes: the parameters that require gradients, and running statistics."""
    found = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    return found | {name: b for name, b in model.named_buffers() if b.numel() and "running" in name}


@dataclass
class Trial:
    """One run of a method at one strength.

    Attributes:
        factor: On the method's own strength.
        seen: The model that came out.
        epoch: The epoch it is from; 0 for the end.
        spent: Whether a later epoch was beyond the budget.
        error: Why there is no model.
    """

    factor: float
    seen: Look | None = None
    epoch: int = 0
    spent: bool = False
    error: str = ""


def search(run: Callable[[float], Trial], limits: Limits, trials: int) -> tuple[list[Trial], Trial | None]:
    """Run a method at a few strengths; returns all trials, and the best within the budget."""
    done: list[Trial] = []
    best: Trial | None = None
    factor: float | None = 1.0
    while factor is not None and len(done) < trials:
        trial = run(factor)
        done.append(trial)
        if trial.seen and limits.better(trial.seen, best.seen if best else None):
            best = trial
        factor = _next(done, limits)
    return done, best


def _next(done: list[Trial], limits: Limits) -> float | None:
    """The strength to try next, or None where nothing better is to be expected."""
    kept = [t for t in done if t.seen and t.seen.utility >= limits.floor and not t.error]
    if any(trial.seen and trial.seen.forget <= limits.target for trial in kept):
        return None
    works = max((trial.factor for trial in kept), default=None)
    fails = min((t.factor for t in done if t.spent or t not in kept), default=None)
    if works is None:
        return fails / _FACTOR if fails else None
    if fails is None:
        return works * _FACTOR
    middle = (works * fails) ** 0.5
    return middle if fails / works > 1.5 else None


def trials_table(trials: list[Trial], best: Trial | None, setting: str, value: float) -> Table:
    """What was tried, for the report."""
    rows: list[list[str | float | int | None]] = []
    for trial in trials:
        seen = trial.seen
        verdict = trial.error or ("kept" if trial is best else "")
        rows.append(
            [
                float(f"{value * trial.factor:.3g}"),
                trial.epoch or None,
                round(seen.forget, 4) if seen else None,
                round(seen.utility, 4) if seen else None,
                verdict,
            ]
        )
    return Table(
        title="The search for a strength within the budget",
        columns=[setting, "epoch", "confidence on forget", "confidence on utility", "verdict"],
        rows=rows,
    )
