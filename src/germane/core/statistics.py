"""Intervals for scores."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# Two-sided 95 % quantiles: of the normal distribution, and of Student's t for 1 to 10 degrees of freedom.
NORMAL = 1.959963984540054
STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def wilson(successes: int, n: int, z: float = NORMAL) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(values: NDArray[np.float64], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean, resampling the values."""
    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t.

    Above 10 degrees of freedom by the Cornish-Fisher expansion, which is right to 0.001 there.
    """
    if freedom <= len(STUDENT_T):
        return STUDENT_T[freedom - 1]
    z = NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / math.pow(freedom, power) for power, term in enumerate(terms, start=1))
