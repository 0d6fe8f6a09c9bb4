"""Means, their intervals, and which rows stand together."""

from __future__ import annotations

import math

import pytest
from report_evidence import row, score

from germane.core.evidence import Evidence
from germane.core.report.comparison import Comparison
from germane.core.report.means import mean_over_seeds, mean_over_tasks
from germane.core.statistics import student_t


def test_interval_over_tasks_adds_standard_errors_in_quadrature() -> None:
    # Half-widths 0.03 and 0.04: sqrt(0.03^2 + 0.04^2) / 2 = 0.025.
    scores = [
        score("result", "a", 0.5, low=0.47, high=0.53),
        score("result", "b", 0.7, low=0.66, high=0.74),
    ]
    mean = mean_over_tasks(scores)
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.6, 0.575, 0.625))
    assert mean.rule == "tasks"


def test_one_task_keeps_its_own_interval_and_accuracies_stay_shares() -> None:
    own = mean_over_tasks([score("result", "a", 0.9, low=0.8, high=0.95)])
    assert (own.low, own.high) == (0.8, 0.95)
    seeds = mean_over_seeds([0.9, 1.0], "accuracy")
    assert seeds.high == 1.0
    assert mean_over_seeds([0.9, 1.0], "perplexity").high > 1.0


def test_a_task_without_an_interval_leaves_the_mean_without_one() -> None:
    scores = [score("result", "a", 0.5), score("result", "b", 0.7, low=math.nan, high=math.nan)]
    mean = mean_over_tasks(scores)
    assert mean.value == pytest.approx(0.6)
    assert math.isnan(mean.low)
    assert math.isnan(mean.high)


@pytest.mark.parametrize("freedom", [1, 2, 5, 10, 11, 20, 100])
def test_student_t_is_scipys(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-3)


def test_seeds_that_agree_take_the_interval_of_the_tasks() -> None:
    rows = [row("ties", seed, {"a": 0.5, "b": 0.7}) for seed in range(3)]
    (group,) = Comparison.of(Evidence(kind="compare", rows=rows)).groups
    mean = group.mean("accuracy", ["a", "b"])
    assert mean is not None
    assert mean.rule == "tasks"
    assert mean.high - mean.low == pytest.approx(2 * math.hypot(0.04, 0.04) / 2)


def test_rows_are_grouped_by_method_and_settings_and_named_by_what_varies() -> None:
    rows = [
        row("ties", seed, {"a": 0.5}, settings={"density": density, "scale": 1.0, "seed": seed})
        for density in (0.2, 0.4)
        for seed in range(2)
    ]
    groups = Comparison.of(Evidence(kind="compare", rows=rows)).groups
    assert [group.label for group in groups] == ["ties, density 0.2", "ties, density 0.4"]
    assert [len(group.rows) for group in groups] == [2, 2]


def test_a_methods_row_counts_its_result_and_not_the_base_beside_it() -> None:
    scores = [score("base", "a", 0.1), score("result", "a", 0.7)]
    rows = [row("ties", 0, {}, scores=scores)]
    ((_, mean),) = Comparison.of(Evidence(kind="compare", rows=rows)).ranked("accuracy")
    assert mean.value == 0.7
