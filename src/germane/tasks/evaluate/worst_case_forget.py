"""Which training records are hardest to forget, and how an unlearner does on them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from germane.core.errors import RecordsError, SettingError
from germane.core.evidence import Plot, Score, Series, Step, Table
from germane.core.models import Loaded, load_model
from germane.core.objective import Task
from germane.core.progress import announce
from germane.core.records import Data, Row, read_rows, write_jsonl
from germane.core.statistics import wilson
from germane.job import job_class
from germane.method import Method, build, method
from germane.roles import Records
from germane.suite import Measured, Suite

WORST, EASIEST, LOWEST, HIGHEST, RANDOM = "worst case", "easiest", "lowest loss", "highest loss", "random"
UNLEARNING, TEST, OVERLAP = "unlearning accuracy", "test accuracy", "overlap with lowest loss"


@dataclass(frozen=True)
class Units:
    """What is weighted: the records themselves, or their classes.

    Attributes:
        of: (records,) the unit of each record.
        count: How many there are.
    """

    of: Tensor
    count: int

    def mean(self, values: Tensor) -> Tensor:
        """(units,) mean of the records' values."""
        empty = torch.zeros(self.count, dtype=torch.float64)
        sums = empty.index_add(0, self.of, values.double())
        return sums / torch.bincount(self.of, minlength=self.count)

    def records(self, chosen: Sequence[int]) -> list[int]:
        """The records of these units."""
        return torch.isin(self.of, torch.tensor(list(chosen))).nonzero()[:, 0].tolist()


@dataclass
class Search:
    """What a search for a set left behind.

    Attributes:
        weights: (units,) the last weights, before they were made 0 and 1.
        chosen: The units of the set.
        losses: Of each round, the weighted mean loss of the set after the unlearning of that round.
        changed: Of each round, how many units of the set were not in it before.
    """

    weights: Tensor
    chosen: list[int]
    losses: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """How many of how many forget records were unlearned, and test records are right."""

    unlearned: int = 0
    forget: int = 0
    right: int = 0
    test: int = 0

    def add(self, other: Outcome) -> None:
        """Pool with another set's."""
        self.unlearned, self.forget = self.unlearned + other.unlearned, self.forget + other.forget
        self.right, self.test = self.right + other.right, self.test + other.test


@method(
    "evaluate/worst-case-forget",
    paper="2403.07362",
    code="OPTML-Group/Unlearn-WorstCase",
    needs=("classifier",),
)
class WorstCaseForget(Suite):
    """Find the records an unlearner forgets worst, and measure it there and on sets chosen otherwise.

    Fan et al., "Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning", ECCV
    2024. Of all sets of `size` records (or classes) the one is searched whose loss stays lowest after
    unlearning: min over w of sum_i w_i l(theta(w); z_i) + penalty |w|^2 with w in [0, 1] and sum_i w_i =
    size, where theta(w) is fine-tuned on what is kept, sum_i (1 - w_i) l_i, by steps along the sign of the
    gradient. Each round starts from the model as it is, unlearns, and moves w by
    w - b (l + 2 penalty w), projected back by bisection; at the end the set is the `size` largest weights.
    With + in place of - the same search finds the easiest set. Then any unlearner is run on both, on
    random sets, and on the cheap baselines: the records of lowest and of highest loss in the model as it
    is. Unlearning accuracy is 1 - accuracy on the forget records; the random sets' counts are pooled.

    Read the worst case beside the lowest loss: they overlap much, and the search earns its cost only by
    what it adds. A worst case far below random means that a report on random sets flatters the unlearner.

    Use it before trusting an unlearner measured on a random forget set. Not when the forget set is
    already known: then measure that one.

    Differs from the paper and code: b is `step_size` over the mean loss, since a record leaves a set of
    zeros and ones only where b times a difference of losses reaches about 1, and the released 0.01 moves
    nothing once losses are small; losses of the upper step are taken in evaluation mode, not with a
    batch norm's batch statistics; a class weighs the mean loss of its records, not a sum over batches;
    the sum of weights is `size` for classes too (the released code projects to 0.9 of it); gradients of
    zero stay zero. Only the fine-tuning variant of the lower level is there.
    """

    roles: ClassVar[Mapping[str, str]] = {
        "train": "records that the classifier was trained on",
        "test": "records like them that were never trained on",
    }

    size: int = Field(default=0, ge=0, description="records, or classes, in a set; 0: a tenth of them")
    level: Literal["record", "class"] = Field(default="record", description="what is weighted")
    rounds: int = Field(default=10, gt=0, description="moves of the weights")
    steps: int = Field(default=2, gt=0, description="epochs of unlearning in a round")
    learning_rate: float = Field(default=1e-3, gt=0, description="of the sign steps of that unlearning")
    step_size: float = Field(
        default=10.0,
        gt=0,
        description="of the weights: how far a loss as large as the mean moves one",
    )
    penalty: float = Field(default=0.0, ge=0, description="price of the squared weights")
    binary_every: int = Field(
        default=20, gt=0, description="rounds after which the weights are made 0 and 1; always at the end"
    )
    unlearner: str = Field(default="retrain", description="the method of unlearn that is measured")
    unlearner_settings: dict[str, Any] = Field(default={}, description="its settings")
    initial: str = Field(
        default="", description="the model before training, for unlearners that start there"
    )
    random_sets: int = Field(default=5, gt=0, description="random sets to compare with")
    batch_size: int = Field(default=64, gt=0, description="records of a step that are in memory together")
    seed: int = Field(default=0, description="of the first set, the order of records and the unlearner")

    def check_records(self, records: Records) -> None:
        """Roles and labels, the size of the sets, and the unlearner."""
        super().check_records(records)
        for role in self.roles:
            _require_labels(records[role])
        rows = read_rows(records["train"])
        labels = {str(row[records["train"].label]) for row in rows}
        self._size(len(rows) if self.level == "record" else len(labels))
        self._unlearner()

    def _unlearner(self) -> Method:
        return build(f"unlearn/{self.unlearner.removeprefix('unlearn/')}", self.unlearner_settings)

    def _size(self, count: int) -> int:
        size = self.size or max(1, count // 10)
        if size >= count:
            raise SettingError(
                f"{self.name}: size: {size} of {count} leaves nothing to keep: ask for fewer."
            )
        return size

    def score(
        self, subject: str, loaded: Loaded, records: Records, calibration: Any, step: Step
    ) -> Measured:
        """The sets of this model, and what the unlearner makes of each."""
        rows = read_rows(records["train"])
        task = Task(records["train"], rows, deepcopy(loaded.model), loaded.processor)
        units = self._units(task)
        before = record_losses(task, self.batch_size)
        worst, easiest = self.search(task, units, 1.0), self.search(task, units, -1.0)
        sets = self._sets(units, before, worst.chosen, easiest.chosen)
        _show_search(step, subject, {WORST: worst, EASIEST: easiest})
        outcomes = {}
        for name, chosen in sets.items():
            announce(f"{self.unlearner} on {len(chosen)} records: {name}")
            outcomes[name] = self.outcome(loaded, records, rows, chosen)
        step.tables.append(_table(subject, sets, outcomes))
        return Measured(
            _scores(subject, sets, outcomes),
            _items(task, before, units.of, worst.weights, sets),
        )

    def _units(self, task: Task) -> Units:
        labels = [row["labels"] for row in task.rows]
        if self.level == "record":
            return Units(torch.arange(len(labels)), len(labels))
        known = sorted(set(labels))
        return Units(torch.tensor([known.index(label) for label in labels]), len(known))

    def search(self, task: Task, units: Units, direction: float) -> Search:
        """The set whose loss after unlearning is lowest (direction 1) or highest (-1).

        Args:
            task: The records; its model ends as it began.
            units: What is weighted.
            direction: Of the move along the losses.
        """
        size = self._size(units.count)
        start = random.Random(self.seed).sample(range(units.count), size)
        weights = torch.zeros(units.count, dtype=torch.float64)
        weights[start] = 1.0
        found = Search(weights, sorted(start))
        untouched = deepcopy(task.model.state_dict())
        for number in range(1, self.rounds + 1):
            self.unlearn(task, (1 - weights)[units.of], number)
            losses = units.mean(record_losses(task, self.batch_size))
            task.model.load_state_dict(untouched)
            found.losses.append(float((weights * losses).sum() / size))
            move = direction * self.step_size / max(float(losses.mean()), 1e-12)
            weights = found.weights = move_weights(weights, losses, move, self.penalty, size)
            chosen = largest(weights, size)
            found.changed.append(float(len(set(chosen) - set(found.chosen))))
            found.chosen = chosen
            if number % min(self.binary_every, self.rounds) == 0:
                weights = torch.zeros_like(weights)
                weights[chosen] = 1.0
        return found

    def unlearn(self, task: Task, kept: Tensor, number: int) -> None:
        """Sign steps on the losses of the records, weighted by how much they are kept.

        Args:
            task: The records; its model is changed.
            kept: (records,) 1 for records to keep, 0 for those to forget.
            number: Of the round.
        """
        torch.manual_seed(self.seed)
        task.model.train()
        generator = random.Random(f"{self.seed}/{number}")
        for _ in range(self.steps):
            order = generator.sample(range(len(task.rows)), len(task.rows))
            for place, batch in enumerate(task.batches(self.batch_size, order)):
                picked = order[place * self.batch_size : (place + 1) * self.batch_size]
                losses = task.losses(batch, "cross-entropy")
                value = (kept[picked].to(losses) * losses).sum()
                sign_step(task.model, value, self.learning_rate)
        task.model.eval()

    def _sets(
        self, units: Units, losses: Tensor, worst: list[int], easiest: list[int]
    ) -> dict[str, list[int]]:
        """The records of every set, by the set's name."""
        size, means = self._size(units.count), units.mean(losses)
        chosen = {
            WORST: worst,
            EASIEST: easiest,
            LOWEST: largest(-means, size),
            HIGHEST: largest(means, size),
        }
        for number in range(1, self.random_sets + 1):
            generator = random.Random(f"{self.seed}/random/{number}")
            chosen[f"{RANDOM} {number}"] = generator.sample(range(units.count), size)
        return {name: units.records(picked) for name, picked in chosen.items()}

    def outcome(
        self, loaded: Loaded, records: Records, rows: Sequence[Row], chosen: Sequence[int]
    ) -> Outcome:
        """What is left of these records after the unlearner was run on them, in a folder of its own."""
        forgotten = set(chosen)
        parts = {
            "forget": [row for number, row in enumerate(rows) if number in forgotten],
            "retain": [row for number, row in enumerate(rows) if number not in forgotten],
        }
        with tempfile.TemporaryDirectory() as place:
            files = {
                name: _write(part, records["train"], Path(place), name) for name, part in parts.items()
            }
            out = Path(place) / "out"
            out.mkdir()
            self._run(str(loaded.folder), files, out)
            after = load_model(str(out))
            forget, test = (
                predicted_right(after, data, self.batch_size) for data in (files["forget"], records["test"])
            )
        if self.level == "class":  # what is right to forget must not count as lost
            gone = {str(row[records["train"].label]) for row in parts["forget"]}
            labels = [str(row[records["test"].label]) for row in read_rows(records["test"])]
            test = test[[label not in gone for label in labels]]
        return Outcome(int((~forget).sum()), len(forget), int(test.sum()), len(test))

    def _run(self, model: str, files: Mapping[str, Data], out: Path) -> None:
        """The unlearner with its settings as they are."""
        chosen = self._unlearner()
        arguments = {"model": model, **files, "trials": 0, "references": False, "initial": self.initial}
        job = job_class("unlearn").model_validate(arguments)
        job.check(chosen)
        job.run(chosen, out, Step(task="unlearn", method=chosen.name), self.seed)


def project(values: Tensor, total: float) -> Tensor:
    """The point nearest to `values` whose elements are in [0, 1] and sum to `total`, in float64.

    It is clip(values - m, 0, 1); m is found by bisection, as in the paper, to the last bit.

    Args:
        values: (units,) any numbers.
        total: From 0 to the number of units.
    """
    values = values.double()
    low, high = float(values.min()) - 1, float(values.max())
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if float((values - middle).clamp(0, 1).sum()) > total:
            low = middle
        else:
            high = middle
    return (values - high).clamp(0, 1)


def move_weights(weights: Tensor, losses: Tensor, step: float, penalty: float, size: int) -> Tensor:
    """One step down the upper level's gradient (or up, with a negative `step`), projected.

    Args:
        weights: (units,) from 0 to 1, sum `size`.
        losses: (units,) after unlearning.
        step: Length of the step.
        penalty: Price of the squared weights.
        size: Of the set.
    """
    return project(weights - step * (losses.double() + 2 * penalty * weights), size)


def largest(values: Tensor, size: int) -> list[int]:
    """Where the `size` largest are, in order; of equal ones the first."""
    return sorted(values.argsort(descending=True, stable=True)[:size].tolist())


@torch.no_grad()
def record_losses(task: Task, batch_size: int) -> Tensor:
    """(records,) cross-entropy of each, in evaluation mode."""
    task.model.eval()
    found = [task.losses(batch, "cross-entropy").cpu() for batch in task.batches(batch_size)]
    return torch.cat(found)


def sign_step(model: torch.nn.Module, value: Tensor, learning_rate: float) -> None:
    """Move every weight by `learning_rate` against the sign of its gradient of `value`."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient.sign(), alpha=learning_rate)


@torch.no_grad()
def predicted_right(loaded: Loaded, data: Data, batch_size: int) -> NDArray[np.bool_]:
    """Of each record, whether its class is the likeliest."""
    task = Task(data, read_rows(data), loaded.model.eval(), loaded.processor)
    found = [(task.logits(b).argmax(dim=1) == b["labels"]).cpu() for b in task.batches(batch_size)]
    right: NDArray[np.bool_] = torch.cat(found).numpy()
    return right


def _require_labels(data: Data) -> None:
    for number, row in enumerate(read_rows(data), 1):
        if row.get(data.label) in (None, ""):
            raise RecordsError(
                f"{data.path}, record {number}: has no class in field {data.label!r}. "
                f"Fields: {', '.join(row)}."
            )


def _write(rows: Sequence[Row], data: Data, folder: Path, name: str) -> Data:
    """Some of the records as a file elsewhere; images that are files stay where they are."""
    place = Path(data.path).expanduser().resolve().parent
    written = [
        {**row, data.image: str(place / row[data.image])} if isinstance(row.get(data.image), str) else row
        for row in rows
    ]
    write_jsonl(written, folder / f"{name}.jsonl")
    return data.model_copy(update={"name": name, "path": str(folder / f"{name}.jsonl"), "limit": None})


def _kind(name: str) -> str:
    """The set's name without the number of random ones."""
    return RANDOM if name.startswith(RANDOM) else name


def _scores(subject: str, sets: Mapping[str, list[int]], outcomes: Mapping[str, Outcome]) -> list[Score]:
    pooled: dict[str, Outcome] = {}
    for name, outcome in outcomes.items():
        pooled.setdefault(_kind(name), Outcome()).add(outcome)
    scores = []
    for name, outcome in pooled.items():
        scores.append(_share(subject, "forget", f"{UNLEARNING}, {name}", outcome.unlearned, outcome.forget))
        if outcome.test:
            scores.append(_share(subject, "test", f"{TEST}, {name}", outcome.right, outcome.test))
    shared = len(set(sets[WORST]) & set(sets[LOWEST]))
    return [*scores, _share(subject, "forget", OVERLAP, shared, len(sets[WORST]))]


def _share(subject: str, task: str, metric: str, count: int, n: int) -> Score:
    low, high = wilson(count, n)
    return Score(subject=subject, task=task, metric=metric, value=count / n, n=n, low=low, high=high)


def _show_search(step: Step, subject: str, found: Mapping[str, Search]) -> None:
    """The course of both searches."""
    for title, y, attribute in (
        ("mean loss of the set after unlearning", "loss", "losses"),
        ("units of the set that are new", "units", "changed"),
    ):
        series = [
            Series(name=name, steps=[float(n + 1) for n in range(len(search.losses))],
                   values=list(getattr(search, attribute)))
            for name, search in found.items()
        ]  # fmt: skip
        step.plots.append(Plot(title=f"{subject}: {title}", x="round", y=y, series=series))


def _table(subject: str, sets: Mapping[str, list[int]], outcomes: Mapping[str, Outcome]) -> Table:
    lowest = set(sets[LOWEST])
    rows: list[list[str | float | int | None]] = []
    for name, outcome in outcomes.items():
        rows.append(
            [
                name,
                outcome.forget,
                round(outcome.unlearned / outcome.forget, 4),
                round(outcome.right / outcome.test, 4) if outcome.test else None,
                round(len(lowest & set(sets[name])) / len(sets[name]), 4),
            ]
        )
    return Table(
        title=f"{subject}: the unlearner on every set",
        columns=["set", "records", UNLEARNING, TEST, OVERLAP],
        rows=rows,
    )


def _items(
    task: Task, losses: Tensor, units: Tensor, weights: Tensor, sets: Mapping[str, list[int]]
) -> list[Row]:
    """Of every record its weight in the search for the worst case, and the sets that it is in."""
    inside: list[list[str]] = [[] for _ in task.rows]
    for name, chosen in sets.items():
        for number in chosen:
            inside[number].append(name)
    return [
        {
            "role": "train", "record": number + 1, "answer": row["labels"], "score": float(losses[number]),
            "weight": float(weights[units[number]]), "set": inside[number],
        }
        for number, row in enumerate(task.rows)
    ]  # fmt: skip
