"""CLAIMS.md: what papers claim, re-measured small. Each script in `claims/` writes its section."""

from __future__ import annotations

import re
from pathlib import Path

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
