"""report.html: the evidence of a run or of a comparison, on one page that needs nothing else.

The page is one file: style, script and plots are inside, and a content security policy in its head
keeps the browser from loading or running anything more. The plots are SVG whose horizontal
coordinates are percentages of the plot's width and whose text has a fixed size, so that one plot
serves a wide window, a phone and paper.

Means over tasks get their 95 % interval by one of two rules, and the page says which:

- Several seeds: the t interval of the seeds' means.
- Otherwise: the tasks' own intervals, read as plus or minus 1.96 standard errors, the standard
  errors added in quadrature and divided by the number of tasks. One task keeps its own interval.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from germane.core.evidence import Evidence, Finding, Plot, Row, Score, Series, Share, Step, Table

FILE_NAME = "report.html"
TEMPLATE = "report.html.j2"

SEVERITIES = ("serious", "warning", "note")
SUBJECTS = ("base", "result", "own")
COLOURS = 7  # --series-0 to --series-6 in the style sheet
LABEL_LENGTH = 27
LINE_HEIGHT = 220
LANE = 14
ROW_GAP = 26
MANY_POINTS = 12

# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom.
STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
NORMAL_Z = 1.959963984540054

LOWER = " (lower is better)"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MINUS = "\N{MINUS SIGN}"
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_report(evidence: Evidence, folder: Path) -> Path:
    """Write `report.html` into `folder` and return its path.

    Links to the reports of a comparison's rows are made where those files exist in `folder`.
    """
    path = folder / FILE_NAME
    path.write_text(render(evidence, folder), encoding="utf-8")
    return path


def render(evidence: Evidence, folder: Path | None = None) -> str:
    """The page as text; `folder` is where the links of a comparison's rows are looked up."""
    environment = Environment(
        loader=PackageLoader("germane.core", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        sha256=_sha256, seconds=humanise_seconds, bytes=humanise_bytes, yaml=_yaml, paper=_paper
    )
    text = environment.get_template(TEMPLATE).render(page=_page(evidence, folder))
    return NOT_XML.sub("\ufffd", text)  # characters that SVG forbids even when escaped


# ---------------------------------------------------------------------------------------------
# The headline
# ---------------------------------------------------------------------------------------------


def headline(evidence: Evidence) -> str:
    """The finding in one sentence of plain words, worked out from the evidence."""
    evidence = _directions_apart(evidence)
    clauses = _compare_clauses(evidence) if evidence.rows else _run_clauses(evidence)
    serious = sum(finding.severity == "serious" for finding in evidence.findings)
    if serious:
        clauses.append(_count(serious, "serious finding"))
    return "; ".join(clauses)


def _directions_apart(evidence: Evidence) -> Evidence:
    """Rename a metric where lower is better if elsewhere higher is: their mean means nothing."""
    parts: list[Step | Row] = [*evidence.steps, *evidence.rows]
    seen = {(score.metric, score.higher_is_better) for part in parts for score in part.scores}
    mixed = {metric for metric, higher in seen if (metric, not higher) in seen}
    if not mixed:
        return evidence
    evidence = evidence.model_copy(deep=True)
    for part in [*evidence.steps, *evidence.rows]:
        for score in part.scores:
            if score.metric in mixed and not score.higher_is_better:
                score.metric += LOWER
    return evidence


def _opposite(metric: str, metrics: Iterable[str]) -> str | None:
    """The same metric read the other way, if it is among `metrics`."""
    other = metric.removesuffix(LOWER) if metric.endswith(LOWER) else metric + LOWER
    return other if other in metrics else None


def _run_clauses(evidence: Evidence) -> list[str]:
    if not evidence.steps:
        return [f"{evidence.title or 'This run'}: no step was recorded"]
    scored = next((step.scores for step in reversed(evidence.steps) if step.scores), [])
    pooled = next((step for step in reversed(evidence.steps) if step.shares), None)
    clauses = [*_score_clauses(scored), *_share_clauses(pooled)]
    if not clauses:
        last = evidence.steps[-1]
        clauses = [last.summary.rstrip(".") or "nothing was scored"]
    name = " then ".join(_short(step.method) or step.task for step in evidence.steps)
    return [f"{name}: {clauses[0]}", *clauses[1:]]


def _score_clauses(scores: Sequence[Score]) -> list[str]:
    """What the result scored in the first metric, read either way."""
    metrics = list(dict.fromkeys(score.metric for score in scores))
    first = metrics[:1]
    shown = [*first, *filter(None, (_opposite(metric, metrics) for metric in first))]
    clauses = []
    for metric in shown:
        clauses += _metric_clauses(metric, [score for score in scores if score.metric == metric])
    return clauses


def _metric_clauses(metric: str, scores: Sequence[Score]) -> list[str]:
    """What the result scored, and the base beside it on the same tasks."""
    by_subject = _by_subject(scores)
    others = [subject for subject in by_subject if subject not in ("base", "own")]
    subject = "result" if "result" in by_subject else next(iter(others or by_subject))
    ours = [score for score in by_subject[subject] if math.isfinite(score.value)]
    broken = _count(len(by_subject[subject]) - len(ours), "task")
    if not ours:
        return [f"no finite {metric} on any of {broken}"]
    missing = [f"no finite {metric} on {broken}"] if len(ours) < len(by_subject[subject]) else []
    if not others:
        return [f"only {subject} was scored: {_mean_phrase(metric, ours)}", *missing]
    ours, theirs = _on_shared_tasks(ours, by_subject.get("base", []))
    base = f", base {_mean_text(metric, theirs)}" if theirs else ""
    return [_mean_phrase(metric, ours) + base, *missing]


def _on_shared_tasks(
    ours: Sequence[Score], theirs: Sequence[Score]
) -> tuple[Sequence[Score], Sequence[Score]]:
    """Both sides on the tasks both have; ours as they are where there is no such task."""
    finite = [score for score in theirs if math.isfinite(score.value)]
    shared = {score.task for score in ours} & {score.task for score in finite}
    if not shared:
        return ours, []
    return (
        [score for score in ours if score.task in shared],
        [score for score in finite if score.task in shared],
    )


def _mean_phrase(metric: str, scores: Sequence[Score]) -> str:
    text = _mean_text(metric, scores)
    tasks = list(dict.fromkeys(score.task for score in scores))
    if len(tasks) == 1:
        return f"{metric} {text} on {tasks[0]}"
    return f"mean {metric} {text} over {len(tasks)} tasks"


def _mean_text(metric: str, scores: Sequence[Score]) -> str:
    return score_text(sum(score.value for score in scores) / len(scores), metric)


def _share_clauses(step: Step | None) -> list[str]:
    if step is None:
        return []
    taken = sum(share.taken for share in step.shares)
    noun = "checkpoint" if step.task == "merge" else "member"
    return [f"took {taken} of {_count(len(step.shares), noun)}"]


def _compare_clauses(evidence: Evidence) -> list[str]:
    comparison = Comparison.of(evidence)
    attempts = [row for row in evidence.rows if row.status != "reference"]
    failed = sum(row.status == "failed" for row in attempts)
    trouble = [f"{failed} of {_count(len(attempts), 'run')} failed"] if failed else []
    if not comparison.metrics:
        if failed == len(attempts) and failed:
            return [f"All {failed} runs failed" if failed > 1 else "The one run failed"]
        return [
            f"{_count(len(comparison.groups), 'method')} compared; nothing was scored",
            *trouble,
        ]
    metric = comparison.metrics[0]
    ranked = comparison.ranked(metric)
    if not ranked:
        missing = f"no method has a finite {metric} on every task"
        return [missing[0].upper() + missing[1:], *trouble]
    base, higher = comparison.base(metric), comparison.higher_is_better(metric)
    return [
        _winner_clause(metric, comparison.tasks(metric), ranked),
        *_base_clause(metric, ranked[0][1], base, higher),
        *_opposite_clause(comparison, metric, ranked[0][0]),
        *trouble,
    ]


def _winner_clause(metric: str, tasks: Sequence[str], ranked: Sequence[tuple[Group, Mean]]) -> str:
    group, best = ranked[0]
    value = score_text(best.value, metric)
    if math.isfinite(best.low) and math.isfinite(best.high):
        low, high = score_text(best.low, metric), score_text(best.high, metric)
        value += f" (95 % interval {low} to {high})"
    where = f"on {tasks[0]}" if len(tasks) == 1 else f"over {len(tasks)} tasks"
    mean = metric if len(tasks) == 1 else f"mean {metric}"
    if len(ranked) == 1:
        return f"{group.label}: {mean} {value} {where}"
    second, next_best = ranked[1]
    distance = abs(best.value - next_best.value)
    if float(score_text(distance, metric).replace(",", "")) == 0.0:
        return f"{group.label} and {second.label} are level: {mean} {value} {where}"
    gap = f"{score_text(distance, metric)} better than the next, {second.label}"
    overlap = best.low <= next_best.high and next_best.low <= best.high
    suffix = ", whose interval overlaps" if overlap else ""
    return f"{group.label} is best: {mean} {value} {where}, {gap}{suffix}"


def _base_clause(metric: str, best: Mean, base: Mean | None, higher: bool) -> list[str]:
    if base is None or not math.isfinite(base.value):
        return []
    ahead = best.value > base.value if higher else best.value < base.value
    text = score_text(base.value, metric)
    return [f"the base scores {text}" if ahead else f"no method beats the base ({text})"]


def _opposite_clause(comparison: Comparison, metric: str, best: Group) -> list[str]:
    """What the best method scored where the metric is read the other way."""
    other = _opposite(metric, comparison.metrics)
    mean = best.mean(other, comparison.tasks(other)) if other else None
    if other is None or mean is None:
        return []
    base = comparison.base(other)
    beside = f" (base {score_text(base.value, other)})" if base else ""
    way = "higher" if comparison.higher_is_better(other) else "lower"
    return [f"where {way} is better it scores {score_text(mean.value, other)}{beside}"]


# ---------------------------------------------------------------------------------------------
# Means and their intervals
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval; the ends are not a number where there is none.

    Attributes:
        rule: Where the interval comes from: "seeds", "tasks", or "task" for a single score.
        parts: The seeds' means, where there are several.
    """

    value: float
    low: float
    high: float
    rule: str
    parts: tuple[float, ...] = ()


def mean_over_tasks(scores: Sequence[Score]) -> Mean:
    """Mean of the scores; their standard errors are added in quadrature."""
    count = len(scores)
    value = sum(score.value for score in scores) / count
    if count == 1:
        return Mean(value, scores[0].low, scores[0].high, "task")
    squares = sum(((score.high - score.low) / 2) ** 2 for score in scores)
    half = math.sqrt(squares) / count if math.isfinite(squares) else math.nan
    return _clipped(Mean(value, value - half, value + half, "tasks"), scores[0].metric)


def mean_over_seeds(values: Sequence[float], metric: str) -> Mean:
    """Mean of at least two seeds' values with its t interval."""
    count = len(values)
    value = sum(values) / count
    variance = sum((part - value) ** 2 for part in values) / (count - 1)
    half = student_t(count - 1) * math.sqrt(variance / count)
    return _clipped(Mean(value, value - half, value + half, "seeds", tuple(values)), metric)


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t.

    Above 10 degrees of freedom by the Cornish-Fisher expansion, which is right to 0.001 there.
    """
    if freedom <= len(STUDENT_T):
        return STUDENT_T[freedom - 1]
    z = NORMAL_Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _clipped(mean: Mean, metric: str) -> Mean:
    if not _is_share(metric):
        return mean
    return Mean(mean.value, max(0.0, mean.low), min(1.0, mean.high), mean.rule, mean.parts)


def _is_share(metric: str) -> bool:
    return "accuracy" in metric.lower()


@dataclass(frozen=True)
class Group:
    """The rows of one method with the same settings: its seeds."""

    label: str
    rows: tuple[Row, ...]

    def complete(self, metric: str, tasks: Sequence[str]) -> list[list[Score]]:
        """For each row that has a finite score on every task: those scores, in tasks' order."""
        found = [_scores_by_task(row, metric) for row in self.rows]
        return [[scores[task] for task in tasks] for scores in found if set(tasks) <= set(scores)]

    def mean(self, metric: str, tasks: Sequence[str]) -> Mean | None:
        """Mean over tasks and seeds, or None where no row has a score on every task."""
        rows = self.complete(metric, tasks)
        if not rows or not tasks:
            return None
        if len(rows) == 1:
            return mean_over_tasks(rows[0])
        values = [sum(score.value for score in row) / len(row) for row in rows]
        if max(values) - min(values) < 1e-12:
            # Seeds that agree say nothing about the records: an interval of no width would lie.
            return mean_over_tasks(rows[0])
        return mean_over_seeds(values, metric)

    def task_value(self, metric: str, task: str) -> float | None:
        """Mean over the rows that have a finite score on the task."""
        found = [_scores_by_task(row, metric).get(task) for row in self.rows]
        values = [score.value for score in found if score is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, grouped: methods and references apart."""

    groups: tuple[Group, ...]
    references: tuple[Group, ...]
    metrics: tuple[str, ...]
    varying: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, evidence: Evidence) -> Comparison:
        """Group the rows of `evidence` by method and settings."""
        attempts = [row for row in evidence.rows if row.status != "reference"]
        references = [row for row in evidence.rows if row.status == "reference"]
        varying = _varying_settings(attempts)
        tasks = {row.method.rpartition("/")[0] for row in attempts}
        groups: dict[str, list[Row]] = {}
        labels: dict[str, str] = {}
        for row in attempts:
            key = _group_key(row)
            groups.setdefault(key, []).append(row)
            labels.setdefault(key, _group_label(row, varying, whole=len(tasks) > 1))
        ordered = [*attempts, *references]
        return cls(
            groups=tuple(Group(labels[key], tuple(rows)) for key, rows in groups.items()),
            references=tuple(Group(row.label, (row,)) for row in references),
            metrics=tuple(dict.fromkeys(s.metric for row in ordered for s in row.scores)),
            varying=varying,
        )

    def tasks(self, metric: str) -> list[str]:
        """The tasks that any method, else any reference, was scored on."""
        for groups in (self.groups, self.references):
            scores = [score for group in groups for row in group.rows for score in row.scores]
            tasks = dict.fromkeys(score.task for score in scores if score.metric == metric)
            if tasks:
                return list(tasks)
        return []

    def higher_is_better(self, metric: str) -> bool:
        """How the metric is read, as its first score says."""
        groups = (*self.groups, *self.references)
        scores = (score for group in groups for row in group.rows for score in row.scores)
        return next((s.higher_is_better for s in scores if s.metric == metric), True)

    def ranked(self, metric: str) -> list[tuple[Group, Mean]]:
        """The methods that have a score on every task, best first."""
        return self._sorted(self.groups, metric)

    def ranked_references(self, metric: str) -> list[tuple[Group, Mean]]:
        """The references that have a score on every task, best first."""
        return self._sorted(self.references, metric)

    def base(self, metric: str) -> Mean | None:
        """The mean of the reference that is the base."""
        for group, mean in self.ranked_references(metric):
            if group.label == "base" or any(s.subject == "base" for s in group.rows[0].scores):
                return mean
        return None

    def _sorted(self, groups: Sequence[Group], metric: str) -> list[tuple[Group, Mean]]:
        tasks = self.tasks(metric)
        found = [(group, group.mean(metric, tasks)) for group in groups]
        means = [(group, mean) for group, mean in found if mean is not None]
        sign = -1.0 if self.higher_is_better(metric) else 1.0
        return sorted(means, key=lambda pair: sign * pair[1].value)


def _scores_by_task(row: Row, metric: str) -> dict[str, Score]:
    """The row's finite scores of one metric; a method's row counts its result, not its base."""
    scores = [score for score in row.scores if score.metric == metric]
    if row.status != "reference" and any(score.subject == "result" for score in scores):
        scores = [score for score in scores if score.subject == "result"]
    return {score.task: score for score in scores if math.isfinite(score.value)}


def _varying_settings(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """For each method, the settings that differ among its rows."""
    varying: dict[str, tuple[str, ...]] = {}
    for method in dict.fromkeys(row.method for row in rows):
        settings = [row.settings for row in rows if row.method == method]
        names = dict.fromkeys(name for each in settings for name in each if name != "seed")
        seen = {name: {_canonical(each.get(name)) for each in settings} for name in names}
        varying[method] = tuple(name for name in names if len(seen[name]) > 1)
    return varying


def _group_key(row: Row) -> str:
    settings = {name: value for name, value in row.settings.items() if name != "seed"}
    return _canonical([row.method or row.label, settings])


def _group_label(row: Row, varying: Mapping[str, Sequence[str]], whole: bool) -> str:
    name = (row.method if whole else _short(row.method)) or row.label
    settings = _settings_text(row, varying)
    return f"{name}, {settings}" if settings else name


def _settings_text(row: Row, varying: Mapping[str, Sequence[str]]) -> str:
    names = [name for name in varying.get(row.method, ()) if name in row.settings]
    return ", ".join(f"{name} {_value_text(row.settings[name])}" for name in names)


# ---------------------------------------------------------------------------------------------
# Text of numbers
# ---------------------------------------------------------------------------------------------


def score_text(value: float, metric: str = "accuracy") -> str:
    """A score as it is printed: accuracies and other small numbers with 3 decimals."""
    if _is_share(metric) and math.isfinite(value):
        return f"{value + 0.0:.3f}"
    return number_text(value)


def number_text(value: float) -> str:
    """A number as it is printed in tables."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return _digits(value).replace("-", MINUS)


def _digits(value: float) -> str:
    size = abs(value)
    if isinstance(value, int):
        return f"{value:,}" if size >= 10_000 else str(value)
    if size != 0 and (size < 0.0005 or size >= 1e9):
        return f"{value:.2e}"
    decimals = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    return f"{value:,.{decimals}f}"


def humanise_seconds(value: float | None) -> str:
    """Seconds as people say them: `0.42 s`, `12.3 s`, `4 min 12 s`, `2 h 05 min`."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 1:
        return f"{value:.2f} s" if value >= 0.01 or value == 0 else f"{value * 1000:.1f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def humanise_bytes(value: float | None) -> str:
    """Bytes with a binary unit: `512 B`, `1.5 GiB`."""
    if value is None or not math.isfinite(value):
        return "–"
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while abs(value) >= 1023.95 and power < len(units) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.0f} B" if power == 0 else f"{value:.1f} {units[power]}"


def _tick_text(value: float, step: float) -> str:
    if step >= 1e5:
        text = f"{value / 1e6:g}M"
    elif step < 1e-4:
        text = f"{value:.6g}"
    else:
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        text = f"{value + 0.0:,.{decimals}f}"
    return text.replace("-", MINUS)


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else _canonical(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _short(method: str) -> str:
    return method.rpartition("/")[2]


def _cut(text: str, length: int = LABEL_LENGTH) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _canonical(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The value with anything but mappings, lists, texts and numbers turned into text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_plain(item) for item in items]
    return value if value is None or type(value) in (str, int, float, bool) else str(value)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True, width=88)


def _paper(text: str) -> Markup:
    """The paper, linked where it is an arXiv number or a web address."""
    found = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})(v\d+)?", text, flags=re.IGNORECASE)
    address = f"https://arxiv.org/abs/{found[1]}" if found else text
    if not re.match(r"https?://", address):
        return escape(text)
    return _tag("a", text, href=address, rel="noreferrer")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---------------------------------------------------------------------------------------------
# Scales
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """An axis: what range it shows, and where its ticks are.

    A logarithmic scale keeps its ends and ticks as powers of ten, in `low`, `high` and `ticks`
    as they are read.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float
    logarithmic: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float], *, count: int = 5, whole: bool = False, share: bool = False
    ) -> Scale:
        """A scale whose ends are round numbers around the finite ones of `values`.

        Args:
            values: What must be visible.
            count: About how many ticks.
            whole: Whether ticks are whole numbers.
            share: Whether values are between 0 and 1, so that the scale ends there too.
        """
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if high - low <= 1e-12 * max(1.0, abs(high)):
            pad = 0.5 if whole else abs(high) * 0.1 or 1.0
            low, high = low - pad, high + pad
        step = _round_step((high - low) / count)
        step = max(1.0, step) if whole else step
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if share and min(finite) >= 0 and max(finite) <= 1:
            first, last = max(first, 0), min(last, round(1 / step))
        first, last = (first, last) if first < last else (first, first + 1)
        ticks = tuple(round(index * step, 12) for index in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks, step)

    @classmethod
    def powers(cls, values: Iterable[float]) -> Scale:
        """A logarithmic scale over positive values, with ticks at powers of ten."""
        finite = [value for value in values if math.isfinite(value)]
        first = math.floor(math.log10(min(finite)) + 1e-9)
        last = max(first + 1, math.ceil(math.log10(max(finite)) - 1e-9))
        stride = max(1, math.ceil((last - first) / 5))
        last = first + math.ceil((last - first) / stride) * stride
        ticks = tuple(10.0**power for power in range(first, last + 1, stride))
        return cls(ticks[0], ticks[-1], ticks, 0.0, logarithmic=True)

    def part(self, value: float) -> float:
        """Where the value lies: 0 at the low end, 1 at the high end; never outside."""
        if self.logarithmic:
            span = math.log10(self.high) - math.log10(self.low)
            place = (math.log10(value) - math.log10(self.low)) / span
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, place))

    def percent(self, value: float) -> str:
        """`part` as an SVG length."""
        return f"{_trim(100 * self.part(value))}%"

    def text(self, tick: float) -> str:
        """The label of a tick."""
        if self.logarithmic:
            plain = 1e-3 <= self.low and self.high <= 1e5
            power = str(round(math.log10(tick))).translate(SUPERSCRIPTS)
            return f"{tick:,g}" if plain else f"10{power}"
        return _tick_text(tick, self.step)


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _trim(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


# ---------------------------------------------------------------------------------------------
# SVG
# ---------------------------------------------------------------------------------------------


def _tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element; children that are not Markup and all attributes are escaped."""
    text = Markup("").join(Markup(' {}="{}"').format(_name(k), v) for k, v in attributes.items())
    inside = Markup("").join(c if isinstance(c, Markup) else escape(c) for c in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), text, inside)


def _name(keyword: str) -> Markup:
    return Markup(keyword.rstrip("_").replace("_", "-"))


def _svg(title: str, description: str, height: float, content: Iterable[str]) -> Markup:
    return _tag(
        "svg",
        _tag("title", title),
        _tag("desc", description),
        *content,
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        width="100%",
        height=_trim(height),
    )


SHAPES = {
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "square": "M-4.5 -4.5h9v9h-9z",
    "diamond": "M0 -6l6 6l-6 6l-6 -6z",
    "triangle": "M0 -6l6 10.5h-12z",
}


@dataclass(frozen=True)
class Look:
    """How a subject is drawn: a class of the style sheet and a shape."""

    style: str
    shape: str


def _looks(subjects: Sequence[str]) -> dict[str, Look]:
    looks = {
        "base": Look("base", "square"),
        "result": Look("result", "circle"),
        "own": Look("own", "diamond"),
    }
    shapes = ("triangle", "circle", "square", "diamond")
    others = [subject for subject in subjects if subject not in looks]
    for index, subject in enumerate(others):
        style = f"series-{1 + index % (COLOURS - 1)}"
        looks[subject] = Look(style, shapes[index % len(shapes)])
    return {subject: looks[subject] for subject in subjects}


@dataclass(frozen=True)
class Mark:
    """One dot with its whisker, and the small marks of its seeds."""

    look: Look
    value: float
    low: float
    high: float
    title: str
    parts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Lane:
    """One row of a dot plot: a label, its marks one under the other, and a number at the right."""

    label: str
    marks: tuple[Mark, ...]
    text: str = ""
    rule: bool = False  # whether a line sets the row apart from the one above


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    swatch: Markup
    label: str


@dataclass(frozen=True)
class Figure:
    """A plot with what stands around it."""

    kind: str
    title: str
    svg: Markup
    legend: tuple[Key, ...] = ()
    above: str = ""
    below: str = ""
    note: str = ""


def dot_plot(
    title: str, axis: str, lanes: Sequence[Lane], *, share: bool, line: float | None = None
) -> Markup:
    """Dots with whiskers, one lane for each label; `line` is a value marked in all lanes.

    Horizontal coordinates are percentages of the plot's width. Values that are not finite are
    left out by the caller; whisker ends that are not finite make a dot without whisker.
    """
    marks = [mark for lane in lanes for mark in lane.marks]
    ends = [end for mark in marks for end in (mark.value, mark.low, mark.high, *mark.parts)]
    scale = Scale.over([*ends, *([] if line is None else [line])], share=share)
    tops = [0.0]
    for lane in lanes:
        tops.append(tops[-1] + ROW_GAP + LANE * max(1, len(lane.marks)))
    height = tops[-1] + 8
    content = [*_vertical_grid(scale, height)]
    if line is not None:
        place = scale.percent(line)
        content.append(_tag("line", x1=place, x2=place, y1=0, y2=_trim(height), class_="reference"))
    for lane, top, bottom in zip(lanes, tops, tops[1:], strict=False):
        content += _lane(lane, scale, top, bottom)
    description = f"{axis}. " + "; ".join(mark.title for mark in marks)
    return _svg(title, description, height, content)


def _vertical_grid(scale: Scale, height: float) -> list[Markup]:
    parts = []
    for tick in scale.ticks:
        place = scale.percent(tick)
        parts.append(_tag("line", x1=place, x2=place, y1=0, y2=_trim(height), class_="grid"))
        label = _tag("text", scale.text(tick), x=place, y=_trim(height + 18), class_="tick middle")
        parts.append(label)
    return parts


def _lane(lane: Lane, scale: Scale, top: float, bottom: float) -> list[Markup]:
    first = top + ROW_GAP - 4 + LANE / 2
    middle = first + LANE * (max(1, len(lane.marks)) - 1) / 2
    parts = []
    if lane.rule:
        parts.append(
            _tag("line", x1=0, x2="100%", y1=_trim(top + 2), y2=_trim(top + 2), class_="rule")
        )
    label = (_tag("title", lane.label), _tag("tspan", _cut(lane.label)))
    # Two places for the label, beside and above the dots; the style sheet shows one by width.
    parts.append(_tag("text", *label, x=-14, y=_trim(middle + 4), class_="label beside"))
    parts.append(_tag("text", *label, x=0, y=_trim(top + 16), class_="label above"))
    for index, mark in enumerate(lane.marks):
        parts.append(_mark(mark, scale, first + LANE * index))
    if lane.text:
        inside = _tag("tspan", lane.text, dx=12)
        parts.append(_tag("text", inside, x="100%", y=_trim(middle + 4), class_="value"))
    return parts


def _mark(mark: Mark, scale: Scale, y: float) -> Markup:
    parts = [_tag("title", mark.title)]
    if math.isfinite(mark.low) and math.isfinite(mark.high):
        ends = {"x1": scale.percent(mark.low), "x2": scale.percent(mark.high)}
        parts.append(_tag("line", **ends, y1=_trim(y), y2=_trim(y), class_="whisker"))
    for part in mark.parts:
        place = scale.percent(part)
        parts.append(
            _tag("line", x1=place, x2=place, y1=_trim(y + 7), y2=_trim(y + 13), class_="seed")
        )
    dot = _tag("path", d=SHAPES[mark.look.shape])
    parts.append(_tag("svg", dot, x=scale.percent(mark.value), y=_trim(y), class_="dot"))
    return _tag("g", *parts, class_=f"mark {mark.look.style}")


def _dot_key(look: Look, label: str) -> Key:
    dot = _tag("g", _tag("path", d=SHAPES[look.shape]), transform="translate(14 8)", class_="dot")
    whisker = _tag("line", x1=0, x2=28, y1=8, y2=8, class_="whisker")
    return _swatch(_tag("g", whisker, dot, class_=f"mark {look.style}"), label)


def _swatch(content: Markup, label: str) -> Key:
    attributes = {"width": 28, "height": 16, "aria_hidden": "true", "class_": "swatch"}
    return Key(_tag("svg", content, **attributes), label)


def line_figure(plot: Plot) -> Figure | None:
    """The lines of a plot, or None where none of its values is finite.

    Up to seven series have a colour and a dash of their own. Of more, those that end highest do,
    and the others are grey.
    """
    points = {index: _finite_points(series) for index, series in enumerate(plot.series)}
    points = {index: found for index, found in points.items() if found}
    if not points:
        return None
    values = [y for found in points.values() for _, y in found]
    steps = [x for found in points.values() for x, _ in found]
    horizontal = Scale.over(steps, whole=all(float(step).is_integer() for step in steps))
    vertical = _value_scale(values)
    coloured = sorted(points, key=lambda index: -points[index][-1][1])[:COLOURS]
    styles = {index: f"series-{place}" for place, index in enumerate(sorted(coloured))}
    drawn = sorted(points, key=lambda index: index in styles)
    content = [*_horizontal_grid(vertical), *_bottom_ticks(horizontal)]
    for index in drawn:
        style = styles.get(index, "series-rest")
        content.append(_line(plot.series[index], horizontal, vertical, style))
    described = [_series_text(plot.series[index].name, points[index]) for index in points]
    description = f"{plot.y} by {plot.x}. " + "; ".join(described)
    dropped = sum(len(series.values) for series in plot.series) - len(values)
    return Figure(
        kind="lines",
        title=plot.title,
        svg=_svg(plot.title, description, LINE_HEIGHT, content),
        legend=_line_legend(plot, points, styles),
        above=plot.y + (" (logarithmic scale)" if vertical.logarithmic else ""),
        below=plot.x,
        note=_dropped_note(dropped),
    )


def _finite_points(series: Series) -> list[tuple[float, float]]:
    pairs = zip(series.steps, series.values, strict=False)
    return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def _value_scale(values: Sequence[float]) -> Scale:
    low, high = min(values), max(values)
    if low > 0 and high / low > 1000:
        return Scale.powers(values)
    near_zero = 0 < low < 0.4 * high
    share = low >= 0 and high <= 1 and high > 0.5
    return Scale.over([*values, *([0.0] if near_zero else [])], share=share)


def _horizontal_grid(scale: Scale) -> list[Markup]:
    parts = []
    for tick in scale.ticks:
        y = LINE_HEIGHT * (1 - scale.part(tick))
        parts.append(_tag("line", x1=0, x2="100%", y1=_trim(y), y2=_trim(y), class_="grid"))
        parts.append(_tag("text", scale.text(tick), x=-8, y=_trim(y + 4), class_="tick end"))
    return parts


def _bottom_ticks(scale: Scale) -> list[Markup]:
    parts = []
    for tick in scale.ticks:
        place = scale.percent(tick)
        ends = {"x1": place, "x2": place, "y1": LINE_HEIGHT, "y2": LINE_HEIGHT + 5}
        parts.append(_tag("line", **ends, class_="rule"))
        y = LINE_HEIGHT + 19
        parts.append(_tag("text", scale.text(tick), x=place, y=y, class_="tick middle"))
    return [*parts, _tag("line", x1=0, x2="100%", y1=LINE_HEIGHT, y2=LINE_HEIGHT, class_="rule")]


def _line(series: Series, horizontal: Scale, vertical: Scale, style: str) -> Markup:
    parts = [_tag("title", series.name)]
    stretches = _stretches(series)
    paths = [
        "M"
        + "L".join(
            f"{_trim(100 * horizontal.part(x))} {_trim(LINE_HEIGHT * (1 - vertical.part(y)))}"
            for x, y in stretch
        )
        for stretch in stretches
        if len(stretch) > 1
    ]
    if paths:
        parts.append(_stretched_path("".join(paths)))
    few = len(series.values) <= MANY_POINTS and style != "series-rest"
    dots = [point for stretch in stretches for point in stretch if few or len(stretch) == 1]
    for x, y in dots:
        place = {"cx": horizontal.percent(x), "cy": _trim(LINE_HEIGHT * (1 - vertical.part(y)))}
        parts.append(_tag("circle", **place, r=2.5))
    return _tag("g", *parts, class_=f"line {style}")


def _stretched_path(path: str) -> Markup:
    """A path in a box of 100 by the plot's height, stretched to the plot's width."""
    return _tag(
        "svg",
        _tag("path", d=path, vector_effect="non-scaling-stroke"),
        viewBox=f"0 0 100 {LINE_HEIGHT}",
        preserveAspectRatio="none",
        width="100%",
        height=LINE_HEIGHT,
    )


def _stretches(series: Series) -> list[list[tuple[float, float]]]:
    """The points, broken where a value is not finite."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.steps, series.values, strict=False):
        if math.isfinite(x) and math.isfinite(y):
            stretches[-1].append((x, y))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _line_legend(
    plot: Plot, points: Mapping[int, object], styles: Mapping[int, str]
) -> tuple[Key, ...]:
    keys = [(style, plot.series[index].name) for index, style in styles.items()]
    rest = [plot.series[index].name for index in points if index not in styles]
    if rest:
        keys.append(("series-rest", "grey: " + ", ".join(rest)))
    path = _tag("path", d="M0 8H28")
    return tuple(_swatch(_tag("g", path, class_=f"line {style}"), name) for style, name in keys)


def _series_text(name: str, points: Sequence[tuple[float, float]]) -> str:
    (first, start), (last, end) = points[0], points[-1]
    if len(points) == 1:
        return f"{name}: {number_text(start)} at {first:g}"
    return f"{name}: {number_text(start)} at {first:g}, {number_text(end)} at {last:g}"


def _dropped_note(count: int) -> str:
    if not count:
        return ""
    verb = "is" if count == 1 else "are"
    return f"{_count(count, 'value')} that {verb} not a finite number {verb} left out of the plot."


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One cell: what is printed, what it is sorted by, and what stands small beside it."""

    text: str
    sort: float | str = ""
    detail: str = ""
    link: str = ""
    span: int = 1
    heat: float | None = None
    best: bool = False
    style: str = ""


@dataclass(frozen=True)
class Body:
    """Rows that stand together under an optional heading."""

    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    style: str = ""


@dataclass(frozen=True)
class Grid:
    """A table of the page; only the first body is sorted."""

    title: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    bodies: tuple[Body, ...]
    note: str = ""
    style: str = ""


def table_grid(table: Table) -> Grid | None:
    """A table of the evidence as it is, or None where it has no rows."""
    if not table.rows:
        return None
    width = max(len(table.columns), *(len(row) for row in table.rows))
    columns = [*table.columns, *[""] * (width - len(table.columns))]
    rows = [[*row, *[None] * (width - len(row))] for row in table.rows]
    numeric = tuple(
        all(isinstance(row[place], (int, float)) or row[place] is None for row in rows)
        for place in range(width)
    )
    cells = tuple(tuple(_value_cell(value) for value in row) for row in rows)
    return Grid(table.title, tuple(columns), numeric, (Body(cells),))


def _value_cell(value: str | float | None) -> Cell:
    if value is None:
        return Cell("–")
    if isinstance(value, str):
        return Cell(value, sort=value)
    return Cell(number_text(value), sort=_sort_key(value))


def _sort_key(value: float | None) -> float | str:
    return value if value is not None and math.isfinite(value) else ""


def _score_cell(score: Score | None) -> Cell:
    if score is None:
        return Cell("–")
    text = score_text(score.value, score.metric)
    return Cell(text, sort=_sort_key(score.value), detail=_interval_text(score, score.metric))


def _interval_text(interval: Score | Mean, metric: str) -> str:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ""
    return f"{score_text(interval.low, metric)}–{score_text(interval.high, metric)}"


# ---------------------------------------------------------------------------------------------
# The parts of the page
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricPart:
    """Everything about one metric: a plot and tables."""

    metric: str
    figure: Figure | None
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class ShareBar:
    """One bar of the shares."""

    member: str
    percent: str
    text: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class StepPart:
    """One step of a run."""

    step: Step
    title: str
    metrics: tuple[MetricPart, ...]
    shares: tuple[ShareBar, ...]
    figures: tuple[Figure, ...]
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Page:
    """What the template prints."""

    title: str
    kicker: str
    headline: str
    evidence: Evidence
    findings: tuple[Finding, ...]
    summary: tuple[tuple[str, str], ...]
    versions: Mapping[str, str]
    rows: Grid | None
    metrics: tuple[MetricPart, ...]
    steps: tuple[StepPart, ...]
    figures: tuple[Figure, ...]
    grids: tuple[Grid, ...]


def _page(evidence: Evidence, folder: Path | None) -> Page:
    evidence = _directions_apart(evidence)
    sentence = headline(evidence)
    comparison = Comparison.of(evidence)
    several = len(evidence.steps) > 1
    return Page(
        title=evidence.title or sentence,
        kicker=evidence.title,
        headline=sentence,
        evidence=evidence,
        findings=tuple(sorted(evidence.findings, key=lambda f: SEVERITIES.index(f.severity))),
        summary=_summary(evidence),
        versions={
            **({"germane": evidence.germane} if evidence.germane else {}),
            **evidence.versions,
        },
        rows=_rows_grid(evidence.rows, comparison, folder),
        metrics=tuple(_compare_part(comparison, metric) for metric in comparison.metrics),
        steps=tuple(
            _step_part(step, f"Step {place}: {step.method or step.task}" if several else "")
            for place, step in enumerate(evidence.steps, start=1)
        ),
        figures=_figures(evidence.plots),
        grids=_grids(evidence.tables),
    )


def _summary(evidence: Evidence) -> tuple[tuple[str, str], ...]:
    """The few facts that stand under the headline."""
    if evidence.rows:
        attempts = [row for row in evidence.rows if row.status != "reference"]
        seeds = {row.seed for row in attempts if row.seed is not None}
        seconds = [row.seconds for row in attempts]
        memory = [row.peak_memory_bytes for row in evidence.rows]
        counts = [("runs", str(len(attempts)))] if attempts else []
        counts += [("seeds", str(len(seeds)))] if seeds else []
    else:
        seconds = [step.seconds for step in evidence.steps]
        memory = [step.peak_memory_bytes for step in evidence.steps]
        seeds = {step.seed for step in evidence.steps}
        counts = [("seed", ", ".join(str(seed) for seed in sorted(seeds)))] if seeds else []
    spent = sum(value for value in seconds if value)
    largest = max((value for value in memory if value), default=0)
    times = [("time", humanise_seconds(spent))] if spent else []
    sizes = [("peak memory", humanise_bytes(largest))] if largest else []
    made = [("germane", evidence.germane)] if evidence.germane else []
    return (*counts, *times, *sizes, *made)


def _step_part(step: Step, title: str) -> StepPart:
    metrics = dict.fromkeys(score.metric for score in step.scores)
    return StepPart(
        step=step,
        title=title,
        metrics=tuple(
            _scores_part(metric, [score for score in step.scores if score.metric == metric])
            for metric in metrics
        ),
        shares=_share_bars(step.shares),
        figures=_figures(step.plots),
        grids=_grids(step.tables),
    )


def _figures(plots: Iterable[Plot]) -> tuple[Figure, ...]:
    return tuple(figure for figure in map(line_figure, plots) if figure is not None)


def _grids(tables: Iterable[Table]) -> tuple[Grid, ...]:
    return tuple(grid for grid in map(table_grid, tables) if grid is not None)


def _by_subject(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """The scores of each subject: base, result and own first, then as they come."""
    found: dict[str, list[Score]] = {subject: [] for subject in SUBJECTS}
    for score in scores:
        found.setdefault(score.subject, []).append(score)
    return {subject: each for subject, each in found.items() if each}


# --- Scores of a run


def _scores_part(metric: str, scores: Sequence[Score]) -> MetricPart:
    return MetricPart(
        metric=metric,
        figure=_scores_figure(metric, scores),
        grids=(_scores_grid(metric, scores),),
    )


def _scores_figure(metric: str, scores: Sequence[Score]) -> Figure | None:
    finite = [score for score in scores if math.isfinite(score.value)]
    if not finite:
        return None
    by_subject = _by_subject(finite)
    looks = _looks(list(by_subject))
    tasks = list(dict.fromkeys(score.task for score in finite))
    lanes = [_mean_lane(metric, tasks, by_subject, looks)] if len(tasks) > 1 else []
    lanes = [lane for lane in lanes if lane.marks]
    for place, task in enumerate(tasks):
        here = {name: [s for s in each if s.task == task] for name, each in by_subject.items()}
        marks = tuple(_score_mark(s, looks[s.subject]) for each in here.values() for s in each)
        lanes.append(Lane(task, marks, _lane_text(metric, here), rule=place == 0 and bool(lanes)))
    note = "Whiskers are 95 % intervals."
    if len(lanes) > len(tasks):
        note += " The mean's comes from the tasks' own, their standard errors added in quadrature."
    names = {"own": "own (each member on its own task)"}
    title = _titled(f"{_sentence(metric)} on each task", scores[0].higher_is_better)
    return Figure(
        kind="dots",
        title=title,
        svg=dot_plot(title, metric, lanes, share=_is_share(metric)),
        legend=tuple(_dot_key(looks[name], names.get(name, name)) for name in looks),
        below=metric,
        note=" ".join(filter(None, [note, _dropped_note(len(scores) - len(finite))])),
    )


def _mean_lane(
    metric: str,
    tasks: Sequence[str],
    by_subject: Mapping[str, Sequence[Score]],
    looks: Mapping[str, Look],
) -> Lane:
    """The means of those subjects that have a score on every task: others do not compare."""
    marks, text = [], ""
    for subject, scores in by_subject.items():
        if {score.task for score in scores} != set(tasks):
            continue
        mean = mean_over_tasks(scores)
        marks.append(_mean_mark(mean, looks[subject], f"mean over tasks, {subject}", metric))
        text = score_text(mean.value, metric) if subject == "result" else text
    return Lane("mean over tasks", tuple(marks), text)


def _lane_text(metric: str, scores: Mapping[str, Sequence[Score]]) -> str:
    results = scores.get("result", [])
    return score_text(results[0].value, metric) if len(results) == 1 else ""


def _score_mark(score: Score, look: Look) -> Mark:
    interval = _interval_text(score, score.metric)
    title = f"{score.task}, {score.subject}: {score_text(score.value, score.metric)}"
    title += f" ({interval}, n {score.n})" if interval else f" (n {score.n})"
    return Mark(look, score.value, score.low, score.high, title)


def _mean_mark(mean: Mean, look: Look, name: str, metric: str) -> Mark:
    interval = _interval_text(mean, metric)
    title = f"{name}: {score_text(mean.value, metric)}" + (f" ({interval})" if interval else "")
    return Mark(look, mean.value, mean.low, mean.high, title, mean.parts)


def _scores_grid(metric: str, scores: Sequence[Score]) -> Grid:
    by_subject = _by_subject(scores)
    tasks = dict.fromkeys(score.task for score in scores)
    rows = []
    for task in tasks:
        cells = [Cell(task, sort=task)]
        for subject in by_subject:
            here = [score for score in by_subject[subject] if score.task == task]
            cells.append(_joined(here))
        counts = sorted({score.n for score in scores if score.task == task})
        cells.append(Cell(", ".join(f"{count:,}" for count in counts), sort=counts[0]))
        rows.append(tuple(cells))
    columns = ("task", *by_subject, "n")
    return Grid("", columns, (False, *[True] * (len(columns) - 1)), (Body(tuple(rows)),))


def _joined(scores: Sequence[Score]) -> Cell:
    """One cell for the scores of a subject on a task; almost always one, or none."""
    if len(scores) < 2:
        return _score_cell(scores[0] if scores else None)
    text = ", ".join(score_text(score.value, score.metric) for score in scores)
    return Cell(text, sort=_sort_key(scores[0].value))


def _titled(title: str, higher: bool) -> str:
    return title if higher or LOWER in title else title + LOWER


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- Shares


def _share_bars(shares: Sequence[Share]) -> tuple[ShareBar, ...]:
    finite = [share.share for share in shares if math.isfinite(share.share)]
    rest = 1.0 - sum(finite)
    largest = max([*finite, rest], default=0.0) or 1.0
    ordered = sorted(shares, key=lambda s: -s.share if math.isfinite(s.share) else math.inf)
    bars = [
        ShareBar(
            member=share.member,
            percent=_bar_percent(share.share, largest),
            text=score_text(share.share),
            verdict="taken" if share.taken else "left",
            reason=share.reason,
        )
        for share in ordered
    ]
    listed = any(share.member == "base" for share in shares)
    if len(finite) == len(shares) and shares and not listed and 0.0005 <= rest <= 1.0:
        bars.append(ShareBar("base", _bar_percent(rest, largest), score_text(rest), "rest", ""))
    return tuple(bars)


def _bar_percent(value: float, largest: float) -> str:
    return f"{_trim(100 * min(1.0, max(0.0, value / largest)))}%" if math.isfinite(value) else "0%"


# --- A comparison


def _compare_part(comparison: Comparison, metric: str) -> MetricPart:
    return MetricPart(
        metric=metric,
        figure=_compare_figure(comparison, metric),
        grids=tuple(grid for grid in [_heat_grid(comparison, metric)] if grid is not None),
    )


def _compare_figure(comparison: Comparison, metric: str) -> Figure | None:
    ranked = comparison.ranked(metric)
    references = comparison.ranked_references(metric)
    if not ranked:
        return None
    looks = {"method": Look("result", "circle"), "reference": Look("base", "square")}
    lanes = [_group_lane(group, mean, looks["method"], metric) for group, mean in ranked]
    for place, (group, mean) in enumerate(references):
        lane = _group_lane(group, mean, looks["reference"], metric)
        lanes.append(Lane(lane.label, lane.marks, lane.text, rule=place == 0))
    base, tasks = comparison.base(metric), comparison.tasks(metric)
    axis = f"mean {metric} over {len(tasks)} tasks" if len(tasks) > 1 else f"{metric} on {tasks[0]}"
    title = _titled(f"{_sentence(axis)}, by method", comparison.higher_is_better(metric))
    line = None if base is None else base.value
    missing = [group.label for group in comparison.groups if group.mean(metric, tasks) is None]
    note = _rule_note([*ranked, *references])
    if missing:
        note += f" Not shown, for want of a finite score on every task: {', '.join(missing)}."
    return Figure(
        kind="dots",
        title=title,
        svg=dot_plot(title, axis, lanes, share=_is_share(metric), line=line),
        legend=_compare_legend(looks, [*ranked, *references], line is not None),
        below=axis,
        note=note,
    )


def _compare_legend(
    looks: Mapping[str, Look], drawn: Sequence[tuple[Group, Mean]], line: bool
) -> tuple[Key, ...]:
    references = any(group.rows[0].status == "reference" for group, _ in drawn)
    kinds = ["method", "reference"] if references else ["method"]
    keys = [_dot_key(looks[kind], kind) for kind in kinds]
    if any(mean.parts for _, mean in drawn):
        ticks = [_tag("line", x1=x, x2=x, y1=5, y2=11, class_="seed") for x in (7, 14, 21)]
        keys.append(_swatch(_tag("g", *ticks, class_="mark result"), "each seed"))
    if line:
        dashes = _tag("line", x1=14, x2=14, y1=0, y2=16, class_="reference")
        keys.append(_swatch(dashes, "the base's mean"))
    return tuple(keys)


def _group_lane(group: Group, mean: Mean, look: Look, metric: str) -> Lane:
    mark = _mean_mark(mean, look, group.label, metric)
    return Lane(group.label, (mark,), score_text(mean.value, metric))


def _rule_note(ranked: Sequence[tuple[Group, Mean]]) -> str:
    """Under the plot: which rule each method's interval comes from."""
    texts = {
        "seeds": "t intervals over seeds",
        "tasks": "from the tasks' own intervals, standard errors added in quadrature",
        "task": "the score's own interval",
    }
    rules: dict[str, list[str]] = {}
    for group, mean in ranked:
        rules.setdefault(mean.rule, []).append(group.label)
    if len(rules) == 1:
        return f"Whiskers are 95 % intervals: {texts[next(iter(rules))]}."
    parts = [f"{texts[rule]} for {', '.join(labels)}" for rule, labels in rules.items()]
    return f"Whiskers are 95 % intervals: {'; '.join(parts)}."


def _heat_grid(comparison: Comparison, metric: str) -> Grid | None:
    """Methods by tasks, each cell shaded by its place between the worst and best of its column."""
    tasks = comparison.tasks(metric)
    groups = [g for g in comparison.groups if any(_scores_by_task(r, metric) for r in g.rows)]
    references = [
        group
        for group in comparison.references
        if any(group.task_value(metric, task) is not None for task in tasks)
    ]
    if len(tasks) < 2 or not groups:
        return None
    place = {id(group): index for index, (group, _) in enumerate(comparison.ranked(metric))}
    groups.sort(key=lambda group: place.get(id(group), len(place)))
    heats = {task: _heats(comparison, metric, task, groups, references) for task in tasks}
    bodies = [Body(tuple(_heat_row(group, tasks, metric, heats) for group in groups))]
    if references:
        rows = tuple(_heat_row(group, tasks, metric, heats) for group in references)
        bodies.append(Body(rows, title="For reference", style="reference"))
    seeds = any(len(group.rows) > 1 for group in groups)
    return Grid(
        title=_titled(
            f"{_sentence(metric)} of each method on each task",
            comparison.higher_is_better(metric),
        ),
        columns=("method", *tasks),
        numeric=(False, *[True] * len(tasks)),
        bodies=tuple(bodies),
        note=("Means over seeds. " if seeds else "")
        + "Shaded from the worst of a column to its best, the best method bold.",
        style="heat",
    )


@dataclass(frozen=True)
class Heat:
    """The range of one column and its best method's value."""

    worst: float
    best: float
    winner: float

    def part(self, value: float) -> float:
        """0 for the worst, 1 for the best."""
        span = self.best - self.worst
        return (value - self.worst) / span if span else 0.5


def _heats(
    comparison: Comparison,
    metric: str,
    task: str,
    groups: Sequence[Group],
    references: Sequence[Group],
) -> Heat | None:
    ours = [v for g in groups if (v := g.task_value(metric, task)) is not None]
    every = [v for g in references if (v := g.task_value(metric, task)) is not None] + ours
    if not ours:
        return None
    better, worse = (max, min) if comparison.higher_is_better(metric) else (min, max)
    return Heat(worse(every), better(every), better(ours))


def _heat_row(
    group: Group, tasks: Sequence[str], metric: str, heats: Mapping[str, Heat | None]
) -> tuple[Cell, ...]:
    cells = [Cell(group.label, sort=group.label)]
    for task in tasks:
        value, heat = group.task_value(metric, task), heats[task]
        if value is None or heat is None:
            cells.append(Cell("–"))
            continue
        best = group.rows[0].status != "reference" and value == heat.winner
        text = score_text(value, metric)
        cells.append(Cell(text, sort=value, heat=round(heat.part(value), 3), best=best))
    return tuple(cells)


def _rows_grid(rows: Sequence[Row], comparison: Comparison, folder: Path | None) -> Grid | None:
    if not rows:
        return None
    layout = RowLayout.of(rows, comparison)
    by_status: dict[str, list[Row]] = {"done": [], "failed": [], "reference": []}
    for row in rows:
        by_status[row.status].append(row)
    by_status["done"].sort(key=layout.order)
    bodies = []
    for status, title in (("done", ""), ("failed", "Failed"), ("reference", "For reference")):
        found = tuple(layout.cells(row, folder) for row in by_status[status])
        if found:
            bodies.append(Body(found, title=title, style=status))
    return Grid("", layout.columns, layout.numeric, tuple(bodies), style="rows")


@dataclass(frozen=True)
class RowLayout:
    """Which columns the table of a comparison's rows has."""

    comparison: Comparison
    metric: str
    tasks: tuple[str, ...]
    others: tuple[str, ...]
    settings: bool
    seeds: bool
    seconds: bool
    memory: bool

    @classmethod
    def of(cls, rows: Sequence[Row], comparison: Comparison) -> RowLayout:
        """Leave out the columns that would be empty."""
        metric = comparison.metrics[0] if comparison.metrics else ""
        return cls(
            comparison=comparison,
            metric=metric,
            tasks=tuple(comparison.tasks(metric)),
            others=comparison.metrics[1:],
            settings=any(_settings_text(row, comparison.varying) for row in rows),
            seeds=any(row.seed is not None for row in rows),
            seconds=any(row.seconds is not None for row in rows),
            memory=any(row.peak_memory_bytes is not None for row in rows),
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The headings."""
        return tuple(name for name, _ in self._columns())

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers."""
        return tuple(numeric for _, numeric in self._columns())

    def _columns(self) -> list[tuple[str, bool]]:
        columns = [("method", False)]
        columns += [("settings", False)] if self.settings else []
        columns += [("seed", True)] if self.seeds else []
        columns += [(f"mean {self.metric}", True)] if len(self.tasks) > 1 else []
        columns += [
            (task if len(self.tasks) > 1 else f"{self.metric}, {task}", True) for task in self.tasks
        ]
        columns += [(f"mean {metric}", True) for metric in self.others]
        columns += [("time", True)] if self.seconds else []
        columns += [("peak memory", True)] if self.memory else []
        return [*columns, ("status", False)]

    def order(self, row: Row) -> tuple[bool, float]:
        """Best first; rows without a mean last."""
        mean = self._mean(row, self.metric)
        if mean is None:
            return True, 0.0
        return False, -mean.value if self.comparison.higher_is_better(self.metric) else mean.value

    def cells(self, row: Row, folder: Path | None) -> tuple[Cell, ...]:
        """The cells of one row; a failed one has its message where the scores would be."""
        head = [self._label(row, folder)]
        if self.settings:
            text = _settings_text(row, self.comparison.varying)
            head.append(Cell(text, sort=text, style="settings"))
        if self.seeds:
            seed = "" if row.seed is None else str(row.seed)
            head.append(Cell(seed, sort=row.seed if row.seed is not None else ""))
        width = len(self.columns) - len(head) - self.seconds - self.memory - 1
        if row.status == "failed" and width:
            middle = [Cell(row.error or "no message", span=width, style="error")]
        else:
            middle = self._scores(row)
        error = "" if width else row.error
        status = Cell(row.status, sort=row.status, detail=error, style=f"status {row.status}")
        return (*head, *middle, *self._cost(row), status)

    def _label(self, row: Row, folder: Path | None) -> Cell:
        short = _short(row.method)
        detail = short if short and short not in row.label else ""
        return Cell(row.label, sort=row.label, detail=detail, link=_report_link(row, folder))

    def _scores(self, row: Row) -> list[Cell]:
        found = _scores_by_task(row, self.metric)
        raw = {score.task: score for score in row.scores if score.metric == self.metric}
        cells = [self._mean_cell(row, self.metric)] if len(self.tasks) > 1 else []
        cells += [_score_cell(found.get(task) or raw.get(task)) for task in self.tasks]
        return [*cells, *(self._mean_cell(row, metric) for metric in self.others)]

    def _mean(self, row: Row, metric: str) -> Mean | None:
        return Group(row.label, (row,)).mean(metric, self.comparison.tasks(metric))

    def _mean_cell(self, row: Row, metric: str) -> Cell:
        mean = self._mean(row, metric)
        if mean is None:
            scored, tasks = len(_scores_by_task(row, metric)), len(self.comparison.tasks(metric))
            return Cell("–", detail=f"{scored} of {tasks} tasks" if scored else "")
        text = score_text(mean.value, metric)
        style = "mean" if metric == self.metric else ""
        return Cell(text, sort=mean.value, detail=_interval_text(mean, metric), style=style)

    def _cost(self, row: Row) -> list[Cell]:
        cells = []
        if self.seconds:
            cells.append(Cell(humanise_seconds(row.seconds), sort=_sort_key(row.seconds)))
        if self.memory:
            memory = row.peak_memory_bytes
            cells.append(Cell(humanise_bytes(memory), sort=_sort_key(memory)))
        return cells


def _report_link(row: Row, folder: Path | None) -> str:
    """The address of the row's own report, if that stands inside `folder`."""
    if folder is None or not row.folder or Path(row.folder).is_absolute():
        return ""
    if not (folder / row.folder / FILE_NAME).is_file():
        return ""
    return quote(f"{Path(row.folder).as_posix()}/{FILE_NAME}")
