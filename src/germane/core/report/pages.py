"""The page: what the template prints, and the template filled in.

The page is one file: style, script and plots are inside, and a content security policy in its head
keeps the browser from loading or running anything more.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from germane.core.evidence import Evidence, Finding, Plot, Row, Share, Step, Table
from germane.core.report.comparison import Comparison, directions_apart
from germane.core.report.figures import compare_figure, scores_figure
from germane.core.report.headlines import headline
from germane.core.report.plots import Figure, line_figure, percent_text, scatter_figure
from germane.core.report.tables import Grid, heat_grid, rows_grid, scores_grid, table_grid
from germane.core.report.text import humanise_bytes, humanise_seconds, score_text, yaml_text

FILE_NAME = "report.html"
TEMPLATE = "report.html.j2"
SEVERITIES = ("serious", "warning", "note")
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class MetricPart:
    """Everything about one metric: a plot and a table."""

    metric: str
    figure: Figure | None
    grid: Grid | None


@dataclass(frozen=True)
class ShareBar:
    """One bar of the shares."""

    member: str
    percent: str
    text: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class StepPart:
    """One step of a run."""

    step: Step
    title: str
    metrics: tuple[MetricPart, ...]
    shares: tuple[ShareBar, ...]
    figures: tuple[Figure, ...]
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Page:
    """What the template prints."""

    headline: str
    evidence: Evidence
    findings: tuple[Finding, ...]
    summary: tuple[tuple[str, str], ...]
    versions: Mapping[str, str]
    rows: Grid | None
    metrics: tuple[MetricPart, ...]
    steps: tuple[StepPart, ...]
    figures: tuple[Figure, ...]
    grids: tuple[Grid, ...]


def render(evidence: Evidence, folder: Path | None = None) -> str:
    """The page as text; `folder` is where the links of a comparison's rows are looked up."""
    environment = Environment(
        loader=PackageLoader("germane.core.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        sha256=_sha256, seconds=humanise_seconds, bytes=humanise_bytes, yaml=yaml_text, paper=_paper
    )
    text = environment.get_template(TEMPLATE).render(page=_page(evidence, folder))
    return NOT_XML.sub("\ufffd", text)  # characters that SVG forbids even when escaped


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _paper(text: str) -> str:
    """The paper, linked where it is an arXiv number or a web address."""
    found = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})(v\d+)?", text, flags=re.IGNORECASE)
    address = f"https://arxiv.org/abs/{found[1]}" if found else text
    if not re.match(r"https?://", address):
        return text
    return Markup('<a href="{}" rel="noreferrer">{}</a>').format(address, text)


def _page(evidence: Evidence, folder: Path | None) -> Page:
    evidence = directions_apart(evidence)
    comparison = Comparison.of(evidence)
    several = len(evidence.steps) > 1
    return Page(
        headline=headline(evidence),
        evidence=evidence,
        findings=tuple(sorted(evidence.findings, key=lambda f: SEVERITIES.index(f.severity))),
        summary=_summary(evidence),
        versions={**({"germane": evidence.germane} if evidence.germane else {}), **evidence.versions},
        rows=rows_grid(evidence.rows, comparison, lambda row: _report_link(row, folder)),
        metrics=tuple(
            MetricPart(metric, compare_figure(comparison, metric), heat_grid(comparison, metric))
            for metric in comparison.metrics
        ),
        steps=tuple(
            _step_part(step, f"Step {place}: {step.method or step.task}" if several else "")
            for place, step in enumerate(evidence.steps, start=1)
        ),
        figures=(*filter(None, map(scatter_figure, evidence.scatters)), *_figures(evidence.plots)),
        grids=_grids(evidence.tables),
    )


def _summary(evidence: Evidence) -> tuple[tuple[str, str], ...]:
    """The few facts that stand under the headline."""
    parts: Sequence[Step | Row] = evidence.steps
    facts = {"seed": ", ".join(map(str, sorted({step.seed for step in evidence.steps})))}
    if evidence.rows:
        parts = attempts = [row for row in evidence.rows if row.status != "reference"]
        seeds = {row.seed for row in attempts if row.seed is not None}
        facts = {"runs": str(len(attempts) or ""), "seeds": str(len(seeds) or "")}
    spent = sum(part.seconds or 0 for part in parts)
    largest = max((part.peak_memory_bytes or 0 for part in evidence.rows or evidence.steps), default=0)
    facts["time"] = humanise_seconds(spent) if spent else ""
    facts["peak memory"] = humanise_bytes(largest) if largest else ""
    facts["germane"] = evidence.germane
    return tuple((name, value) for name, value in facts.items() if value)


def _report_link(row: Row, folder: Path | None) -> str:
    """The address of the row's own report, if that stands inside `folder`."""
    if folder is None or not row.folder or Path(row.folder).is_absolute():
        return ""
    if not (folder / row.folder / FILE_NAME).is_file():
        return ""
    return quote(f"{Path(row.folder).as_posix()}/{FILE_NAME}")


def _step_part(step: Step, title: str) -> StepPart:
    metrics = []
    for metric in dict.fromkeys(score.metric for score in step.scores):
        scores = [score for score in step.scores if score.metric == metric]
        metrics.append(MetricPart(metric, scores_figure(metric, scores), scores_grid(scores)))
    return StepPart(
        step=step,
        title=title,
        metrics=tuple(metrics),
        shares=_share_bars(step.shares),
        figures=_figures(step.plots),
        grids=_grids(step.tables),
    )


def _figures(plots: Iterable[Plot]) -> tuple[Figure, ...]:
    return tuple(filter(None, map(line_figure, plots)))


def _grids(tables: Iterable[Table]) -> tuple[Grid, ...]:
    return tuple(filter(None, map(table_grid, tables)))


def _share_bars(shares: Sequence[Share]) -> tuple[ShareBar, ...]:
    """The largest share first; the base has what is left, unless it is among them."""
    finite = [share.share for share in shares if math.isfinite(share.share)]
    rest = 1.0 - sum(finite)
    largest = max([*finite, rest]) or 1.0

    def bar(member: str, share: float, verdict: str, reason: str = "") -> ShareBar:
        part = min(1.0, max(0.0, share / largest)) if math.isfinite(share) else 0.0
        return ShareBar(member, percent_text(part), score_text(share), verdict, reason)

    ordered = sorted(shares, key=lambda s: -s.share if math.isfinite(s.share) else math.inf)
    bars = [bar(s.member, s.share, "taken" if s.taken else "left", s.reason) for s in ordered]
    listed = any(share.member == "base" for share in shares)
    if len(finite) == len(shares) and shares and not listed and 0.0005 <= rest <= 1.0:
        bars.append(bar("base", rest, "rest"))
    return tuple(bars)
