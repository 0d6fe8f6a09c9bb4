"""The page: its parts, and that it is safe to open."""

from __future__ import annotations

import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_evidence import compare_evidence, hostile_evidence, perplexity, row, run_evidence, score, sha256

from germane.core.evidence import Evidence, Share, Step
from germane.core.report import write_report
from germane.core.report.pages import render


class Outline(HTMLParser):
    """Every tag with its attributes, and the text of headings, rows and items."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def headings(page: str) -> list[str]:
    return [html.unescape(text) for text in re.findall(r"<h2>(.*?)</h2>", page)]


def test_a_run_has_its_parts(tmp_path: Path) -> None:
    path = write_report(run_evidence(), tmp_path)
    assert path == tmp_path / "report.html"
    page = path.read_text(encoding="utf-8")
    assert headings(page) == [
        "Findings", "Scores", "What each member gave", "How it went", "Tables", "On record",
    ]  # fmt: skip
    assert page.index("Same as a.") < page.index("Stored in float16.")
    assert "standard errors added in quadrature" in page
    members = re.findall(r'class="member">(.*?)<', page)
    assert members[:4] == ["member-00", "member-03", "member-05", "member-11"]
    assert members[-1] == "base"  # 0.15 is left: the shares sum to 1 with the base
    for text in ("4 min 12 s", "2.0 GiB", "ab" * 32, "layers: 30", "- task: merge", "steps: 20"):
        assert text in page
    assert 'href="https://arxiv.org/abs/2503.12649"' in page


def test_a_comparison_has_its_parts() -> None:
    page = render(compare_evidence())
    assert headings(page) == ["Which method is best", "Every run", "Tables"]
    assert "t intervals over seeds" in page
    assert "has shape [1536, 512]" in page
    assert page.count('class="status failed"') == 1
    assert page.count('class="status reference"') == 1


def test_the_best_of_each_column_is_shaded_darkest() -> None:
    rows = [row("ties", 0, {"a": 0.5, "b": 0.9}), row("dare", 0, {"a": 0.7, "b": 0.8})]
    page = render(Evidence(kind="compare", rows=rows))
    cells = re.findall(r'<td class="number( best)? shade"[^>]*--heat:([\d.]+)">([\d.]+)', page)
    assert cells == [  # dare has the higher mean and stands first
        (" best", "1.0", "0.700"), ("", "0.0", "0.800"),
        ("", "0.0", "0.500"), (" best", "1.0", "0.900"),
    ]  # fmt: skip


def test_several_metrics_are_all_shown_and_the_first_is_ranked() -> None:
    scores = [score("result", "a", 0.5), perplexity("result", "a", 12.0)]
    rows = [row(name, 0, {}, scores=scores) for name in ("ties", "dare")]
    page = render(Evidence(kind="compare", rows=rows))
    assert re.findall(r'data-metric="(.*?)"', page) == ["accuracy", "perplexity"]
    assert "mean perplexity" in page
    assert "Perplexity on a, by method (lower is better)" in page
    assert "ties and dare are level: accuracy 0.500" in page


def test_rows_link_to_reports_that_exist(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "report.html").touch()
    rows = [
        row("ties", 0, {"a": 0.5}, folder="a b"),
        row("dare", 0, {"a": 0.5}, folder="javascript:alert(1)//"),
    ]
    page = write_report(Evidence(kind="compare", rows=rows), tmp_path).read_text(encoding="utf-8")
    links = [attributes["href"] for tag, attributes in Outline(page).tags if tag == "a"]
    assert links == ["a%20b/report.html"]


@pytest.mark.parametrize("kind", ["run", "compare"])
def test_empty_evidence_has_no_empty_headings(kind: Any) -> None:
    assert headings(render(Evidence(kind=kind))) == []
    step = Step(task="merge", method="merge/mean")
    assert headings(render(Evidence(kind=kind, steps=[step]))) == ["On record"]


def test_one_failed_row_alone_shows_its_error() -> None:
    rows = [row("ties", 0, {}, status="failed", error="NoSpace: 12 GiB are missing.")]
    page = render(Evidence(kind="compare", rows=rows))
    assert "The one run failed" in page
    assert "NoSpace: 12 GiB are missing." in page


def test_scores_that_are_not_finite_do_not_break_the_page() -> None:
    bad = [math.nan, math.inf, -math.inf]
    scores = [score("result", f"t{i}", v, low=math.nan, high=math.inf) for i, v in enumerate(bad)]
    step = Step(task="merge", method="merge/ties", scores=[*scores, score("base", "t0", 0.5)])
    step.shares = [Share(member="m", share=math.nan, taken=False, reason="")]
    page = render(Evidence(steps=[step]))
    assert "not a number" in page
    assert "3 values that are not a finite number are left out of the plot." in page
    rows = [row("ties", 0, {}, scores=scores), row("dare", 0, {"t0": 0.5, "t1": 0.5, "t2": 0.5})]
    page = render(Evidence(kind="compare", rows=rows))
    assert not re.search(r'(x|y|x1|x2|cx|cy|d|width)="[^"]*(nan|inf)', page)


def test_hostile_labels_are_text_everywhere() -> None:
    evidence = hostile_evidence()
    run = evidence.model_copy(update={"rows": []})
    for page in (render(evidence), render(run)):
        tags = Outline(page).tags
        assert [tag for tag, _ in tags].count("script") == 1
        assert "img" not in {tag for tag, _ in tags}
        assert not [name for _, found in tags for name in found if name.startswith("on")]
        assert not [a for tag, a in tags if tag == "a" and "script:" in str(a.get("href"))]
        assert "&lt;script&gt;" in page
        assert "\x1b" not in page
        for plot in re.findall(r'<div class="canvas">(.*?)</div>', page, flags=re.DOTALL):
            ElementTree.fromstring(plot)


def test_text_that_is_not_unicode_is_written_all_the_same(tmp_path: Path) -> None:
    evidence = Evidence(title="ok")
    evidence.title = "folder \udcff"  # what os.listdir gives for a name that is not UTF-8
    assert "folder" in write_report(evidence, tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("evidence", [run_evidence(), compare_evidence()], ids=["run", "compare"])
def test_the_page_stands_alone(evidence: Evidence) -> None:
    page = render(evidence)
    for tag, attributes in Outline(page).tags:
        assert tag not in {"link", "iframe", "img", "object", "embed", "base"}
        assert "src" not in attributes
        assert "href" not in attributes or tag == "a"
    assert not re.search(r"@import|url\(|@font-face", page)


def test_only_the_pages_own_script_may_run() -> None:
    page = render(run_evidence())
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert f"script-src 'sha256-{sha256(script)}'" in page
    assert "default-src 'none'" in page


def test_the_same_evidence_gives_the_same_bytes() -> None:
    assert render(compare_evidence()) == render(compare_evidence())
