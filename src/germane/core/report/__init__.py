"""report.html: the evidence of a run or of a comparison, on one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from germane.core.evidence import Evidence
from germane.core.report.headlines import headline
from germane.core.report.pages import FILE_NAME, render

__all__ = ["headline", "write_report"]


def write_report(evidence: Evidence, folder: Path) -> Path:
    """Write `report.html` into `folder` and return its path.

    Links to the reports of a comparison's rows are made where those files exist in `folder`.
    """
    path = folder / FILE_NAME
    path.write_text(render(evidence, folder), encoding="utf-8")
    return path
