"""Numbers, scales and plots."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from report_evidence import compare_evidence, run_evidence

from germane.core.evidence import Evidence, Plot, Series
from germane.core.report.pages import render
from germane.core.report.plots import Lane, Look, Mark, dot_plot, line_figure
from germane.core.report.scales import Scale
from germane.core.report.text import humanise_bytes, humanise_seconds, number_text

SVG = "{http://www.w3.org/2000/svg}"


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
    assert Scale.over([1.0], share=True).high == 1.0
    assert Scale.over([42.0, 97.0], share=True).high >= 97.0


def test_many_orders_of_magnitude_get_powers_of_ten() -> None:
    scale = Scale.powers([2e-5, 3.0])
    assert scale.text(scale.low) == "10⁻⁵"
    assert scale.part(1e-5) == 0.0
    assert scale.part(scale.high) == 1.0


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
    assert [dot.get("x") for dot in (*first.findall(f"{SVG}svg"), *second.findall(f"{SVG}svg"))] == [
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
