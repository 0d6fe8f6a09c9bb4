"""The finding of a run or of a comparison in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from germane.core.evidence import Evidence, Score, Step
from germane.core.report.comparison import Comparison, Group, by_subject, directions_apart, opposite
from germane.core.report.means import Mean
from germane.core.report.text import count, interval_text, score_text, sentence, short


def headline(evidence: Evidence) -> str:
    """The finding in plain words: the evidence's own headline, else one worked out from its numbers."""
    evidence = directions_apart(evidence)
    if evidence.headline:
        clauses = [evidence.headline.rstrip(".")]
    else:
        clauses = _compare_clauses(evidence) if evidence.rows else _run_clauses(evidence)
    serious = sum(finding.severity == "serious" for finding in evidence.findings)
    if serious:
        clauses.append(count(serious, "serious finding"))
    return "; ".join(clauses)


# --- A run


def _run_clauses(evidence: Evidence) -> list[str]:
    if not evidence.steps:
        return [f"{evidence.title or 'This run'}: no step was recorded"]
    scored = next((step.scores for step in reversed(evidence.steps) if step.scores), [])
    pooled = next((step for step in reversed(evidence.steps) if step.shares), None)
    clauses = [*_score_clauses(scored), *_share_clauses(pooled)]
    if not clauses:
        clauses = [evidence.steps[-1].summary.rstrip(".") or "nothing was scored"]
    name = " then ".join(short(step.method) or step.task for step in evidence.steps)
    return [f"{name}: {clauses[0]}", *clauses[1:]]


def _score_clauses(scores: Sequence[Score]) -> list[str]:
    """What the result scored in the first metric, read either way."""
    metrics = list(dict.fromkeys(score.metric for score in scores))
    shown = [*metrics[:1], *(opposite(metric, metrics) for metric in metrics[:1])]
    clauses = []
    for metric in filter(None, shown):
        clauses += _metric_clauses(metric, [score for score in scores if score.metric == metric])
    return clauses


def _metric_clauses(metric: str, scores: Sequence[Score]) -> list[str]:
    """What the result scored, and the base beside it on the same tasks."""
    subjects = by_subject(scores)
    others = [subject for subject in subjects if subject not in ("base", "own")]
    subject = "result" if "result" in subjects else next(iter(others or subjects))
    ours = [score for score in subjects[subject] if math.isfinite(score.value)]
    broken = count(len(subjects[subject]) - len(ours), "task")
    if not ours:
        return [f"no finite {metric} on any of {broken}"]
    missing = [f"no finite {metric} on {broken}"] if len(ours) < len(subjects[subject]) else []
    if not others:
        return [f"only {subject} was scored: {_mean_phrase(metric, ours)}", *missing]
    theirs = [score for score in subjects.get("base", []) if math.isfinite(score.value)]
    shared = {score.task for score in ours} & {score.task for score in theirs}
    if not shared:
        return [_mean_phrase(metric, ours), *missing]
    phrase = _mean_phrase(metric, [score for score in ours if score.task in shared])
    base = fmean(score.value for score in theirs if score.task in shared)
    return [f"{phrase}, base {score_text(base, metric)}", *missing]


def _mean_phrase(metric: str, scores: Sequence[Score]) -> str:
    text = score_text(fmean(score.value for score in scores), metric)
    tasks = list(dict.fromkeys(score.task for score in scores))
    if len(tasks) == 1:
        return f"{metric} {text} on {tasks[0]}"
    return f"mean {metric} {text} over {len(tasks)} tasks"


def _share_clauses(step: Step | None) -> list[str]:
    if step is None:
        return []
    taken = sum(share.taken for share in step.shares)
    noun = "checkpoint" if step.task == "merge" else "member"
    return [f"took {taken} of {count(len(step.shares), noun)}"]


# --- A comparison


def _compare_clauses(evidence: Evidence) -> list[str]:
    comparison = Comparison.of(evidence)
    attempts = [row for row in evidence.rows if row.status != "reference"]
    failed = sum(row.status == "failed" for row in attempts)
    trouble = [f"{failed} of {count(len(attempts), 'run')} failed"] if failed else []
    if not comparison.metrics:
        if failed == len(attempts) and failed:
            return [f"All {failed} runs failed" if failed > 1 else "The one run failed"]
        return [f"{count(len(comparison.groups), 'method')} compared; nothing was scored", *trouble]
    metric = comparison.metrics[0]
    ranked = comparison.ranked(metric)
    if not ranked:
        return [sentence(f"no method has a finite {metric} on every task"), *trouble]
    best, mean = ranked[0]
    return [
        _winner_clause(metric, comparison.tasks(metric), ranked),
        *_base_clause(metric, mean, comparison),
        *_opposite_clause(metric, best, comparison),
        *trouble,
    ]


def _winner_clause(metric: str, tasks: Sequence[str], ranked: Sequence[tuple[Group, Mean]]) -> str:
    group, best = ranked[0]
    value = score_text(best.value, metric)
    interval = interval_text(best, metric, " to ")
    value += f" (95 % interval {interval})" if interval else ""
    scored = f"{metric} {value} on {tasks[0]}"
    if len(tasks) > 1:
        scored = f"mean {metric} {value} over {len(tasks)} tasks"
    if len(ranked) == 1:
        return f"{group.label}: {scored}"
    second, next_best = ranked[1]
    distance = score_text(abs(best.value - next_best.value), metric)
    if distance == score_text(0.0, metric):
        return f"{group.label} and {second.label} are level: {scored}"
    overlap = best.low <= next_best.high and next_best.low <= best.high
    suffix = ", whose interval overlaps" if overlap else ""
    return f"{group.label} is best: {scored}, {distance} better than the next, {second.label}{suffix}"


def _base_clause(metric: str, best: Mean, comparison: Comparison) -> list[str]:
    base = comparison.base(metric)
    if base is None:
        return []
    ahead = best.value > base.value if comparison.higher_is_better(metric) else best.value < base.value
    text = score_text(base.value, metric)
    return [f"the base scores {text}" if ahead else f"no method beats the base ({text})"]


def _opposite_clause(metric: str, best: Group, comparison: Comparison) -> list[str]:
    """What the best method scored where the metric is read the other way."""
    other = opposite(metric, comparison.metrics)
    mean = best.mean(other, comparison.tasks(other)) if other else None
    if other is None or mean is None:
        return []
    base = comparison.base(other)
    beside = f" (base {score_text(base.value, other)})" if base else ""
    way = "higher" if comparison.higher_is_better(other) else "lower"
    return [f"where {way} is better it scores {score_text(mean.value, other)}{beside}"]
