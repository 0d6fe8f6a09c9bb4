"""Every error germane raises on purpose, on one page.

GermaneError
├── SettingError        a setting, recipe key or argument: unknown, of wrong type, out of bounds
├── UnknownName         no task, method or suite of that name
├── CheckpointError     a checkpoint cannot be read, or does not fit the others
├── RecordsError        a data file cannot be read, or lacks a field
├── NoSpace             the disk has no room for what would be written
├── OutputExists        the output folder is there already
├── MissingExtra        an optional library is not installed
├── EndpointError       a model server did not answer, or not usefully
└── EffectError         the run changed nothing or destroyed the model, and was asked to fail then

Each message says what is wrong, where, and what to do next. The command line prints the message
alone and leaves with `exit_code`; anything that is not a GermaneError is a defect of germane.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GermaneError(Exception):
    """Base of all errors a user can cause and mend."""

    exit_code = 2


class SettingError(GermaneError):
    """A setting, recipe key or argument is unknown, of the wrong type, or out of bounds."""


class UnknownName(GermaneError):
    """No task, method or suite of that name."""


class CheckpointError(GermaneError):
    """A checkpoint cannot be read, or does not fit the others."""


class RecordsError(GermaneError):
    """A data file cannot be read, is empty, or lacks a field."""


class NoSpace(GermaneError):
    """The disk has no room for what would be written."""


class OutputExists(GermaneError):
    """The output folder is there already, and nothing said that it may be replaced."""


class MissingExtra(GermaneError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed: pip install 'germane[{extra}]'"
        )


class EndpointError(GermaneError):
    """A model server did not answer, or not usefully."""


class EffectError(GermaneError):
    """The run finished, but changed nothing or destroyed the model, and was asked to fail then."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause naming the nearest spellings among `known`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(word) for word in close)}?" if close else ""
