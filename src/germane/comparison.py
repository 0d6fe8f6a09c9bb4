"""Many methods, one job, one table.

A comparison is a grid of methods, settings and seeds. Each row is a recipe run in a process of its
own: a row that fails, or is killed, is a row that says so; a comparison that is stopped goes on
with the rows that are missing. Rows run here, or on a Ray cluster that sees the same files.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from germane.core.errors import MissingExtra, OutputExists, SettingError
from germane.core.evidence import FILE_NAME, Evidence, Row
from germane.core.progress import announce, track
from germane.job import job_class
from germane.recipe import Recipe, Result, check

_LONGEST_ERROR = 80  # characters of a failed row's message in the table; all of it is in the report
_WEIGHTS = ("*.safetensors", "heads", "tasks", "steps")


@dataclass(frozen=True)
class Cell:
    """One row of the grid: a recipe and the folder it is run in."""

    label: str
    method: str
    settings: dict[str, Any]
    seed: int
    recipe: Recipe
    folder: Path


def compare(
    what: Recipe | str,
    *,
    methods: Sequence[str],
    out: str | os.PathLike[str],
    arguments: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    vary: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    on: str = "",
    workers: int = 1,
    keep: bool = False,
    resume: bool = False,
) -> Result:
    """Run several methods on one job and put them into one table.

    Args:
        what: A recipe, whose last step's method is replaced, or the name of a task.
        methods: Names of methods of that task.
        out: Folder of the comparison.
        arguments: The task's arguments, where `what` is a task.
        seeds: Every method is run once with each.
        vary: method -> setting -> values: a row for each combination.
        settings: method -> setting -> value, for all its rows.
        on: "" for this machine, "ray" or "ray://host:port" for a cluster.
        workers: Rows at a time on this machine.
        keep: Keep every row's model, not only its evidence.
        resume: Take over the finished rows of an earlier run.

    Raises:
        GermaneError: Before any row is run, for what is wrong with all of them.
    """
    recipe = Recipe(steps=[{"task": what, **(arguments or {})}]) if isinstance(what, str) else what
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise OutputExists(f"{folder}: is there already; --resume goes on with it, or choose another.")
    cells = list(_grid(recipe, methods, seeds, vary or {}, settings or {}, folder))
    cells = [cells[0], *(_without_references(cell) for cell in cells[1:])]
    for cell in cells:
        check(cell.recipe)
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [cell for cell in cells if not (resume and _finished(cell))]
    announce(f"{len(cells)} rows, {len(cells) - len(waiting)} of them done before")
    threads = max(1, (os.cpu_count() or 1) // workers)
    runs = _on_ray(waiting, on, keep) if on else _here(waiting, workers, threads, keep)
    for _ in track(runs, "rows", len(waiting)):
        pass
    evidence = Evidence.begin(
        recipe.title or folder.name, recipe.model_dump(exclude_defaults=True), "compare"
    )
    rows = [_row(cell) for cell in cells]
    references = _references(cells)
    evidence.rows = [*references, *rows]
    kind = job_class(recipe.steps[-1]["task"])
    evidence.tables, evidence.scatters = kind.summarise(rows, references)
    _write(evidence, folder)
    return Result(folder, evidence)


def _grid(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: Sequence[int],
    vary: Mapping[str, Mapping[str, Sequence[Any]]],
    settings: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> Iterator[Cell]:
    for name in {*vary, *settings} - set(methods):
        raise SettingError(f"{name}: settings for a method that is not compared: {', '.join(methods)}.")
    for name in methods:
        varied = vary.get(name, {})
        for values in itertools.product(*varied.values()):
            changed = dict(zip(varied, values, strict=True))
            chosen = {**settings.get(name, {}), **changed}
            for seed in seeds:
                label = " ".join([name, *(f"{key}={value}" for key, value in changed.items())])
                number = "-".join([label.replace(" ", "-").replace("/", "-"), f"seed{seed}"])
                yield Cell(
                    label,
                    name,
                    chosen,
                    seed,
                    _with(recipe, name, chosen, seed),
                    folder / "rows" / number,
                )


def _with(recipe: Recipe, method: str, settings: dict[str, Any], seed: int) -> Recipe:
    """The recipe with another method in its last step."""
    *first, last = recipe.steps
    kept = last.get("settings", {}) if last.get("method") == method else {}
    steps = [*first, {**last, "method": method, "settings": {**kept, **settings}}]
    return recipe.model_copy(update={"steps": steps, "seed": seed})


def _without_references(cell: Cell) -> Cell:
    """The same row, but for the scores of base and members, which the first row measures for all."""
    *first, last = cell.recipe.steps
    recipe = cell.recipe.model_copy(update={"steps": [*first, {**last, "references": False}]})
    return replace(cell, recipe=recipe)


def _asked(cell: Cell) -> str:
    return yaml.safe_dump(cell.recipe.model_dump(exclude_defaults=True, mode="json"), sort_keys=True)


def _finished(cell: Cell) -> bool:
    asked = cell.folder / "recipe.yaml"
    return (
        (cell.folder / "result" / FILE_NAME).exists()
        and asked.exists()
        and asked.read_text(encoding="utf-8") == _asked(cell)
    )


def run_cell(cell: Cell, threads: int, keep: bool) -> None:
    """Run one row in a process of its own; what it says on stderr is kept in `log.txt`."""
    shutil.rmtree(cell.folder, ignore_errors=True)
    cell.folder.mkdir(parents=True)
    (cell.folder / "recipe.yaml").write_text(_asked(cell), encoding="utf-8")
    result = cell.folder / "result"
    command = [
        sys.executable,
        "-m",
        "germane",
        "run",
        str(cell.folder / "recipe.yaml"),
        "--out",
        str(result),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (cell.folder / "log.txt").open("w", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    if status:
        with (cell.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"exit status {status}\n")
    elif not keep:
        _drop_weights(result)


def _drop_weights(folder: Path) -> None:
    for pattern in _WEIGHTS:
        for entry in folder.glob(pattern):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _here(cells: Sequence[Cell], workers: int, threads: int, keep: bool) -> Iterator[None]:
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run_cell, cell, threads, keep) for cell in cells]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _on_ray(cells: Sequence[Cell], address: str, keep: bool) -> Iterator[None]:
    """Rows as Ray tasks of one core each; the cluster must see this folder and the pool's files."""
    try:
        import ray
    except ImportError:
        raise MissingExtra("ray", "ray", "--on ray") from None
    ray.init(address=None if address == "ray" else address, log_to_driver=False)
    try:
        remote = ray.remote(num_cpus=1)(run_cell)
        waiting = [remote.remote(_absolute(cell), 1, keep) for cell in cells]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(done[0])
    finally:
        ray.shutdown()


def _absolute(cell: Cell) -> Cell:
    return replace(cell, folder=cell.folder.absolute())


def _row(cell: Cell) -> Row:
    row = Row(
        label=cell.label,
        method=cell.method,
        settings=cell.settings,
        seed=cell.seed,
        folder=str(cell.folder),
    )
    if not _finished(cell):
        row.status, row.error = "failed", _last_words(cell)
        return row
    evidence = Evidence.read(cell.folder / "result")
    row.scores = [score for score in evidence.scores if score.subject == "result"]
    row.seconds = sum(step.seconds for step in evidence.steps)
    row.peak_memory_bytes = max(step.peak_memory_bytes for step in evidence.steps)
    return row


def _last_words(cell: Cell) -> str:
    """The error of a failed row: the last line it said before its exit status."""
    log = cell.folder / "log.txt"
    lines = log.read_text(encoding="utf-8").strip().split("\n") if log.exists() else []
    said = [line for line in lines if not line.startswith("exit status")]
    return (said or lines or ["was not run"])[-1]


def _references(cells: Sequence[Cell]) -> list[Row]:
    """Rows for what the result is compared with: the base, each member on its own task."""
    for cell in cells:
        if _finished(cell):
            scores = Evidence.read(cell.folder / "result").scores
            subjects = dict.fromkeys(score.subject for score in scores if score.subject != "result")
            return [
                Row(
                    label=subject,
                    status="reference",
                    scores=[s for s in scores if s.subject == subject],
                )
                for subject in subjects
            ]
    return []


def _write(evidence: Evidence, folder: Path) -> None:
    from germane.core.report import write_report

    evidence.write(folder)
    write_report(evidence, folder)


def print_table(evidence: Evidence) -> None:
    """The rows on stdout, best first: each task's score, or, of several metrics, the mean of each."""
    from rich.console import Console
    from rich.table import Table as Sheet

    scored = [row for row in evidence.rows if row.scores]
    metrics = list(dict.fromkeys(score.metric for row in scored for score in row.scores)) or ["score"]
    tasks = list(dict.fromkeys(score.task for row in scored for score in row.scores))
    columns = [f"mean {metrics[0]}", *tasks] if len(metrics) == 1 else metrics
    sheet = Sheet(box=None, pad_edge=False)
    for name in ("method", "seed", *columns, "seconds", ""):
        sheet.add_column(name, justify="left" if name in ("method", "") else "right", no_wrap=True)
    for row in sorted(evidence.rows, key=lambda row: _order(row, metrics[0])):
        values: dict[str, float | None] = {metric: row.mean(metric) for metric in metrics}
        if len(metrics) == 1:
            values = {score.task: score.value for score in row.scores}
            values[f"mean {metrics[0]}"] = row.mean(metrics[0])
        sheet.add_row(
            row.label,
            "" if row.seed is None else str(row.seed),
            *("" if values.get(name) is None else f"{values[name]:.3f}" for name in columns),
            "" if row.seconds is None else f"{row.seconds:.1f}",
            row.error[:_LONGEST_ERROR] if row.status == "failed" else row.status,
        )
    Console(width=None if sys.stdout.isatty() else 200).print(sheet)


def _order(row: Row, metric: str) -> tuple[int, float]:
    mean = row.mean(metric)
    if mean is None:
        return 1, 0.0
    return 0, -mean if row.scores[0].higher_is_better else mean
