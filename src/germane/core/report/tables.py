"""Tables: those of the evidence as they are, the scores of a run, the rows of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from germane.core.evidence import Row, Score, Table
from germane.core.report.comparison import (
    LOWER,
    Comparison,
    Group,
    by_subject,
    scores_by_task,
    settings_text,
)
from germane.core.report.means import Mean
from germane.core.report.text import (
    humanise_bytes,
    humanise_seconds,
    interval_text,
    number_text,
    score_text,
    sentence,
    short,
)


@dataclass(frozen=True)
class Cell:
    """One cell: what is printed, what it is sorted by, and what stands small beside it.

    Attributes:
        heat: How dark the cell is, from 0 to 1, where it is shaded.
    """

    text: str = "–"
    sort: float | str = ""
    detail: str = ""
    link: str = ""
    span: int = 1
    heat: float | None = None
    best: bool = False
    style: str = ""


@dataclass(frozen=True)
class Column:
    """A heading, and whether numbers stand under it."""

    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Body:
    """Rows that stand together under an optional heading."""

    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    style: str = ""


@dataclass(frozen=True)
class Grid:
    """A table of the page; only the first body is sorted."""

    title: str
    columns: tuple[Column, ...]
    bodies: tuple[Body, ...]
    note: str = ""
    style: str = ""


def titled(text: str, higher_is_better: bool) -> str:
    """A title for values of a metric; it says where lower is better."""
    return sentence(text) + ("" if higher_is_better or LOWER in text else LOWER)


def table_grid(table: Table) -> Grid | None:
    """A table of the evidence as it is, or None where it has no rows."""
    if not table.rows:
        return None
    width = max(len(table.columns), *map(len, table.rows))
    rows = [[*row, *[None] * (width - len(row))] for row in table.rows]
    titles = [*table.columns, *[""] * (width - len(table.columns))]
    numeric = [not any(isinstance(value, str) for value in column) for column in zip(*rows, strict=True)]
    cells = tuple(tuple(_value_cell(value) for value in row) for row in rows)
    return Grid(table.title, tuple(map(Column, titles, numeric)), (Body(cells),))


def _value_cell(value: str | float | None) -> Cell:
    if value is None:
        return Cell()
    if isinstance(value, str):
        return Cell(value, sort=value)
    return Cell(number_text(value), sort=_sort_key(value))


def _sort_key(value: float | None) -> float | str:
    return value if value is not None and math.isfinite(value) else ""


# --- Scores of a run


def scores_grid(scores: Sequence[Score]) -> Grid:
    """The scores of one metric: tasks by subjects."""
    subjects = by_subject(scores)
    rows = []
    for task in dict.fromkeys(score.task for score in scores):
        cells = [_score_cell([s for s in each if s.task == task]) for each in subjects.values()]
        counts = sorted({score.n for score in scores if score.task == task})
        number = Cell(", ".join(f"{count:,}" for count in counts), sort=counts[0])
        rows.append((Cell(task, sort=task), *cells, number))
    columns = (Column("task", numeric=False), *map(Column, subjects), Column("n"))
    return Grid("", columns, (Body(tuple(rows)),))


def _score_cell(scores: Sequence[Score]) -> Cell:
    """The scores of a subject on a task: almost always one, or none."""
    if not scores:
        return Cell()
    first = scores[0]
    text = ", ".join(score_text(score.value, score.metric) for score in scores)
    detail = interval_text(first, first.metric) if len(scores) == 1 else ""
    return Cell(text, sort=_sort_key(first.value), detail=detail)


# --- Methods by tasks


def heat_grid(comparison: Comparison, metric: str) -> Grid | None:
    """Methods by tasks, each cell shaded by its place between the worst and best of its column."""
    tasks = comparison.tasks(metric)

    def scored(groups: Sequence[Group]) -> list[Group]:
        return [g for g in groups if any(g.task_value(metric, task) is not None for task in tasks)]

    groups, references = scored(comparison.groups), scored(comparison.references)
    if len(tasks) < 2 or not groups:
        return None
    ranked = [id(group) for group, _ in comparison.ranked(metric)]
    groups.sort(key=lambda group: ranked.index(id(group)) if id(group) in ranked else len(ranked))
    higher = comparison.higher_is_better(metric)
    columns = [_heat_column(groups, references, metric, task, higher) for task in tasks]
    rows = [
        (Cell(group.label, sort=group.label), *cells)
        for group, *cells in zip((*groups, *references), *columns, strict=True)
    ]
    bodies = [Body(tuple(rows[: len(groups)]))]
    if references:
        bodies.append(Body(tuple(rows[len(groups) :]), title="For reference", style="reference"))
    seeds = any(len(group.rows) > 1 for group in groups)
    return Grid(
        title=titled(f"{metric} of each method on each task", higher),
        columns=(Column("method", numeric=False), *map(Column, tasks)),
        bodies=tuple(bodies),
        note=("Means over seeds. " if seeds else "")
        + "Shaded from the worst of a column to its best, the best method bold.",
        style="heat",
    )


def _heat_column(
    groups: Sequence[Group], references: Sequence[Group], metric: str, task: str, higher: bool
) -> list[Cell]:
    ours = [group.task_value(metric, task) for group in groups]
    every = [*ours, *(group.task_value(metric, task) for group in references)]
    known = [value for value in every if value is not None]
    if not any(value is not None for value in ours):
        return [Cell()] * len(every)
    better, worse = (max, min) if higher else (min, max)
    worst, span = worse(known), better(known) - worse(known)
    winner = better(value for value in ours if value is not None)
    cells = []
    for place, value in enumerate(every):
        if value is None:
            cells.append(Cell())
            continue
        heat = round((value - worst) / span, 3) if span else 0.5
        best = place < len(ours) and value == winner
        cells.append(Cell(score_text(value, metric), sort=value, heat=heat, best=best))
    return cells


# --- The rows of a comparison

Parts = list[tuple[Column, Callable[[Row], Cell]]]


def rows_grid(rows: Sequence[Row], comparison: Comparison, link: Callable[[Row], str]) -> Grid | None:
    """Every row, without the columns that would be empty; `link` is the address of a row's report."""
    if not rows:
        return None
    head = _head(rows, comparison, link)
    scores, order = _scores(comparison)
    tail = _tail(rows, bool(scores))

    def cells(row: Row) -> tuple[Cell, ...]:
        """The cells of one row; a failed one has its message where the scores would be."""
        middle = [cell(row) for _, cell in scores]
        if row.status == "failed" and scores:
            middle = [Cell(row.error or "no message", span=len(scores), style="error")]
        return (*(cell(row) for _, cell in head), *middle, *(cell(row) for _, cell in tail))

    bodies = []
    for status, title in (("done", ""), ("failed", "Failed"), ("reference", "For reference")):
        found = [row for row in rows if row.status == status]
        if status == "done":
            found.sort(key=order)
        if found:
            bodies.append(Body(tuple(map(cells, found)), title=title, style=status))
    columns = tuple(column for column, _ in (*head, *scores, *tail))
    return Grid("", columns, tuple(bodies), style="rows")


def _head(rows: Sequence[Row], comparison: Comparison, link: Callable[[Row], str]) -> Parts:
    def label(row: Row) -> Cell:
        name = short(row.method)
        detail = name if name not in row.label else ""
        return Cell(row.label, sort=row.label, detail=detail, link=link(row))

    def settings(row: Row) -> Cell:
        text = settings_text(row, comparison.varying)
        return Cell(text, sort=text, style="settings")

    def seed(row: Row) -> Cell:
        return Cell("", sort="") if row.seed is None else Cell(str(row.seed), sort=row.seed)

    parts: Parts = [(Column("method", numeric=False), label)]
    if any(settings(row).text for row in rows):
        parts.append((Column("settings", numeric=False), settings))
    if any(row.seed is not None for row in rows):
        parts.append((Column("seed"), seed))
    return parts


def _scores(comparison: Comparison) -> tuple[Parts, Callable[[Row], tuple[bool, float]]]:
    """The mean and the tasks of the first metric, the means of the others; and who comes first."""
    if not comparison.metrics:
        return [], lambda row: (True, 0.0)
    first, *others = comparison.metrics
    tasks = comparison.tasks(first)
    sign = -1.0 if comparison.higher_is_better(first) else 1.0

    def mean_of(row: Row, metric: str) -> Mean | None:
        return Group(row.label, (row,)).mean(metric, comparison.tasks(metric))

    def order(row: Row) -> tuple[bool, float]:
        mean = mean_of(row, first)
        return mean is None, sign * mean.value if mean else 0.0

    def mean_part(metric: str) -> tuple[Column, Callable[[Row], Cell]]:
        def cell(row: Row) -> Cell:
            mean = mean_of(row, metric)
            if mean is None:
                scored = len(scores_by_task(row, metric))
                return Cell(detail=f"{scored} of {len(comparison.tasks(metric))} tasks" if scored else "")
            detail, style = interval_text(mean, metric), "mean" if metric == first else ""
            return Cell(score_text(mean.value, metric), sort=mean.value, detail=detail, style=style)

        return Column(f"mean {metric}"), cell

    def task_part(task: str) -> tuple[Column, Callable[[Row], Cell]]:
        def cell(row: Row) -> Cell:
            counted = scores_by_task(row, first).get(task)
            every = [score for score in row.scores if (score.metric, score.task) == (first, task)]
            return _score_cell([counted] if counted else every[-1:])

        return Column(task if len(tasks) > 1 else f"{first}, {task}"), cell

    mean = [mean_part(first)] if len(tasks) > 1 else []
    return [*mean, *map(task_part, tasks), *map(mean_part, others)], order


def _tail(rows: Sequence[Row], scored: bool) -> Parts:
    def seconds(row: Row) -> Cell:
        return Cell(humanise_seconds(row.seconds), sort=_sort_key(row.seconds))

    def memory(row: Row) -> Cell:
        return Cell(humanise_bytes(row.peak_memory_bytes), sort=_sort_key(row.peak_memory_bytes))

    def status(row: Row) -> Cell:
        detail = "" if scored else row.error
        return Cell(row.status, sort=row.status, detail=detail, style=f"status {row.status}")

    parts: Parts = []
    if any(row.seconds is not None for row in rows):
        parts.append((Column("time"), seconds))
    if any(row.peak_memory_bytes is not None for row in rows):
        parts.append((Column("peak memory"), memory))
    return [*parts, (Column("status", numeric=False), status)]
