import math

import numpy as np
import pytest
import torch
import zoo  # noqa: F401 - sets threads and quiet
from sklearn.metrics import roc_auc_score

from germane.core.membership import area, area_interval, min_k


def test_min_k_by_hand():
    # the lowest 40 % of five are two: -5 and -4
    assert min_k(torch.tensor([-1.0, -5.0, -2.0, -4.0, -3.0])) == pytest.approx(-4.5)


def test_min_k_of_a_short_text_takes_one_token_and_is_no_nan():
    assert min_k(torch.tensor([-2.0, -1.0])) == -2.0


@pytest.mark.parametrize(
    ("members", "others", "expected"),
    [
        ([1.0, 2.0], [-1.0, -2.0], 0.0),  # members always the more familiar
        ([-1.0], [1.0, 2.0], 1.0),
        ([0.0, 0.0], [0.0], 0.5),
        ([0.0, 2.0], [1.0, 2.0], (0 + 1 + 1 + 0.5) / 4),
    ],
)
def test_area_by_hand(members, others, expected):
    assert area(members, others) == pytest.approx(expected)


def test_area_is_scikit_learns():
    generator = np.random.default_rng(0)
    members, others = generator.integers(0, 9, 40), generator.integers(2, 11, 30)
    labels = [0] * 40 + [1] * 30
    expected = roc_auc_score(labels, np.concatenate([members, others]))
    assert area(members.tolist(), others.tolist()) == pytest.approx(expected)


def test_the_interval_holds_the_area_and_narrows():
    generator = np.random.default_rng(1)
    few, many = ([generator.normal(size=n) for _ in range(2)] for n in (10, 400))
    widths = []
    for first, second in (few, many):
        value, low, high = area_interval(first.tolist(), second.tolist())
        assert low <= value <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    assert not math.isnan(sum(widths))
