"""What a method of unlearning supplies: a change of the model, mostly a loss to fine-tune on."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from germane.core.errors import SettingError
from germane.core.evidence import Plot, Series, Step
from germane.core.models import Loaded
from germane.core.objective import Batch, Task
from germane.core.training import Diverged, Hooks, Training, finish, fit, prepare
from germane.method import Method


def _go_on(epoch: int) -> bool:
    return False


@dataclass
class Work:
    """What a method works on.

    Attributes:
        loaded: The model, changed in place.
        forget: The records to forget, read by that model.
        retain: The records to keep that methods may train on, or None.
        original: Loads the untouched model once more, for methods that compare with it.
        initial: Folder of the model before it saw any of the records, or "".
        seed: Of everything random.
        step: What there is to say goes here.
        scratch: A folder for what has to be put aside; what one trial leaves there, the next finds.
        after_epoch: Looks at the model after each epoch; says whether to end.
        restore: Puts the best weights that `after_epoch` saw back.
        has_good: Whether `after_epoch` saw any that are within the budget.
        diverged: Why training ended early, where what was good before is the result.
        adapted: While adapters are trained, PEFT's model around the model.
    """

    loaded: Loaded
    forget: Task
    retain: Task | None
    original: Callable[[], Loaded]
    initial: str
    seed: int
    step: Step
    scratch: Path
    after_epoch: Callable[[int], bool] = _go_on
    restore: Callable[[], None] = lambda: None
    has_good: Callable[[], bool] = lambda: False
    diverged: str = ""
    adapted: Any = None

    @property
    def model(self) -> Any:
        """The model."""
        return self.loaded.model

    def kept(self) -> Task:
        """The retain records, for methods that need them: the task has checked that they are there."""
        assert self.retain is not None
        return self.retain


class Unlearner(Method):
    """A method of unlearning.

    Attributes:
        strength: The setting that the search multiplies to make the method act more or less; "" where
            there is nothing to search, and the method is run once.
    """

    strength: ClassVar[str] = "learning_rate"

    @abstractmethod
    def unlearn(self, work: Work) -> None:
        """Change `work.loaded.model` in place."""

    def stronger(self, factor: float) -> Unlearner:
        """The same method with its strength multiplied.

        Raises:
            SettingError: The setting would leave its bounds.
        """
        value = getattr(self, self.strength) * factor
        return type(self).model_validate({**self.model_dump(), self.strength: value})


@dataclass(frozen=True)
class Pair:
    """One step's records: some to forget, some to retain, and which of the records they are."""

    forget: Batch | None
    retain: Batch | None
    forget_rows: Sequence[int] = ()
    retain_rows: Sequence[int] = ()


class FineTuned(Unlearner, Training):
    """A method that lowers a loss on the records to forget, to retain, or both.

    A method implements `loss`; one that trains on other batches overrides `pairs` and `length`.
    """

    uses_retain: ClassVar[bool] = False  # whether a step also has retain records, where there are any
    uses_forget: ClassVar[bool] = True

    @abstractmethod
    def loss(self, work: Work, pair: Pair) -> Tensor | Iterator[Tensor]:
        """The scalar to lower, or scalars whose sum is to be lowered, which need memory one by one."""

    def begin(self, work: Work) -> None:
        """What has to be known before the first step, such as the original's log-probabilities."""

    def hooks(self, work: Work) -> Hooks:
        """What happens between the parts of a step."""
        return Hooks(after_epoch=work.after_epoch)

    def length(self, work: Work) -> int:
        """Batches of an epoch."""
        rows = work.forget.rows if self.uses_forget else work.kept().rows
        return -(-len(rows) // self.batch_size)

    def pairs(self, work: Work, epoch: int) -> Iterator[Pair]:
        """The batches of an epoch, shuffled; retain records are gone through in parallel."""
        generator = random.Random(f"{work.seed}/{epoch}")
        forget = shuffled(work.forget, generator) if self.uses_forget else []
        retain = shuffled(work.retain, generator) if self.uses_retain and work.retain else []
        size = self.batch_size
        for start in range(0, len(forget or retain), size):
            forget_rows = forget[start : start + size]
            count = len(forget_rows) or size
            last = start + count if forget else min(start + count, len(retain))
            retain_rows = [retain[index % len(retain)] for index in range(start, last)] if retain else []
            yield Pair(
                batch_of(work.forget, forget_rows), batch_of(work.retain, retain_rows),
                forget_rows, retain_rows,
            )  # fmt: skip

    def unlearn(self, work: Work) -> None:
        torch.manual_seed(work.seed)
        self.begin(work)
        model = work.adapted = prepare(work.model, self)
        model.train()
        losses: list[float] = []
        try:
            losses = fit(
                model, self, lambda epoch: self.pairs(work, epoch), self.length(work),
                lambda pair: self.loss(work, pair), self.hooks(work),
                optimiser=self.make_optimiser(work), label=self.name,
            ).losses  # fmt: skip
        except Diverged as error:
            if not work.has_good():
                raise
            work.diverged = str(error)
        work.restore()
        work.loaded.model = finish(model)
        plot_losses(work.step, self.name, losses)

    def make_optimiser(self, work: Work) -> torch.optim.Optimizer | None:
        """An optimiser of the method's own, or None for the settings' one."""
        return None


def watch_all(work: Work) -> Callable[[int], bool]:
    """Looks at every epoch and ends at none: for methods whose utility is lost first and comes back."""

    def after_epoch(epoch: int) -> bool:
        work.after_epoch(epoch)
        return False

    return after_epoch


def shuffled(task: Task, generator: random.Random) -> list[int]:
    """The task's record numbers in random order."""
    return generator.sample(range(len(task.rows)), len(task.rows))


def batch_of(task: Task | None, rows: Sequence[int]) -> Batch | None:
    """These records of a task as one batch, or None."""
    if task is None or not rows:
        return None
    return next(task.batches(len(rows), rows))


def mean_loss(task: Task, batch: Batch | None) -> Tensor:
    """Mean cross-entropy of a batch; of language, over records of their means over tokens."""
    assert batch is not None
    return task.losses(batch, "cross-entropy").mean()


def plot_losses(step: Step, name: str, losses: Sequence[float]) -> None:
    """Add the course of a training to the evidence."""
    if losses:
        steps = [float(number) for number in range(1, len(losses) + 1)]
        series = [Series(name=name, steps=steps, values=list(losses))]
        step.plots.append(Plot(title="loss by batch", x="batch", y="loss", series=series))


def require_classifier(method: Method, task: Task) -> int:
    """The number of classes of the model.

    Raises:
        SettingError: The model is no classifier.
    """
    if task.generative or task.model.config.num_labels < 2:
        raise SettingError(f"{method.name}: needs a classifier with at least two classes.")
    return int(task.model.config.num_labels)
