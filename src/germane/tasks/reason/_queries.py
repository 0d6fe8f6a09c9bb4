"""Queries that a model writes, run on a table in memory: one SELECT, which reads only and ends."""

from __future__ import annotations

import math
import re
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing

from germane.tasks.reason._tables import Table, linearised

Value = str | int | float

NAME = "w"  # of the table
_SECONDS = 2.0  # a query may take
_STEPS = 10_000_000  # of SQLite's machine, by which a runaway query ends at the same place every time
_BETWEEN_LOOKS = 1_000  # steps
_LONGEST = 10_000  # bytes of a text that a query may make, so that none fills the memory
_EMPTY = ("", "-", "/")
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_REFUSED = ("load_extension", "random", "randomblob")  # the latter two answer otherwise every time
_FENCED = re.compile(r"```[a-z]*\s*(.*?)(?:```|$)", flags=re.DOTALL | re.IGNORECASE)
_QUERY = re.compile(
    r"\b(?:SELECT\b|WITH\s+(?:RECURSIVE\s+)?\w+\s*(?:\([^()]*\)\s*)?AS\b).*",
    flags=re.DOTALL | re.IGNORECASE,
)


class QueryError(Exception):
    """A query was refused, failed, ran too long, or found nothing."""


def query_in(reply: str) -> str:
    """The query that a reply holds, up to the first empty line; "" if there is none."""
    fenced = _FENCED.search(reply)
    found = _QUERY.search(fenced[1] if fenced else reply)
    return re.split(r"\n\s*\n", found[0], maxsplit=1)[0].strip() if found else ""


def schema(table: Table, rows: int) -> str:
    """The table as it is created, and its first rows."""
    return f"{_creation(table)};\nIts first rows:\n{linearised(table, rows)}"


def _creation(table: Table, collation: str = "") -> str:
    pairs = zip(table.header, kinds(table), strict=True)
    columns = ", ".join(f"{_quoted(name)} {kind}{collation}" for name, kind in pairs)
    return f"CREATE TABLE {NAME} ({columns})"


def kinds(table: Table) -> list[str]:
    """Of each column: REAL where every cell that is not empty is a number, else TEXT."""
    columns = zip(*table.rows, strict=True)
    return ["REAL" if _all_numbers(cells) else "TEXT" for cells in columns]


def _all_numbers(cells: Sequence[str]) -> bool:
    filled = [each for each in cells if each not in _EMPTY]
    return bool(filled) and all(_number(each) is not None for each in filled)


def _number(cell: str) -> float | None:
    return float(cell.replace(",", "")) if _NUMBER.fullmatch(cell) else None


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def run_query(table: Table, query: str) -> Value:
    """The first value that a query on the table gives.

    The table is copied into a database of its own, in memory, which can only be read.

    Raises:
        QueryError: One sentence: why there is no value.
    """
    if not re.match(r"\s*(?:SELECT|WITH)\b", query, flags=re.IGNORECASE):
        raise QueryError("it is no SELECT")
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            _fill(connection, table)
            _fence(connection)
            row = connection.execute(query).fetchone()
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise QueryError(f"it failed: {error}") from None
    value = row[0] if row else None
    if not isinstance(value, (str, int, float)) or value in ("", math.inf, -math.inf):
        raise QueryError("it found nothing")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _fill(connection: sqlite3.Connection, table: Table) -> None:
    types = kinds(table)
    connection.execute(_creation(table, " COLLATE NOCASE"))
    rows = [
        [None if each in _EMPTY else _number(each) if kind == "REAL" else each
         for each, kind in zip(row, types, strict=True)]
        for row in table.rows
    ]  # fmt: skip
    connection.executemany(f"INSERT INTO {NAME} VALUES ({', '.join('?' * len(types))})", rows)
    connection.commit()


def _fence(connection: sqlite3.Connection) -> None:
    """From here on the connection reads only, and not for long."""
    connection.execute("PRAGMA query_only = ON")
    if sys.version_info >= (3, 11):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
    connection.set_authorizer(_allowed)
    begun, looks = time.monotonic(), 0

    def stop() -> bool:
        nonlocal looks
        looks += 1
        return looks * _BETWEEN_LOOKS > _STEPS or time.monotonic() - begun > _SECONDS

    connection.set_progress_handler(stop, _BETWEEN_LOOKS)


def _allowed(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action not in _READING or (action == sqlite3.SQLITE_FUNCTION and second in _REFUSED):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def most_frequent(values: Sequence[Value | None], zero_penalty: float) -> Value | None:
    """The value that came most often, of equals the one seen first; None where failures (None) came most.

    Args:
        values: What each query gave, or None.
        zero_penalty: What the count of the value 0 is divided by.
    """
    counts: dict[Value | None, float] = dict(Counter(values))
    if 0 in counts:
        counts[0] /= zero_penalty
    return max(counts, key=lambda value: counts[value], default=None)
