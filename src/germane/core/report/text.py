"""Numbers, units and names as the report prints them."""

from __future__ import annotations

import json
import math
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from germane.core.evidence import Score
from germane.core.report.means import Mean, is_share

MINUS = "\N{MINUS SIGN}"


def score_text(value: float, metric: str = "accuracy") -> str:
    """A score as it is printed: accuracies with 3 decimals, whatever their size."""
    if is_share(metric) and math.isfinite(value):
        return f"{value + 0.0:.3f}"
    return number_text(value)


def interval_text(interval: Score | Mean, metric: str, dash: str = "–") -> str:
    """Both ends of the 95 % interval, or nothing where there is none."""
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ""
    return f"{score_text(interval.low, metric)}{dash}{score_text(interval.high, metric)}"


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


def count(number: int, noun: str) -> str:
    """The number and the noun, in the plural where that is due."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def sentence(text: str) -> str:
    """The text with its first letter large."""
    return text[:1].upper() + text[1:]


def cut(text: str, length: int) -> str:
    """The text, its end replaced by an ellipsis where it is longer than that."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def short(method: str) -> str:
    """A method's name without its task."""
    return method.rpartition("/")[2]


def value_text(value: Any) -> str:
    """The value of a setting on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else canonical(value)


def canonical(value: Any) -> str:
    """A text that equal settings share."""
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False)


def yaml_text(value: Any) -> str:
    """The value over several lines."""
    return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True, width=88)


def _plain(value: Any) -> Any:
    """The value with anything but mappings, lists, texts and numbers turned into text."""
    return to_jsonable_python(value, fallback=str, inf_nan_mode="constants")
