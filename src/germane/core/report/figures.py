"""The plots of scores: of a run, subjects on each task; of a comparison, the methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from germane.core.evidence import Score
from germane.core.report.comparison import Comparison, Group, by_subject
from germane.core.report.means import Mean, is_share, mean_over_tasks
from germane.core.report.plots import (
    COLOURS,
    Figure,
    Key,
    Lane,
    Look,
    Mark,
    dot_key,
    dot_plot,
    dropped_note,
    reference_key,
    seeds_key,
)
from germane.core.report.tables import titled
from germane.core.report.text import interval_text, score_text

LOOKS = {
    "base": Look("base", "square"),
    "result": Look("result", "circle"),
    "own": Look("own", "diamond"),
}


def scores_figure(metric: str, scores: Sequence[Score]) -> Figure | None:
    """The scores of one metric, or None where none is finite."""
    finite = [score for score in scores if math.isfinite(score.value)]
    if not finite:
        return None
    subjects = by_subject(finite)
    looks = _looks(list(subjects))
    tasks = list(dict.fromkeys(score.task for score in finite))
    mean = _mean_lane(metric, tasks, subjects, looks)
    lanes = [mean] if len(tasks) > 1 and mean.marks else []
    note = "Whiskers are 95 % intervals."
    if lanes:
        note += " The mean's comes from the tasks' own, their standard errors added in quadrature."
    for place, task in enumerate(tasks):
        here = [score for each in subjects.values() for score in each if score.task == task]
        marks = tuple(_mark(looks[s.subject], f"{task}, {s.subject}", s, metric) for s in here)
        results = [score_text(score.value, metric) for score in here if score.subject == "result"]
        text = results[0] if len(results) == 1 else ""
        lanes.append(Lane(task, marks, text, rule=place == 0 and bool(lanes)))
    names = {"own": "own (each member on its own task)"}
    title = titled(f"{metric} on each task", scores[0].higher_is_better)
    return Figure(
        kind="dots",
        title=title,
        svg=dot_plot(title, metric, lanes, share=is_share(metric)),
        legend=tuple(dot_key(look, names.get(name, name)) for name, look in looks.items()),
        below=metric,
        note=" ".join(filter(None, [note, dropped_note(len(scores) - len(finite))])),
    )


def _looks(subjects: Sequence[str]) -> dict[str, Look]:
    looks = {subject: LOOKS[subject] for subject in subjects if subject in LOOKS}
    shapes = ("triangle", "circle", "square", "diamond")
    for index, subject in enumerate(subject for subject in subjects if subject not in LOOKS):
        looks[subject] = Look(f"series-{1 + index % (COLOURS - 1)}", shapes[index % len(shapes)])
    return looks


def _mean_lane(
    metric: str,
    tasks: Sequence[str],
    subjects: Mapping[str, Sequence[Score]],
    looks: Mapping[str, Look],
) -> Lane:
    """The means of those subjects that have a score on every task: others do not compare."""
    complete = {
        subject: mean_over_tasks(scores)
        for subject, scores in subjects.items()
        if {score.task for score in scores} == set(tasks)
    }
    marks = [
        _mark(looks[subject], f"mean over tasks, {subject}", mean, metric)
        for subject, mean in complete.items()
    ]
    text = score_text(complete["result"].value, metric) if "result" in complete else ""
    return Lane("mean over tasks", tuple(marks), text)


def _mark(look: Look, name: str, measured: Score | Mean, metric: str) -> Mark:
    details = [interval_text(measured, metric)]
    details += [f"n {measured.n}"] if isinstance(measured, Score) else []
    inside = ", ".join(filter(None, details))
    title = f"{name}: {score_text(measured.value, metric)}" + (f" ({inside})" if inside else "")
    parts = measured.parts if isinstance(measured, Mean) else ()
    return Mark(look, measured.value, measured.low, measured.high, title, parts)


def compare_figure(comparison: Comparison, metric: str) -> Figure | None:
    """Methods and references by their means, or None where no method has one."""
    ranked = comparison.ranked(metric)
    references = comparison.ranked(metric, references=True)
    if not ranked:
        return None
    lanes = []
    for place, (group, mean) in enumerate([*ranked, *references]):
        look = LOOKS["result" if place < len(ranked) else "base"]
        mark = _mark(look, group.label, mean, metric)
        text = score_text(mean.value, metric)
        lanes.append(Lane(group.label, (mark,), text, rule=place == len(ranked)))
    base, tasks = comparison.base(metric), comparison.tasks(metric)
    axis = f"mean {metric} over {len(tasks)} tasks" if len(tasks) > 1 else f"{metric} on {tasks[0]}"
    title = titled(f"{axis}, by method", comparison.higher_is_better(metric))
    line = None if base is None else base.value
    missing = [group.label for group in comparison.groups if group.mean(metric, tasks) is None]
    note = _rule_note([*ranked, *references])
    if missing:
        note += f" Not shown, for want of a finite score on every task: {', '.join(missing)}."
    return Figure(
        kind="dots",
        title=title,
        svg=dot_plot(title, axis, lanes, share=is_share(metric), line=line),
        legend=_compare_legend(ranked, references, line is not None),
        below=axis,
        note=note,
    )


def _compare_legend(
    ranked: Sequence[tuple[Group, Mean]], references: Sequence[tuple[Group, Mean]], line: bool
) -> tuple[Key, ...]:
    keys = [dot_key(LOOKS["result"], "method")]
    keys += [dot_key(LOOKS["base"], "reference")] if references else []
    keys += [seeds_key("each seed")] if any(mean.parts for _, mean in ranked) else []
    keys += [reference_key("the base's mean")] if line else []
    return tuple(keys)


def _rule_note(drawn: Sequence[tuple[Group, Mean]]) -> str:
    """Under the plot: which rule each method's interval comes from."""
    texts = {
        "seeds": "t intervals over seeds",
        "tasks": "from the tasks' own intervals, standard errors added in quadrature",
        "task": "the score's own interval",
    }
    rules: dict[str, list[str]] = {}
    for group, mean in drawn:
        rules.setdefault(mean.rule, []).append(group.label)
    parts = [
        texts[rule] + (f" for {', '.join(labels)}" if len(rules) > 1 else "")
        for rule, labels in rules.items()
    ]
    return f"Whiskers are 95 % intervals: {'; '.join(parts)}."
