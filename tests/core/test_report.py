"""The report: what it says, that it is safe to open, and that it fits its window."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from germane.core.evidence import Evidence, Finding, Plot, Row, Score, Series, Share, Step, Table
from germane.core.report import (
    Comparison,
    Lane,
    Look,
    Mark,
    Scale,
    dot_plot,
    headline,
    humanise_bytes,
    humanise_seconds,
    line_figure,
    mean_over_seeds,
    mean_over_tasks,
    number_text,
    render,
    student_t,
    write_report,
)

HOSTILE = "</title></svg><script>alert('x')</script><img src=x onerror=\"alert(1)\">&\x00\x1b"
SVG = "{http://www.w3.org/2000/svg}"


def score(subject: str, task: str, value: float, **more: Any) -> Score:
    fields = {"metric": "accuracy", "n": 400, "low": value - 0.04, "high": value + 0.04, **more}
    return Score(subject=subject, task=task, value=value, **fields)


def perplexity(subject: str, task: str, value: float) -> Score:
    return score(
        subject, task, value, metric="perplexity", low=value - 1, high=value + 1,
        higher_is_better=False,
    )  # fmt: skip


def run_evidence() -> Evidence:
    tasks = {"boolq": (0.62, 0.80), "arc": (0.55, 0.74), "news": (0.70, 0.88), "tox": (0.61, 0.82)}
    members = [f"member-{place:02d}" for place in range(12)]
    taken = {"member-00": 0.4, "member-03": 0.2, "member-05": 0.15, "member-11": 0.1}
    scores = [
        score(subject, task, value)
        for task, pair in tasks.items()
        for subject, value in zip(("base", "result"), pair, strict=True)
    ]
    step = Step(
        task="merge",
        method="merge/frank-wolfe",
        summary="Frank-Wolfe over the pool.",
        paper="arXiv:2503.12649",
        settings={"steps": 20},
        inputs={"pool/member-00": "sha256:" + "ab" * 32},
        seconds=252.0,
        timings={"read": 8.0},
        peak_memory_bytes=2**31,
        scores=scores,
        findings=[
            Finding(code="dtype", severity="note", about="pool/a", message="Stored in float16."),
            Finding(code="copy", severity="warning", about="pool/b", message="Same as a."),
        ],
        shares=[
            Share(
                member=name,
                share=taken.get(name, 0.0),
                taken=name in taken,
                reason=f"Reason for {name}.",
            )
            for name in members
        ],
        plots=[
            Plot(
                title="Loss",
                x="step",
                y="loss",
                series=[Series(name="loss", steps=[0, 1, 2, 3], values=[3.0, 2.0, 1.5, 1.2])],
            )
        ],
        tables=[
            Table(title="Steps", columns=["step", "chosen"], rows=[[0, "member-00"], [1, None]])
        ],
        facts={"moved": {"layers": 30}},
    )
    return Evidence(title="Twelve fine-tunes", recipe={"steps": [{"task": "merge"}]}, steps=[step])


def row(method: str, seed: int, values: dict[str, float], **more: Any) -> Row:
    scores = [score("result", task, value) for task, value in values.items()]
    return Row(
        label=f"{method}, seed {seed}",
        method=f"merge/{method}",
        seed=seed,
        **{"scores": scores, "seconds": 12.0, "peak_memory_bytes": 2**30, **more},
    )


def compare_evidence() -> Evidence:
    tasks = ("boolq", "arc", "news", "a task with quite a long name")
    levels = {"frank-wolfe": 0.81, "dare": 0.77, "ties": 0.76, "mean": 0.69, "slerp": 0.66}
    rows = [
        row(method, seed, {task: level + 0.01 * seed + 0.02 * i for i, task in enumerate(tasks)})
        for method, level in levels.items()
        for seed in range(3)
    ]
    error = "CheckpointError: layer 3 has shape [1536, 512], the base has [1536, 576]"
    rows[5] = row("dare", 2, {}, status="failed", error=error)
    base = [score("base", task, 0.6) for task in tasks]
    rows.append(Row(label="base", status="reference", scores=base))
    table = Table(title="Taken", columns=["method", "taken"], rows=[["dare", 12], ["ties", 12]])
    return Evidence(kind="compare", title="Which merge?", rows=rows, tables=[table])


# ---------------------------------------------------------------------------------------------
# The headline
# ---------------------------------------------------------------------------------------------


def test_headline_of_a_run() -> None:
    assert headline(run_evidence()) == (
        "frank-wolfe: mean accuracy 0.810 over 4 tasks, base 0.620; took 4 of 12 checkpoints"
    )


def test_headline_counts_serious_findings() -> None:
    evidence = run_evidence()
    finding = Finding(code="no-effect", severity="serious", about="result", message="No effect.")
    evidence.steps[0].findings.append(finding)
    assert headline(evidence).endswith("; 1 serious finding")


def test_headline_compares_with_the_base_on_shared_tasks_only() -> None:
    scores = [score("base", "a", 0.5), score("result", "a", 0.7), score("result", "b", 0.1)]
    evidence = Evidence(steps=[Step(task="merge", method="merge/ties", scores=scores)])
    assert headline(evidence) == "ties: accuracy 0.700 on a, base 0.500"


def test_headline_of_one_task_without_base() -> None:
    step = Step(task="unlearn", method="unlearn/npo", scores=[score("result", "forget", 0.25)])
    assert headline(Evidence(steps=[step])) == "npo: accuracy 0.250 on forget"


def test_headline_of_two_steps_names_both_and_takes_the_last_scores() -> None:
    first = Step(task="merge", method="merge/ties", scores=[score("result", "a", 0.4)])
    second = Step(task="prune", method="prune/wanda", scores=[score("result", "a", 0.3)])
    evidence = Evidence(steps=[first, second])
    assert headline(evidence) == "ties then wanda: accuracy 0.300 on a"


def test_headline_without_scores_or_steps() -> None:
    step = Step(task="merge", method="merge/mean", summary="Averaged 3 checkpoints.")
    assert headline(Evidence(steps=[step])) == "mean: Averaged 3 checkpoints"
    assert headline(Evidence()) == "This run: no step was recorded"


def test_headline_says_when_scores_are_not_finite() -> None:
    scores = [score("result", "a", math.nan), score("result", "b", 0.5)]
    evidence = Evidence(steps=[Step(task="merge", method="merge/ties", scores=scores)])
    assert headline(evidence) == "ties: accuracy 0.500 on b; no finite accuracy on 1 task"
    evidence.steps[0].scores = scores[:1]
    assert headline(evidence) == "ties: no finite accuracy on any of 1 task"


def test_headline_of_a_comparison() -> None:
    # Seeds' means of frank-wolfe: 0.84, 0.85, 0.86; half = 4.3027 * 0.01 / sqrt(3) = 0.02484.
    # dare has two seeds, 0.80 and 0.81: half = 12.7062 * 0.00707107 / sqrt(2) = 0.0635.
    assert headline(compare_evidence()) == (
        "frank-wolfe is best: mean accuracy 0.850 (95 % interval 0.825 to 0.875) over 4 tasks, "
        "0.045 better than the next, dare, whose interval overlaps; the base scores 0.600; "
        "1 of 15 runs failed"
    )


def test_headline_of_a_comparison_where_lower_is_better() -> None:
    rows = [
        Row(label=name, method=f"prune/{name}", scores=[perplexity("result", "wiki", value)])
        for name, value in (("wanda", 14.0), ("magnitude", 19.5))
    ]
    rows.append(Row(label="base", status="reference", scores=[perplexity("base", "wiki", 12.0)]))
    assert headline(Evidence(kind="compare", rows=rows)) == (
        "wanda is best: perplexity 14.00 (95 % interval 13.00 to 15.00) on wiki, "
        "5.500 better than the next, magnitude; no method beats the base (12.00)"
    )


def test_headline_of_level_methods_and_of_nothing_but_failures() -> None:
    rows = [row("ties", 0, {"a": 0.5}), row("dare", 0, {"a": 0.5001})]
    assert headline(Evidence(kind="compare", rows=rows)).startswith("dare and ties are level:")
    failed = [row("ties", 0, {}, status="failed"), row("dare", 0, {}, status="failed")]
    assert headline(Evidence(kind="compare", rows=failed)) == "All 2 runs failed"


def test_scores_read_in_opposite_directions_are_never_averaged() -> None:
    scores = [
        score("result", "forget", 0.1, higher_is_better=False),
        score("result", "retain", 0.8),
        score("base", "forget", 0.9, higher_is_better=False),
        score("base", "retain", 0.9),
    ]
    step = Step(task="unlearn", method="unlearn/npo", scores=scores)
    assert headline(Evidence(steps=[step])) == (
        "npo: accuracy (lower is better) 0.100 on forget, base 0.900; "
        "accuracy 0.800 on retain, base 0.900"
    )
    rows = [
        Row(label=name, method=f"unlearn/{name}", scores=[
            score("result", "forget", forget, higher_is_better=False, low=forget, high=forget),
            score("result", "retain", retain),
        ])
        for name, forget, retain in (("npo", 0.1, 0.8), ("ascent", 0.0, 0.2))
    ]  # fmt: skip
    assert headline(Evidence(kind="compare", rows=rows)) == (
        "ascent is best: accuracy (lower is better) 0.000 (95 % interval 0.000 to 0.000) on "
        "forget, 0.100 better than the next, npo; where higher is better it scores 0.200"
    )
    assert 'data-metric="accuracy (lower is better)"' in render(Evidence(steps=[step]))


def test_headline_when_only_the_base_was_scored() -> None:
    step = Step(task="merge", method="merge/ties", scores=[score("base", "a", 0.5)])
    assert headline(Evidence(steps=[step])) == "ties: only base was scored: accuracy 0.500 on a"


def test_a_method_without_every_task_is_not_ranked() -> None:
    rows = [row("ties", 0, {"a": 0.9}), row("dare", 0, {"a": 0.5, "b": 0.5})]
    evidence = Evidence(kind="compare", rows=rows)
    assert headline(evidence).startswith("dare: mean accuracy 0.500")
    page = render(evidence)
    assert "for want of a finite score on every task: ties." in page
    assert "1 of 2 tasks" in page


# ---------------------------------------------------------------------------------------------
# Means, intervals, groups
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Numbers and scales
# ---------------------------------------------------------------------------------------------


def test_numbers_are_for_people() -> None:
    assert [humanise_seconds(s) for s in (0, 0.0021, 0.42, 12.34, 59.97, 252, 7500, None)] == [
        "0.00 s", "2.1 ms", "0.42 s", "12.3 s", "1 min 00 s", "4 min 12 s", "2 h 05 min", "–",
    ]  # fmt: skip
    assert [humanise_bytes(b) for b in (512, 1536, 2**30, 1024**2 - 1, None)] == [
        "512 B", "1.5 KiB", "1.0 GiB", "1.0 MiB", "–",
    ]  # fmt: skip
    assert [number_text(n) for n in (3, 12345, 0.5, -12.5, 1234.5, 1e-5, math.nan, -math.inf)] == [
        "3", "12,345", "0.500", "−12.50", "1,234", "1.00e−05", "not a number", "−∞",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.52, 0.88], ["0.5", "0.6", "0.7", "0.8", "0.9"]),
        ([0.0, 20.0], ["0", "5", "10", "15", "20"]),
        ([-3.0, 4.0], ["−4", "−2", "0", "2", "4"]),
        ([1000.0, 9000.0], ["0", "2,000", "4,000", "6,000", "8,000", "10,000"]),
        ([0.7, 0.7], ["0.60", "0.65", "0.70", "0.75", "0.80"]),
        ([math.nan, math.inf], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(values: list[float], ticks: list[str]) -> None:
    scale = Scale.over(values)
    assert [scale.text(tick) for tick in scale.ticks] == ticks


def test_a_scale_of_shares_ends_at_one_unless_the_values_do_not() -> None:
    assert Scale.over([0.42, 0.97], share=True).high == 1.0
    assert Scale.over([42.0, 97.0], share=True).high >= 97.0


def test_many_orders_of_magnitude_get_powers_of_ten() -> None:
    scale = Scale.powers([2e-5, 3.0])
    assert scale.text(scale.low) == "10⁻⁵"
    assert scale.part(1e-5) == 0.0
    assert scale.part(scale.high) == 1.0


# ---------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------


def test_intervals_are_drawn_where_they_belong() -> None:
    # Ticks run from 0.5 to 1.0, so that 0.7 lies at 40 %, 0.65 at 30 % and 0.8 at 60 %.
    look = Look("result", "circle")
    lanes = [
        Lane("a", (Mark(look, 0.7, 0.65, 0.8, "a", parts=(0.75,)),)),
        Lane("b", (Mark(look, 0.55, math.nan, math.nan, "b"),)),
        Lane("c", (Mark(look, 0.95, 0.91, 0.99, "c"),)),
    ]
    svg = ElementTree.fromstring(dot_plot("Title", "accuracy", lanes, share=True))
    first, second, _ = svg.findall(f"{SVG}g")
    whisker, seed = first.findall(f"{SVG}line")
    assert (whisker.get("x1"), whisker.get("x2")) == ("30%", "60%")
    assert seed.get("x1") == "50%"
    assert [
        dot.get("x") for dot in (*first.findall(f"{SVG}svg"), *second.findall(f"{SVG}svg"))
    ] == [
        "40%",
        "10%",
    ]
    assert second.find(f"{SVG}line") is None
    ticks = [text.text for text in svg.findall(f"{SVG}text[@class='tick middle']")]
    assert ticks == ["0.5", "0.6", "0.7", "0.8", "0.9", "1.0"]


def test_lines_are_drawn_where_they_belong_and_broken_at_gaps() -> None:
    # x runs from 0 to 4, y from 0 to 2 on a height of 220.
    series = Series(name="s", steps=[0, 1, 2, 3, 4], values=[0.0, 2.0, math.nan, 1.0, 2.0])
    figure = line_figure(Plot(title="t", x="x", y="y", series=[series]))
    assert figure is not None
    path = ElementTree.fromstring(figure.svg).find(f".//{SVG}path")
    assert path is not None
    assert path.get("d") == "M0 220L25 0M75 110L100 0"
    assert figure.note == "1 value that is not a finite number is left out of the plot."


def test_of_many_lines_the_highest_are_coloured_and_all_are_named() -> None:
    series = [Series(name=f"s{i}", steps=[0, 1], values=[0, i]) for i in range(12)]
    figure = line_figure(Plot(title="t", x="x", y="y", series=series))
    assert figure is not None
    labels = [key.label for key in figure.legend]
    assert labels == [*(f"s{i}" for i in range(5, 12)), "grey: s0, s1, s2, s3, s4"]


def test_a_plot_without_a_finite_value_is_left_out() -> None:
    assert line_figure(Plot(title="t", x="x", y="y", series=[])) is None
    nothing = Series(name="s", steps=[0], values=[math.inf])
    assert line_figure(Plot(title="t", x="x", y="y", series=[nothing])) is None


@pytest.mark.parametrize("evidence", [run_evidence(), compare_evidence()], ids=["run", "compare"])
def test_every_plot_is_xml_with_a_title_and_a_description(evidence: Evidence) -> None:
    plots = re.findall(r"<svg[^>]*role=\"img\".*?</svg></div>", render(evidence), flags=re.DOTALL)
    assert plots
    for plot in plots:
        svg = ElementTree.fromstring(plot.removesuffix("</div>"))
        assert svg.findtext(f"{SVG}title")
        assert svg.findtext(f"{SVG}desc")


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


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


def hostile_evidence() -> Evidence:
    step = Step(
        task=HOSTILE,
        method=HOSTILE,
        summary=HOSTILE,
        paper="javascript:alert(1)",
        settings={HOSTILE: HOSTILE},
        job={"base": Path(HOSTILE.replace("\x00", ""))},
        inputs={HOSTILE: HOSTILE},
        timings={HOSTILE: 1.0},
        findings=[Finding(code=HOSTILE, severity="serious", about=HOSTILE, message=HOSTILE)],
        scores=[score(HOSTILE, HOSTILE, 0.5, metric=HOSTILE)],
        shares=[Share(member=HOSTILE, share=1.0, taken=True, reason=HOSTILE)],
        plots=[
            Plot(
                title=HOSTILE,
                x=HOSTILE,
                y=HOSTILE,
                series=[Series(name=HOSTILE, steps=[0, 1], values=[0, 1])],
            )
        ],
        tables=[Table(title=HOSTILE, columns=[HOSTILE], rows=[[HOSTILE]])],
        facts={"kept": HOSTILE},
    )
    rows = [
        Row(label=HOSTILE, method=HOSTILE, scores=[score("result", HOSTILE, 0.5)], folder=HOSTILE),
        Row(label=HOSTILE, method="b", status="failed", error=HOSTILE, settings={"a": HOSTILE}),
        Row(label=HOSTILE, method="b", status="failed", error=HOSTILE, settings={"a": "other"}),
    ]
    names = {HOSTILE: HOSTILE}
    return Evidence(
        title=HOSTILE, recipe=names, versions=names, machine=names, steps=[step], rows=rows
    )


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
    assert f"script-src 'sha256-{_sha256(script)}'" in page
    assert "default-src 'none'" in page


def test_the_same_evidence_gives_the_same_bytes() -> None:
    assert render(compare_evidence()) == render(compare_evidence())


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
)
MEASURE = """
var faults = [];
addEventListener("error", function (event) { faults.push(String(event.message)); });
addEventListener("securitypolicyviolation", function (event) {
  faults.push(event.violatedDirective);
});
function all(selector) { return Array.from(document.querySelectorAll(selector)); }
function shown() { return all("[data-metric]").filter(function (part) { return !part.hidden; }); }
function sortByFirstColumn(table) {
  table.tHead.querySelector("button").click();
  return Array.from(table.tBodies[0].rows).map(function (row) { return row.cells[0].textContent; });
}
addEventListener("load", function () {
  var texts = all(".canvas > svg text").filter(function (each) {
    return each.getBoundingClientRect().width > 0;
  });
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    left: Math.min(...texts.map(function (each) { return each.getBoundingClientRect().left; })),
    right: Math.max(...texts.map(function (each) { return each.getBoundingClientRect().right; })),
    smallest: Math.min(...texts.map(function (each) {
      return parseFloat(getComputedStyle(each).fontSize);
    })),
    sorted: all("table.rows[data-sortable]").map(sortByFirstColumn),
    shown: shown().length,
    metrics: all("[data-metric]").length,
    faults: faults
  }), "*");
});
"""

# Headless Chromium has no window under 500 pixels, so the page goes into a frame of its width.
FRAME = """<!doctype html>
<iframe src="page.html" style="width:{width}px;height:1000px;border:0"></iframe>
<script>
addEventListener("message", function (event) {{ document.body.dataset.measured = event.data; }});
</script>"""


def measure(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What a browser says about the page at that width, with the page's own policy in force."""
    probed = page.replace("script-src ", f"script-src 'sha256-{_sha256(MEASURE)}' ", 1)
    probed = probed.replace("<title>", f"<script>{MEASURE}</script><title>", 1)
    (folder / "page.html").write_text(probed, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-measured="(.*?)"', done.stdout)
    assert found, done.stdout[:2000]
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium found: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("make", [run_evidence, compare_evidence, hostile_evidence])
def test_the_page_fits_its_window(make: Any, width: int, tmp_path: Path) -> None:
    measured = measure(render(make()), width, tmp_path)
    assert measured["width"] == width
    assert measured["scroll"] <= width
    assert measured["left"] >= 0
    assert measured["right"] <= width
    assert measured["smallest"] >= 12
    assert measured["faults"] == []


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium found: apt-get install chromium")
def test_tables_sort_and_the_picker_shows_one_metric(tmp_path: Path) -> None:
    evidence = compare_evidence()
    for each in evidence.rows:
        each.scores += [perplexity("result", each_score.task, 9.0) for each_score in each.scores]
    measured = measure(render(evidence), 1280, tmp_path)
    (labels,) = measured["sorted"]
    assert labels == sorted(labels)
    assert len(labels) == 14
    assert (measured["shown"], measured["metrics"]) == (1, 2)
    still = re.sub(r"<script>.*?</script>", "", render(evidence), flags=re.DOTALL)
    assert measure(still, 1280, tmp_path)["shown"] == 2
