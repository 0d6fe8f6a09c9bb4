"""Means over tasks and over seeds, with their 95 % intervals.

The interval comes by one of two rules, and the page says which:

- Several seeds: the t interval of the seeds' means.
- Otherwise: the tasks' own intervals, read as plus or minus 1.96 standard errors, the standard
  errors added in quadrature and divided by the number of tasks. One task keeps its own interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from germane.core.evidence import Score
from germane.core.statistics import student_t


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
    if len(scores) == 1:
        return Mean(scores[0].value, scores[0].low, scores[0].high, "task")
    half = math.hypot(*((score.high - score.low) / 2 for score in scores)) / len(scores)
    return _around(fmean(score.value for score in scores), half, scores[0].metric, "tasks")


def mean_over_seeds(values: Sequence[float], metric: str) -> Mean:
    """Mean of at least two seeds' values with its t interval."""
    half = student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return _around(fmean(values), half, metric, "seeds", tuple(values))


def is_share(metric: str) -> bool:
    """Whether values of the metric lie between 0 and 1."""
    return "accuracy" in metric.lower()


def _around(value: float, half: float, metric: str, rule: str, parts: tuple[float, ...] = ()) -> Mean:
    if not math.isfinite(half):
        return Mean(value, math.nan, math.nan, rule, parts)
    low, high = value - half, value + half
    if is_share(metric):
        low, high = max(0.0, low), min(1.0, high)
    return Mean(value, low, high, rule, parts)
