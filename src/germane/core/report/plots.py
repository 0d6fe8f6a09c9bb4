"""Plots as SVG: dots with whiskers, and lines.

Horizontal coordinates are percentages of the plot's width and text has a fixed size, so that one
plot serves a wide window, a phone and paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from markupsafe import Markup, escape

from germane.core.evidence import Plot, Scatter, ScatterPoint, Series
from germane.core.report.scales import Scale
from germane.core.report.text import count, cut, number_text

COLOURS = 7  # --series-0 to --series-6 in the style sheet
LABEL_LENGTH = 27
LINE_HEIGHT = 220
LANE = 14
ROW_GAP = 26
MANY_POINTS = 12

SHAPES = {
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "square": "M-4.5 -4.5h9v9h-9z",
    "diamond": "M0 -6l6 6l-6 6l-6 -6z",
    "triangle": "M0 -6l6 10.5h-12z",
}

Point = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """How a subject is drawn: a class of the style sheet and a shape."""

    style: str
    shape: str


@dataclass(frozen=True)
class Mark:
    """One dot with its whisker, and the small marks of its seeds."""

    look: Look
    value: float
    low: float
    high: float
    title: str
    parts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Lane:
    """One row of a dot plot: a label, its marks one under the other, and a number at the right."""

    label: str
    marks: tuple[Mark, ...]
    text: str = ""
    rule: bool = False  # whether a line sets the row apart from the one above


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    swatch: Markup
    label: str


@dataclass(frozen=True)
class Figure:
    """A plot with what stands around it."""

    kind: str
    title: str
    svg: Markup
    legend: tuple[Key, ...]
    above: str = ""
    below: str = ""
    note: str = ""


# --- Elements


def length_text(value: float) -> str:
    """A length with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def percent_text(part: float) -> str:
    """A part of the width."""
    return f"{length_text(100 * part)}%"


def _tag(name: str, *children: str, **attributes: str | float) -> Markup:
    """An element; children that are not Markup and all attributes are escaped."""
    text = Markup("").join(
        Markup(' {}="{}"').format(
            Markup(key.rstrip("_").replace("_", "-")),
            value if isinstance(value, str) else length_text(value),
        )
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), text, Markup("").join(map(escape, children)))


def _rule(x1: str | float, x2: str | float, y1: float, y2: float, style: str) -> Markup:
    return _tag("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=style)


def _svg(title: str, description: str, height: float, content: Iterable[str]) -> Markup:
    return _tag(
        "svg",
        _tag("title", title),
        _tag("desc", description),
        *content,
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        width="100%",
        height=height,
    )


def _x_axis(scale: Scale, y1: float, y2: float, style: str, label_y: float) -> list[Markup]:
    """A line from y1 to y2 at each tick, and the tick's label under it."""
    parts = []
    for tick in scale.ticks:
        place = percent_text(scale.part(tick))
        parts.append(_rule(place, place, y1, y2, style))
        parts.append(_tag("text", scale.text(tick), x=place, y=label_y, class_="tick middle"))
    return parts


# --- Dots


def dot_plot(
    title: str, axis: str, lanes: Sequence[Lane], *, share: bool, line: float | None = None
) -> Markup:
    """Dots with whiskers, one lane for each label; `line` is a value marked in all lanes.

    Values that are not finite are left out by the caller; whisker ends that are not finite make a
    dot without whisker.
    """
    marks = [mark for lane in lanes for mark in lane.marks]
    ends = [end for mark in marks for end in (mark.value, mark.low, mark.high, *mark.parts)]
    scale = Scale.over([*ends, *([] if line is None else [line])], share=share)
    *tops, bottom = accumulate((ROW_GAP + LANE * max(1, len(lane.marks)) for lane in lanes), initial=0)
    height = bottom + 8
    content = _x_axis(scale, 0, height, "grid", height + 18)
    if line is not None:
        place = percent_text(scale.part(line))
        content.append(_rule(place, place, 0, height, "reference"))
    for lane, top in zip(lanes, tops, strict=True):
        content += _lane(lane, scale, top)
    description = f"{axis}. " + "; ".join(mark.title for mark in marks)
    return _svg(title, description, height, content)


def _lane(lane: Lane, scale: Scale, top: float) -> list[Markup]:
    first = top + ROW_GAP - 4 + LANE / 2
    middle = first + LANE * (max(1, len(lane.marks)) - 1) / 2
    parts = [_rule(0, "100%", top + 2, top + 2, "rule")] if lane.rule else []
    label = (_tag("title", lane.label), _tag("tspan", cut(lane.label, LABEL_LENGTH)))
    # Two places for the label, beside and above the dots; the style sheet shows one by width.
    parts.append(_tag("text", *label, x=-14, y=middle + 4, class_="label beside"))
    parts.append(_tag("text", *label, x=0, y=top + 16, class_="label above"))
    parts += [_mark(mark, scale, first + LANE * index) for index, mark in enumerate(lane.marks)]
    if lane.text:
        parts.append(_tag("text", _tag("tspan", lane.text, dx=12), x="100%", y=middle + 4, class_="value"))
    return parts


def _mark(mark: Mark, scale: Scale, y: float) -> Markup:
    parts = [_tag("title", mark.title)]
    if math.isfinite(mark.low) and math.isfinite(mark.high):
        low, high = percent_text(scale.part(mark.low)), percent_text(scale.part(mark.high))
        parts.append(_rule(low, high, y, y, "whisker"))
    for part in mark.parts:
        place = percent_text(scale.part(part))
        parts.append(_rule(place, place, y + 7, y + 13, "seed"))
    dot = _tag("path", d=SHAPES[mark.look.shape])
    parts.append(_tag("svg", dot, x=percent_text(scale.part(mark.value)), y=y, class_="dot"))
    return _tag("g", *parts, class_=f"mark {mark.look.style}")


# --- Legends


def dot_key(look: Look, label: str) -> Key:
    """What the marks of a look stand for."""
    dot = _tag("g", _tag("path", d=SHAPES[look.shape]), transform="translate(14 8)", class_="dot")
    return _key(_tag("g", _rule(0, 28, 8, 8, "whisker"), dot, class_=f"mark {look.style}"), label)


def seeds_key(label: str) -> Key:
    """What the small marks under a dot stand for."""
    ticks = [_rule(x, x, 5, 11, "seed") for x in (7, 14, 21)]
    return _key(_tag("g", *ticks, class_="mark result"), label)


def reference_key(label: str) -> Key:
    """What the line through all lanes stands for."""
    return _key(_rule(14, 14, 0, 16, "reference"), label)


def _key(content: Markup, label: str) -> Key:
    swatch = _tag("svg", content, width=28, height=16, aria_hidden="true", class_="swatch")
    return Key(swatch, label)


def dropped_note(number: int) -> str:
    """That so many values could not be drawn."""
    if not number:
        return ""
    verb = "is" if number == 1 else "are"
    return f"{count(number, 'value')} that {verb} not a finite number {verb} left out of the plot."


# --- Lines


def line_figure(plot: Plot) -> Figure | None:
    """The lines of a plot, or None where none of its values is finite.

    Up to seven series have a colour and a dash of their own. Of more, those that end highest do,
    and the others are grey.
    """
    lines = {index: found for index, series in enumerate(plot.series) if (found := _stretches(series))}
    points = {index: [point for stretch in found for point in stretch] for index, found in lines.items()}
    if not points:
        return None
    values = [y for found in points.values() for _, y in found]
    steps = [x for found in points.values() for x, _ in found]
    horizontal = Scale.over(steps, whole=all(float(step).is_integer() for step in steps))
    vertical = _value_scale(values)
    coloured = sorted(points, key=lambda index: -points[index][-1][1])[:COLOURS]
    styles = {index: f"series-{place}" for place, index in enumerate(sorted(coloured))}
    content = _y_axis(vertical)
    content += _x_axis(horizontal, LINE_HEIGHT, LINE_HEIGHT + 5, "rule", LINE_HEIGHT + 19)
    content.append(_rule(0, "100%", LINE_HEIGHT, LINE_HEIGHT, "rule"))
    for index in sorted(points, key=lambda index: index in styles):
        few = index in styles and len(plot.series[index].values) <= MANY_POINTS
        line = _line(lines[index], horizontal, vertical, few)
        style = f"line {styles.get(index, 'series-rest')}"
        content.append(_tag("g", _tag("title", plot.series[index].name), *line, class_=style))
    described = [_series_text(plot.series[index].name, found) for index, found in points.items()]
    return Figure(
        kind="lines",
        title=plot.title,
        svg=_svg(plot.title, f"{plot.y} by {plot.x}. " + "; ".join(described), LINE_HEIGHT, content),
        legend=_line_legend(plot, points, styles),
        above=plot.y + (" (logarithmic scale)" if vertical.logarithmic else ""),
        below=plot.x,
        note=dropped_note(sum(len(series.values) for series in plot.series) - len(values)),
    )


def _stretches(series: Series) -> list[list[Point]]:
    """The points, broken where one is not finite."""
    points = zip(series.steps, series.values, strict=False)
    runs = groupby(points, key=lambda point: math.isfinite(point[0]) and math.isfinite(point[1]))
    return [list(run) for finite, run in runs if finite]


def _value_scale(values: Sequence[float]) -> Scale:
    low, high = min(values), max(values)
    if low > 0 and high / low > 1000:
        return Scale.powers(values)
    near_zero = 0 < low < 0.4 * high
    return Scale.over([*values, *([0.0] if near_zero else [])], share=low >= 0 and 0.5 < high <= 1)


def _y_axis(scale: Scale) -> list[Markup]:
    parts = []
    for tick in scale.ticks:
        y = LINE_HEIGHT * (1 - scale.part(tick))
        parts.append(_rule(0, "100%", y, y, "grid"))
        parts.append(_tag("text", scale.text(tick), x=-8, y=y + 4, class_="tick end"))
    return parts


def _line(
    stretches: Sequence[Sequence[Point]], horizontal: Scale, vertical: Scale, few: bool
) -> list[Markup]:
    """A path where points stand together; a dot at each where they are few, or one stands alone."""
    drawn = [
        [(100 * horizontal.part(x), LINE_HEIGHT * (1 - vertical.part(y))) for x, y in stretch]
        for stretch in stretches
    ]
    path = "".join(
        "M" + "L".join(f"{length_text(x)} {length_text(y)}" for x, y in stretch)
        for stretch in drawn
        if len(stretch) > 1
    )
    dots = [point for stretch in drawn for point in stretch if few or len(stretch) == 1]
    circles = [_tag("circle", cx=f"{length_text(x)}%", cy=y, r=2.5) for x, y in dots]
    return [_stretched(path), *circles] if path else circles


def _stretched(path: str) -> Markup:
    """A path in a box of 100 by the plot's height, stretched to the plot's width."""
    return _tag(
        "svg",
        _tag("path", d=path, vector_effect="non-scaling-stroke"),
        viewBox=f"0 0 100 {LINE_HEIGHT}",
        preserveAspectRatio="none",
        width="100%",
        height=LINE_HEIGHT,
    )


def _line_legend(plot: Plot, points: Mapping[int, object], styles: Mapping[int, str]) -> tuple[Key, ...]:
    keys = [(style, plot.series[index].name) for index, style in styles.items()]
    rest = [plot.series[index].name for index in points if index not in styles]
    if rest:
        keys.append(("series-rest", "grey: " + ", ".join(rest)))
    path = _tag("path", d="M0 8H28")
    return tuple(_key(_tag("g", path, class_=f"line {style}"), name) for style, name in keys)


def _series_text(name: str, points: Sequence[Point]) -> str:
    ends = points if len(points) == 1 else (points[0], points[-1])
    return f"{name}: " + ", ".join(f"{number_text(y)} at {x:g}" for x, y in ends)


# --- Scatter


def scatter_figure(scatter: Scatter) -> Figure | None:
    """Points between two aims, and the front of those that none surpasses in both; None without points."""
    points = [point for point in scatter.points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not points:
        return None
    horizontal, vertical = (Scale.over([getattr(p, axis) for p in points]) for axis in ("x", "y"))
    best = front([p for p in points if not p.reference], scatter.lower_x)
    content = _y_axis(vertical)
    content += _x_axis(horizontal, LINE_HEIGHT, LINE_HEIGHT + 5, "rule", LINE_HEIGHT + 19)
    content.append(_rule(0, "100%", LINE_HEIGHT, LINE_HEIGHT, "rule"))
    if len(best) > 1:
        path = _line([[(p.x, p.y) for p in best]], horizontal, vertical, few=False)
        content.append(_tag("g", _tag("title", "none is better in both"), *path, class_="line series-rest"))
    content += [_point(point, horizontal, vertical) for point in points]
    described = [f"{p.name}: {number_text(p.x)}, {number_text(p.y)}" for p in points]
    names = ", ".join(point.name for point in best)
    better = "left" if scatter.lower_x else "right"
    return Figure(
        kind="lines",
        title=scatter.title,
        svg=_svg(
            scatter.title, f"{scatter.y} by {scatter.x}. " + "; ".join(described), LINE_HEIGHT, content
        ),
        legend=(
            dot_key(Look("result", "circle"), "methods"),
            dot_key(Look("base", "square"), "references"),
        ),
        above=f"{scatter.y} (higher is better)",
        below=f"{scatter.x} (better to the {better})",
        note=f"No other method is better in both than: {names}." if best else "",
    )


def front(points: Sequence[ScatterPoint], lower_x: bool) -> list[ScatterPoint]:
    """The points that no other surpasses in one aim without falling behind in the other, by x."""
    sign = 1.0 if lower_x else -1.0
    found: list[ScatterPoint] = []
    for point in sorted(points, key=lambda p: (sign * p.x, -p.y)):
        if not found or point.y > found[-1].y:
            found.append(point)
    return found


def _point(point: ScatterPoint, horizontal: Scale, vertical: Scale) -> Markup:
    """A dot with its name beside it; the name stands on the side that has room."""
    part = horizontal.part(point.x)
    place, y = percent_text(part), LINE_HEIGHT * (1 - vertical.part(point.y))
    look = Look("base", "square") if point.reference else Look("result", "circle")
    dot = _tag("svg", _tag("path", d=SHAPES[look.shape]), x=place, y=y, class_="dot")
    offset, side = (-9, "tick end") if part > 0.6 else (9, "tick")
    name = _tag(
        "text", _tag("tspan", cut(point.name, LABEL_LENGTH), dx=offset), x=place, y=y + 4, class_=side
    )
    title = _tag("title", f"{point.name}: {number_text(point.x)}, {number_text(point.y)}")
    return _tag("g", title, dot, name, class_=f"mark {look.style}")
