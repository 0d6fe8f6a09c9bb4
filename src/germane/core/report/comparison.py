"""Scores and rows grouped: by subject, and by the method and settings they come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from germane.core.evidence import Evidence, Row, Score, Step
from germane.core.report.means import Mean, mean_over_seeds, mean_over_tasks
from germane.core.report.text import canonical, short, value_text

LOWER = " (lower is better)"


def directions_apart(evidence: Evidence) -> Evidence:
    """Rename a metric where lower is better if elsewhere higher is: their mean means nothing."""
    seen = {(score.metric, score.higher_is_better) for score in _all_scores(evidence)}
    mixed = {metric for metric, higher in seen if (metric, not higher) in seen}
    if not mixed:
        return evidence
    evidence = evidence.model_copy(deep=True)
    for score in _all_scores(evidence):
        if score.metric in mixed and not score.higher_is_better:
            score.metric += LOWER
    return evidence


def opposite(metric: str, metrics: Iterable[str]) -> str | None:
    """The same metric read the other way, if it is among `metrics`."""
    other = metric.removesuffix(LOWER) if metric.endswith(LOWER) else metric + LOWER
    return other if other in metrics else None


def by_subject(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """The scores of each subject: base, result and own first, then as they come."""
    found: dict[str, list[Score]] = {"base": [], "result": [], "own": []}
    for score in scores:
        found.setdefault(score.subject, []).append(score)
    return {subject: each for subject, each in found.items() if each}


def scores_by_task(row: Row, metric: str) -> dict[str, Score]:
    """The row's finite scores of one metric; a method's row counts its result, not its base."""
    scores = [score for score in row.scores if score.metric == metric]
    if row.status != "reference" and any(score.subject == "result" for score in scores):
        scores = [score for score in scores if score.subject == "result"]
    return {score.task: score for score in scores if math.isfinite(score.value)}


@dataclass(frozen=True)
class Group:
    """The rows of one method with the same settings: its seeds."""

    label: str
    rows: tuple[Row, ...]

    def mean(self, metric: str, tasks: Sequence[str]) -> Mean | None:
        """Mean over tasks and seeds, or None where no row has a finite score on every task."""
        found = [scores_by_task(row, metric) for row in self.rows]
        complete = [[scores[task] for task in tasks] for scores in found if scores.keys() >= set(tasks)]
        if not complete or not tasks:
            return None
        values = [fmean(score.value for score in scores) for scores in complete]
        if max(values) - min(values) < 1e-12:
            # Seeds that agree say nothing about the records: an interval of no width would lie.
            return mean_over_tasks(complete[0])
        return mean_over_seeds(values, metric)

    def task_value(self, metric: str, task: str) -> float | None:
        """Mean over the rows that have a finite score on the task."""
        found = [scores_by_task(row, metric).get(task) for row in self.rows]
        values = [score.value for score in found if score is not None]
        return fmean(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, grouped: methods and references apart.

    Attributes:
        metrics: All that occur, the one that methods are ranked by first.
        varying: For each method, the settings that differ among its rows.
    """

    groups: tuple[Group, ...]
    references: tuple[Group, ...]
    metrics: tuple[str, ...]
    varying: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, evidence: Evidence) -> Comparison:
        """Group the rows of `evidence` by method and settings."""
        attempts = [row for row in evidence.rows if row.status != "reference"]
        references = [row for row in evidence.rows if row.status == "reference"]
        varying = _varying_settings(attempts)
        whole = len({row.method.rpartition("/")[0] for row in attempts}) > 1
        groups: dict[str, list[Row]] = {}
        for row in attempts:
            key = canonical([row.method or row.label, _settings(row)])
            groups.setdefault(key, []).append(row)
        return cls(
            groups=tuple(Group(_label(rows[0], varying, whole), tuple(rows)) for rows in groups.values()),
            references=tuple(Group(row.label, (row,)) for row in references),
            metrics=tuple(dict.fromkeys(s.metric for row in (*attempts, *references) for s in row.scores)),
            varying=varying,
        )

    def tasks(self, metric: str) -> list[str]:
        """The tasks that any method, else any reference, was scored on."""
        for groups in (self.groups, self.references):
            tasks = dict.fromkeys(score.task for score in _scores(groups, metric))
            if tasks:
                return list(tasks)
        return []

    def higher_is_better(self, metric: str) -> bool:
        """How the metric is read."""
        return all(s.higher_is_better for s in _scores((*self.groups, *self.references), metric))

    def ranked(self, metric: str, references: bool = False) -> list[tuple[Group, Mean]]:
        """The methods, or the references, that have a score on every task, best first."""
        tasks = self.tasks(metric)
        found = [
            (each, each.mean(metric, tasks)) for each in (self.references if references else self.groups)
        ]
        means = [(group, mean) for group, mean in found if mean is not None]
        sign = -1.0 if self.higher_is_better(metric) else 1.0
        return sorted(means, key=lambda pair: sign * pair[1].value)

    def base(self, metric: str) -> Mean | None:
        """The mean of the reference that is the base."""
        for group, mean in self.ranked(metric, references=True):
            if group.label == "base" or any(s.subject == "base" for s in group.rows[0].scores):
                return mean
        return None


def settings_text(row: Row, varying: Mapping[str, Sequence[str]]) -> str:
    """Those of the row's settings that differ among the rows of its method."""
    names = [name for name in varying.get(row.method, ()) if name in row.settings]
    return ", ".join(f"{name} {value_text(row.settings[name])}" for name in names)


def _label(row: Row, varying: Mapping[str, Sequence[str]], whole: bool) -> str:
    name = (row.method if whole else short(row.method)) or row.label
    return ", ".join(filter(None, (name, settings_text(row, varying))))


def _varying_settings(rows: Sequence[Row]) -> dict[str, list[str]]:
    varying = {}
    for method in dict.fromkeys(row.method for row in rows):
        settings = [_settings(row) for row in rows if row.method == method]
        names = dict.fromkeys(name for each in settings for name in each)
        varying[method] = [
            name for name in names if len({canonical(each.get(name)) for each in settings}) > 1
        ]
    return varying


def _settings(row: Row) -> dict[str, object]:
    return {name: value for name, value in row.settings.items() if name != "seed"}


def _scores(groups: Iterable[Group], metric: str) -> list[Score]:
    return [s for group in groups for row in group.rows for s in row.scores if s.metric == metric]


def _all_scores(evidence: Evidence) -> list[Score]:
    parts: list[Step | Row] = [*evidence.steps, *evidence.rows]
    return [score for part in parts for score in part.scores]
