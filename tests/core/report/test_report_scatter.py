from germane.core.evidence import Evidence, Scatter, ScatterPoint
from germane.core.report.pages import render
from germane.core.report.plots import front, scatter_figure


def point(name: str, x: float, y: float, reference: bool = False) -> ScatterPoint:
    return ScatterPoint(name=name, x=x, y=y, reference=reference)


def test_the_front_by_hand():
    points = [point("a", 0.1, 0.2), point("b", 0.2, 0.1), point("c", 0.3, 0.9), point("d", 0.1, 0.1)]
    assert [p.name for p in front(points, lower_x=True)] == ["a", "c"]
    assert [p.name for p in front(points, lower_x=False)] == ["c"]


def test_the_plot_names_every_point_and_the_front():
    points = [point("one & two", 0.1, 0.5), point("other", 0.4, 0.9), point("base", 0.9, 0.95, True)]
    figure = scatter_figure(Scatter(title="t", x="memory", y="utility", points=points))
    assert "one &amp; two" in figure.svg
    assert "base" in figure.svg
    assert figure.note == "No other method is better in both than: one & two, other."


def test_points_that_are_no_numbers_are_left_out():
    assert scatter_figure(Scatter(title="t", x="x", y="y", points=[point("nan", float("nan"), 1)])) is None


def test_it_is_on_the_page():
    evidence = Evidence.begin("c", {}, "compare")
    evidence.scatters = [Scatter(title="What it costs", x="x", y="y", points=[point("a", 1, 2)])]
    assert "What it costs" in render(evidence)
