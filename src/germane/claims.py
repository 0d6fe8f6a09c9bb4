"""CLAIMS.md: what papers claim, re-measured small. Each script in `claims/` writes its section."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from germane.core.statistics import student_t

FILE = Path("CLAIMS.md")
_HEAD = """# Claims

Each section is written by a script in `claims/`, which re-measures one paper's main claim small, on
real parts, with a baseline that must fail. A claim that does not hold is reported as not holding.

"""


def write_section(slug: str, title: str, body: str, holds: str) -> None:
    """Replace the section of `slug` in CLAIMS.md.

    Args:
        slug: Name of the script without `.py`.
        title: What is claimed, and where.
        body: Markdown: what was measured, on what, the numbers.
        holds: The verdict: "holds", "holds in part: ...", "does not hold: ...".
    """
    text = FILE.read_text(encoding="utf-8") if FILE.exists() else _HEAD
    section = (
        f"<!-- {slug} -->\n## {title}\n\n**{holds}**\n\n{body.strip()}\n\n"
        f"Made by `python claims/{slug}.py`.\n<!-- end {slug} -->\n"
    )
    pattern = re.compile(rf"<!-- {slug} -->\n.*?<!-- end {slug} -->\n", re.DOTALL)
    if pattern.search(text):
        text = pattern.sub(lambda _: section, text)
    else:
        text = text.rstrip() + "\n\n" + section
    FILE.write_text(text, encoding="utf-8")


def interval(values: Sequence[float], digits: int = 1) -> str:
    """Mean and 95 % t interval over seeds, as "mean ± half"; of one value, that."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    half = student_t(len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"
