"""The unlearn task: a model, records to forget, and a method make a model that does not know them.

Promised for every method: the result loads in plain transformers and has the model's names, shapes,
dtypes and tokenizer; the method is tried at a few strengths and the model looked at after every
epoch, so that the utility stays within the budget; what was forgotten is measured for the untouched
model and, where there is one, the retrained model too; a loss that is not finite costs one trial,
not the run.
"""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from germane.core.checkpoint import Checkpoint, digest, locate, require_space
from germane.core.effect import judge_change, weight_change
from germane.core.errors import RecordsError, SettingError
from germane.core.evidence import Finding, Row, Scatter, ScatterPoint, Score, Step, Table
from germane.core.membership import area, signal
from germane.core.models import Loaded, load_model, names_language_model
from germane.core.objective import Task
from germane.core.progress import announce
from germane.core.records import Data, read_rows
from germane.core.records import Row as Record
from germane.core.training import Diverged
from germane.job import Job
from germane.method import Method
from germane.suite import SuiteRequest, measure_suites
from germane.tasks.unlearn._measures import MEMORY, UTILITY, judge, memory, privacy_leak, utility
from germane.tasks.unlearn._requests import AT_ONCE, IN_TURN, Courses
from germane.tasks.unlearn._search import (
    Limits,
    Trial,
    Watch,
    confidence,
    look,
    search,
    trials_table,
)
from germane.tasks.unlearn._unlearner import Unlearner, Work

_ASIDE = 0.2  # share of the retain records that methods do not train on, for the yardstick
_MOST_ASIDE = 64
_WEIGHTS = "kept.safetensors"


class Unlearn(Job):
    """Make a model behave as if some records had never been trained on."""

    task: ClassVar[str] = "unlearn"
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(description="the model that knows the records: a folder or hub id")
    forget: Data = Field(description="records to forget, as path or name=path")
    retain: Data | None = Field(
        default=None, description="records to keep; a part of them is only the yardstick of utility"
    )
    holdout: Data | None = Field(
        default=None,
        description="records like the forget set that the model never saw: what not knowing is",
    )
    initial: str = Field(
        default="", description="the model before it saw any of the records, for methods that start there"
    )
    retrained: str = Field(
        default="", description="a model trained without the forget records, to compare with"
    )
    budget: float = Field(
        default=0.05, gt=0, le=1, description="share of the utility that a method may cost"
    )
    trials: int = Field(
        default=3, ge=0, description="strengths to try within the budget; 0: the settings as they are"
    )
    requests: int = Field(
        default=1,
        ge=1,
        description="parts that the forget records come in: also unlearn growing numbers of them at once, "
        "and one after another",
    )
    suites: list[SuiteRequest] = Field(
        default=[], description="suites of evaluate to measure the result with, such as muse"
    )
    data: list[Data] = Field(
        default=[], description="further records that suites read, by role, as role=path"
    )

    def check(self, method: Method) -> None:
        """Everything that can be known from files and records, before any work."""
        assert isinstance(method, Unlearner)
        forget = read_rows(self.forget)
        self._check_requests(len(forget))
        named = {"retain": self.retain, "holdout": self.holdout}
        for name, data in named.items():
            if data is not None:
                _check_apart(name, data, self.forget, forget)
        for data in (*self.data, *self.evaluate):
            read_rows(data)
        if "retain" in method.information.needs and self.retain is None:
            raise SettingError(f"{method.name}: needs records to keep: --retain FILE.")
        for path in (self.model, self.initial, self.retrained):
            if path:
                Checkpoint(locate(path))
        if "initial" in method.information.needs and not self.initial:
            raise SettingError(
                f"{method.name}: needs the model before it saw the records: --initial MODEL."
            )
        for request in self.suites:
            suite = request.build()
            suite.check_records(self.roles())
            suite.check_model(self.model)
        self._check_kind(method)

    def _check_requests(self, count: int) -> None:
        if self.requests > count:
            raise SettingError(f"requests: {self.requests} parts of {count} forget records are too many.")
        if self.requests > 1 and self.retain is None:
            raise SettingError("requests: more than one are measured by the utility: --retain FILE.")

    def _check_kind(self, method: Method) -> None:
        """Whether the method reads models of this kind, as far as the config says."""
        kind = str(Checkpoint(locate(self.model)).config.get("architectures"))
        fits = {"language model": names_language_model(kind), "classifier": "Classif" in kind}
        for need, met in fits.items():
            if need in method.information.needs and not met:
                raise SettingError(f"{method.name}: needs a {need}; {self.model} is {kind}.")

    def roles(self) -> dict[str, Data]:
        """The records of suites, by role."""
        found = {"forget": self.forget, "retain": self.retain, "holdout": self.holdout}
        named = {role: data for role, data in found.items() if data is not None}
        return named | {data.name: data for data in self.data}

    def run(self, method: Method, folder: Path, step: Step, seed: int) -> None:
        """Unlearn into `folder`, which exists and is empty."""
        assert isinstance(method, Unlearner)
        run = _Run(self, method, folder, step, seed)
        run.unlearn()
        run.measure()
        if self.requests > 1:
            run.repeat()

    @classmethod
    def summarise(cls, rows: Sequence[Row], references: Sequence[Row]) -> tuple[list[Table], list[Scatter]]:
        """What a comparison shows besides its rows: who forgets most at which cost."""
        points = []
        for row in (*references, *rows):
            kept, lost = row.mean(UTILITY), row.mean(MEMORY)
            if row.status != "failed" and kept is not None and lost is not None:
                points.append(
                    ScatterPoint(name=row.label, x=lost, y=kept, reference=row.status == "reference")
                )
        if not points:
            return [], []
        title = "What is forgotten, and what it costs"
        return [], [
            Scatter(title=title, x="memory of the forget records", y="utility", points=points, lower_x=True)
        ]


def _check_apart(name: str, data: Data, forget: Data, forget_rows: Sequence[Record]) -> None:
    """Refuse records that are to be forgotten and kept, or forgotten and never seen."""
    known = {_text_of(row) for row in forget_rows}
    shared = [number for number, row in enumerate(read_rows(data), 1) if _text_of(row) in known]
    if shared:
        raise RecordsError(
            f"{data.path}: {len(shared)} of its records are in {forget.path} too, the first is record "
            f"{shared[0]}: a record cannot be in both forget and {name}."
        )


def _text_of(row: Record) -> str:
    return repr(sorted((key, value) for key, value in row.items() if isinstance(value, str | int | float)))


@dataclass(frozen=True)
class _Start:
    """Where one of several requests begins.

    Attributes:
        model: The folder of the model.
        rows: The records to forget.
        scratch: A folder for what is put aside.
    """

    model: str
    rows: list[Record]
    scratch: Path


class _Run:
    """One run: the trials, the best of them written, everything measured."""

    def __init__(self, job: Unlearn, method: Unlearner, folder: Path, step: Step, seed: int) -> None:
        self.job = job
        self.method = method
        self.folder = folder
        self.step = step
        self.seed = seed
        self.chosen = method  # at the strength that the search found
        self.limits: Limits | None = None
        self.scratch = folder / ".scratch"
        retain = read_rows(job.retain) if job.retain else []
        self.retain_rows, self.aside_rows = _set_aside(retain, seed)

    def task(self, loaded: Loaded, data: Data, rows: Sequence[Record] | None = None) -> Task:
        """Records as this model reads them; long texts whole, in pieces."""
        chosen = read_rows(data) if rows is None else rows
        return Task(data, chosen, loaded.model, loaded.processor, split=True)

    def unlearn(self) -> None:
        """Try, choose, and write."""
        job, step = self.job, self.step
        with step.stage("check"):
            source = Checkpoint(locate(job.model))
            require_space(self.folder, 3 * source.size)
            step.inputs = {str(file): digest(file) for file in source.files}
            step.inputs |= {d.path: digest(Path(d.path)) for d in self.files() if Path(d.path).is_file()}
            self.scratch.mkdir()
        announce(f"{self.method.name}: unlearning {job.forget.path}")
        with step.stage("unlearn"):
            searched = bool(job.trials and self.method.strength)
            if not searched or not self.aside_rows:
                if searched:
                    step.findings.append(_no_yardstick())
                work = self._work([*self.retain_rows, *self.aside_rows])
                self.method.unlearn(work)
                work.loaded.save(self.folder)
                del work
            else:
                self._search()
        shutil.rmtree(self.scratch)
        with step.stage("effect"):
            change = weight_change(source, Checkpoint(self.folder))
            step.facts["relative_change"], step.facts["most_changed"] = change.relative, change.most
            step.findings.append(judge_change(change))

    def files(self) -> list[Data]:
        """The records this run reads."""
        job = self.job
        return [d for d in (job.forget, job.retain, job.holdout, *job.data, *job.evaluate) if d is not None]

    def _search(self) -> None:
        limits = self.limits = self._limits()
        trials, best = search(lambda factor: self._try(factor, limits), limits, self.job.trials)
        strength = getattr(self.method, self.method.strength)
        self.step.tables.append(trials_table(trials, best, self.method.strength, strength))
        self.step.facts["before"] = vars(limits.before)
        if best is None:
            self.step.findings.append(_over_budget(self.job.budget))
            best = max(trials, key=lambda trial: trial.seen.utility if trial.seen else -1.0)
            if best.seen is None:
                raise Diverged(best.error)
        self.step.facts["strength"] = strength * best.factor
        self.chosen = self.method.stronger(best.factor)
        self._put_in_place(best)

    def _limits(self) -> Limits:
        loaded = load_model(self.job.model)
        before = look(self.task(loaded, self.job.forget), self._aside(loaded))
        target = 0.0
        if self.job.holdout:
            values = confidence(self.task(loaded, self.job.holdout))
            target = sum(values) / len(values)
        return Limits(before, self.job.budget, target)

    def _aside(self, loaded: Loaded) -> Task:
        assert self.job.retain is not None
        return self.task(loaded, self.job.retain, self.aside_rows)

    def _try(self, factor: float, limits: Limits) -> Trial:
        """One strength; its result waits in the scratch folder."""
        trial = Trial(factor)
        name = self.method.strength
        announce(f"{self.method.name}: {name} {getattr(self.method, name) * factor:.3g}")
        try:
            method = self.method.stronger(factor)
        except ValueError:
            trial.error = "out of bounds"
            return trial
        try:
            self._apply(method, limits, self.scratch / f"{factor:g}", trial)
        except Diverged as error:
            trial.error = str(error)
            self.step.findings.append(_diverged(trial.error))
        gc.collect()
        return trial

    def _apply(
        self, method: Unlearner, limits: Limits, folder: Path, trial: Trial, start: _Start | None = None
    ) -> None:
        """The method on a fresh copy of a model, looked at after every epoch, and saved."""
        work = self._work(self.retain_rows, start)
        watch = Watch(limits, work.forget, self._aside(work.loaded), self.scratch / _WEIGHTS)
        work.after_epoch, work.restore = watch.after_epoch, watch.restore
        work.has_good = lambda: watch.best is not None
        method.unlearn(work)
        work.loaded.save(folder)
        trial.seen, trial.epoch, trial.spent = watch.best, watch.epoch, watch.spent
        if work.diverged:
            trial.error = f"{work.diverged} The best epoch before it is kept."
            self.step.findings.append(_diverged(trial.error))
        if trial.seen is None:
            trial.seen = look(work.forget, self._aside(work.loaded))

    def _work(self, retain_rows: list[Record], start: _Start | None = None) -> Work:
        path = start.model if start else self.job.model
        step = Step(task=self.step.task, method=self.step.method) if start else self.step
        loaded = load_model(path)
        forget = self.task(loaded, self.job.forget, start.rows if start else None)
        retain = self.task(loaded, self.job.retain, retain_rows) if self.job.retain else None
        return Work(
            loaded, forget, retain, lambda: load_model(path), self.job.initial, self.seed, step,
            start.scratch if start else self.scratch,
        )  # fmt: skip

    def _put_in_place(self, best: Trial) -> None:
        for file in (self.scratch / f"{best.factor:g}").iterdir():
            file.rename(self.folder / file.name)

    def measure(self) -> None:
        """Scores of the result and of what it is compared with."""
        with self.step.stage("evaluate"):
            reference, scores = self._reference_area(), []
            for subject, path in self._subjects().items():
                announce(f"scoring {subject}")
                scores += self._scores(subject, load_model(path), reference)
                gc.collect()
            scores += measure_suites(
                self.job.suites, self._subjects(), self.job.roles(), self.job.retrained, self.step,
                self.folder,
            )  # fmt: skip
            self.step.scores = scores
        self.step.findings += judge(scores)

    def repeat(self) -> None:
        """Unlearn in parts: growing numbers of them at once, and one after another."""
        rows, count = read_rows(self.job.forget), self.job.requests
        parts = [rows[n * len(rows) // count : (n + 1) * len(rows) // count] for n in range(count)]
        self.scratch.mkdir()
        courses = Courses(count)
        with self.step.stage("requests"):
            for number in range(1, count):
                asked = [row for part in parts[:number] for row in part]
                courses.add(AT_ONCE, number, self._part(f"at-once-{number}", self.job.model, asked))
            courses.add(AT_ONCE, count, self._utilities(str(self.folder)))
            place, first = str(self.scratch / "at-once-1"), courses.of(AT_ONCE, 1)
            courses.add(IN_TURN, 1, first)
            for number in range(2, count + 1):
                courses.add(IN_TURN, number, self._part(f"in-turn-{number}", place, parts[number - 1]))
                place = str(self.scratch / f"in-turn-{number}")
        shutil.rmtree(self.scratch)
        self.step.plots += courses.plots()
        self.step.scores += courses.scores()

    def _part(self, name: str, model: str, rows: list[Record]) -> list[Score]:
        """The utility of a model that has unlearned some of the records."""
        announce(f"{self.method.name}: {name.replace('-', ' ')} of {self.job.requests} requests")
        folder, start = self.scratch / name, _Start(model, rows, self.scratch / f"{name}-aside")
        start.scratch.mkdir()
        try:
            if self.limits is not None:
                self._apply(self.chosen, self.limits, folder, Trial(1.0), start)
            else:
                work = self._work([*self.retain_rows, *self.aside_rows], start)
                self.chosen.unlearn(work)
                work.loaded.save(folder)
        except Diverged as error:
            self.step.findings.append(_diverged(f"{name}: {error}"))
            load_model(model).save(folder)
        gc.collect()
        return self._utilities(str(folder))

    def _utilities(self, path: str) -> list[Score]:
        """The utility, by the task's own measure and by those of the suites."""
        loaded = load_model(path)
        found = []
        if self.job.retain:
            rows = self.aside_rows or self.retain_rows
            found.append(utility("result", self.task(loaded, self.job.retain, rows)))
        for request in self.job.suites:
            found += request.build().utility("result", loaded, self.job.roles())
        return found

    def _subjects(self) -> dict[str, str]:
        subjects = {"result": str(self.folder)}
        if self.job.references:
            subjects["base"] = self.job.model
            if self.job.retrained:
                subjects["retrained"] = self.job.retrained
        return subjects

    def _reference_area(self) -> float:
        """AUC of holdout against forget records for the retrained model, or 0.5."""
        if not (self.job.retrained and self.job.holdout):
            return 0.5
        loaded = load_model(self.job.retrained)
        tasks = [self.task(loaded, data) for data in (self.job.forget, self.job.holdout)]
        return area(signal(tasks[0]), signal(tasks[1]))

    def _scores(self, subject: str, loaded: Loaded, reference: float) -> list[Score]:
        forget = self.task(loaded, self.job.forget)
        scores = [memory(subject, forget)]
        if self.job.retain:
            rows = self.aside_rows or self.retain_rows
            scores.append(utility(subject, self.task(loaded, self.job.retain, rows)))
        scores += [utility(subject, self.task(loaded, data)) for data in self.job.evaluate]
        if self.job.holdout:
            scores.append(privacy_leak(subject, forget, self.task(loaded, self.job.holdout), reference))
        return scores


def _set_aside(rows: list[Record], seed: int) -> tuple[list[Record], list[Record]]:
    """Records to train on, and a few kept aside as the yardstick of utility."""
    if len(rows) < 2:
        return rows, []
    count = max(1, min(_MOST_ASIDE, round(_ASIDE * len(rows))))
    aside = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for number, row in enumerate(rows) if number not in aside],
        [rows[number] for number in sorted(aside)],
    )


def _no_yardstick() -> Finding:
    text = (
        "there are no retain records, so nothing says how much utility is lost: the settings were used as "
        "they are. Give --retain, or --trials 0 to say that this is wanted."
    )
    return Finding(code="no-search", severity="warning", about="result", message=text)


def _over_budget(budget: float) -> Finding:
    text = f"no trial kept the utility within the budget of {budget:.0%}; the result is what lost least."
    return Finding(code="over-budget", severity="serious", about="result", message=text)


def _diverged(error: str) -> Finding:
    return Finding(code="diverged", severity="warning", about="a trial", message=error)
