"""Axes: which range a plot shows, and where its ticks are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from germane.core.report.text import MINUS

TICKS = 5  # about how many an axis has
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """An axis. A logarithmic one keeps `low`, `high` and `ticks` as they are read, not as powers."""

    ticks: tuple[float, ...]
    step: float
    logarithmic: bool = False

    @property
    def low(self) -> float:
        """The low end."""
        return self.ticks[0]

    @property
    def high(self) -> float:
        """The high end."""
        return self.ticks[-1]

    @classmethod
    def over(cls, values: Iterable[float], *, whole: bool = False, share: bool = False) -> Scale:
        """A scale whose ends are round numbers around the finite ones of `values`.

        Args:
            values: What must be visible.
            whole: Whether ticks are whole numbers.
            share: Whether values are between 0 and 1, so that the scale ends there too.
        """
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        share = share and low >= 0 and high <= 1
        if high - low <= 1e-9 * max(1.0, abs(high)):  # no difference that ticks could show
            pad = 0.5 if whole else abs(high) * 0.1 if abs(high) > 1e-9 else 1.0
            low, high = low - pad, high + pad
        step = max(1.0 if whole else 0.0, _round_step((high - low) / TICKS))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if share:
            first, last = max(first, 0), min(last, round(1 / step))
        last = max(last, first + 1)
        return cls(tuple(round(index * step, 12) for index in range(first, last + 1)), step)

    @classmethod
    def powers(cls, values: Sequence[float]) -> Scale:
        """A logarithmic scale over finite positive values, with ticks at powers of ten."""
        first = math.floor(math.log10(min(values)) + 1e-9)
        last = max(first + 1, math.ceil(math.log10(max(values)) - 1e-9))
        stride = math.ceil((last - first) / TICKS)
        last = first + math.ceil((last - first) / stride) * stride
        powers = range(first, last + 1, stride)
        return cls(tuple(10.0**power for power in powers), 0.0, logarithmic=True)

    def part(self, value: float) -> float:
        """Where the value lies: 0 at the low end, 1 at the high end; never outside."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, value, high = (math.log10(each) for each in (low, value, high))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def text(self, tick: float) -> str:
        """The label of a tick."""
        if self.logarithmic:
            plain = self.low >= 1e-3 and self.high <= 1e5
            power = str(round(math.log10(tick))).translate(SUPERSCRIPTS)
            return f"{tick:,g}" if plain else f"10{power}"
        if self.step >= 1e5:
            text = f"{tick / 1e6:g}M"
        elif self.step < 1e-4:
            text = f"{tick:.6g}"
        else:
            decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
            text = f"{tick + 0.0:,.{decimals}f}"
        return text.replace("-", MINUS)


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
