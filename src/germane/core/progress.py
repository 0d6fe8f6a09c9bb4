"""Progress of long work: bars on stderr, nothing where stderr is not a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

Item = TypeVar("Item")


def announce(message: str) -> None:
    """One line on stderr about what happens now."""
    if not os.environ.get("GERMANE_QUIET"):
        print(message, file=sys.stderr, flush=True)


def _visible() -> bool:
    return sys.stderr.isatty() and not os.environ.get("GERMANE_QUIET")


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield `items`, showing how far the work has come."""
    if not _visible():
        yield from items
        return
    with bar(label, total) as advance:
        for item in items:
            yield item
            advance()


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, amount: float = 1, note: str = "") -> None:
        """By so much, with a note beside the bar."""


def _no_bar(amount: float = 1, note: str = "") -> None:
    """Moves nothing on, where no bar is shown."""


@contextmanager
def bar(label: str, total: float | None = None) -> Iterator[Advance]:
    """A bar for work that is not a plain loop; yields a function that moves it on."""
    if not _visible():
        yield _no_bar
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total, note="")

        def advance(amount: float = 1, note: str = "") -> None:
            progress.update(task, advance=amount, note=note)

        yield advance
