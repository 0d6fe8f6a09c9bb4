"""Tables: how they are read, shown to a model, and cut to what votes on columns and rows select."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from germane.core.errors import RecordsError

Key = TypeVar("Key", bound=Hashable)

TABLE = "table"  # the field of a question that holds its table
_NEEDS_QUOTES = re.compile(r'[|"\x00-\x1f\x7f\x85\u2028\u2029]')
# Lists in f_col and f_row: a name in quotation marks, or without any where it holds no comma or bracket.
_NAME = r"""(?:"(?:[^"\\]|\\.)*"|'[^'\n]*'|[^\[\]",\n]+)"""
_COLUMNS = re.compile(rf"f_col\(\s*\[\s*({_NAME}(?:\s*,\s*{_NAME})*)\s*\]\s*\)")
_ROW = r"""["']?\s*(?:\*|(?:row\s+)?\d+)\s*["']?"""
_ROWS = re.compile(rf"f_row\(\s*\[?\s*({_ROW}(?:\s*,\s*{_ROW})*)\s*\]?\s*\)", flags=re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        header: Names of the columns, no two alike.
        rows: The cells of each row, one for each column.
        caption: What the table is about, or "".
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def cut(self, columns: Collection[int], rows: Collection[int]) -> Table:
        """The table with only some columns and rows, by their places from 0, in the table's order."""
        kept = sorted(columns)
        return Table(
            tuple(self.header[column] for column in kept),
            tuple(tuple(self.rows[row][column] for column in kept) for row in sorted(rows)),
            self.caption,
        )


def read_table(value: Any, place: str) -> Table:
    """A table given as {"header": [...], "rows": [[...]], "caption": ...}, or as rows below its header.

    Columns without a name are called by their number, and a name that comes again gets a number.

    Raises:
        RecordsError: With `place`: no table, or rows of other lengths than the header.
    """
    caption = ""
    if isinstance(value, Mapping) and {"header", "rows"} <= value.keys():
        header, rows, caption = value["header"], value["rows"], str(value.get("caption") or "")
    elif isinstance(value, list) and value:
        header, rows = value[0], value[1:]
    else:
        raise RecordsError(
            f"{place}: needs a table in field {TABLE!r}: "
            '{"header": [...], "rows": [[...], ...]}, or a list of rows of which the first is the header.'
        )
    if not _is_row(header) or not header or not isinstance(rows, list) or not rows:
        raise RecordsError(f"{place}: its table needs a header, a list of names, and one row at least.")
    for number, row in enumerate(rows, 1):
        if not _is_row(row) or len(row) != len(header):
            raise RecordsError(
                f"{place}: row {number} of its table must be a list of {len(header)} cells, one a column."
            )
    return Table(_names(header), tuple(tuple(map(_text, row)) for row in rows), caption)


def _is_row(value: Any) -> bool:
    plain = (str, int, float, bool, type(None))
    return isinstance(value, list) and all(isinstance(cell, plain) for cell in value)


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _names(header: Sequence[Any]) -> tuple[str, ...]:
    found: dict[str, str] = {}
    for number, cell in enumerate(header, 1):
        name = " ".join(_text(cell).split()) or f"column {number}"
        wanted, times = name, 2
        while name.casefold() in found:
            name, times = f"{wanted} {times}", times + 1
        found[name.casefold()] = name
    return tuple(found.values())


def linearised(table: Table, rows: int | None = None) -> str:
    """A table as lines, "col : a | b" and "row 1 : x | y", the first `rows` of them.

    A cell with a bar, a quotation mark or a line break is a JSON string, so none ends its own or begins
    another.
    """
    shown = table.rows[:rows]
    lines = [f"row {number} : {' | '.join(map(cell, row))}" for number, row in enumerate(shown, 1)]
    return "\n".join([f"col : {' | '.join(map(cell, table.header))}", *lines])


def by_column(table: Table, rows: int) -> str:
    """A table as JSON: its caption, its columns, and each with its first `rows` cells."""
    columns = [[name, *(row[n] for row in table.rows[:rows])] for n, name in enumerate(table.header)]
    shown = {"table_caption": table.caption, "columns": table.header, "table_column_priority": columns}
    return json.dumps(shown, ensure_ascii=False)


def cell(text: str) -> str:
    """A cell as it is shown among others."""
    return json.dumps(text, ensure_ascii=False) if _NEEDS_QUOTES.search(text) else text


def columns_call(names: Sequence[str]) -> str:
    """How a choice of columns is written."""
    return f"f_col({json.dumps(list(names), ensure_ascii=False)})"


def rows_call(numbers: Sequence[int]) -> str:
    """How a choice of rows, by numbers from 1, is written; of none, that all are needed."""
    return f"f_row([{', '.join(f'row {number}' for number in numbers) or '*'}])"


def read_columns(text: str, table: Table) -> frozenset[int]:
    """The places of the columns that the last f_col([...]) of a text names; none if there is no such list.

    Case and blanks do not matter. A name that is no column's is passed over.
    """
    calls = _COLUMNS.findall(text)
    names = [_plain(name) for name in re.findall(_NAME, calls[-1])] if calls else []
    places = {name.casefold(): place for place, name in enumerate(table.header)}
    return frozenset(places[name] for name in names if name in places)


def _plain(name: str) -> str:
    name = name.strip()
    if name[:1] == '"':
        try:
            name = str(json.loads(name))
        except ValueError:
            name = name[1:-1]
    elif name[:1] == name[-1:] == "'":
        name = name[1:-1]
    return " ".join(name.split()).casefold()


def read_rows(text: str, table: Table) -> frozenset[int]:
    """The places from 0 of the rows that the last f_row([...]) of a text names; none without such a list.

    "*" stands for all rows. A number that no row has is passed over.
    """
    calls = _ROWS.findall(text)
    if not calls:
        return frozenset()
    every = range(len(table.rows))
    if "*" in calls[-1]:
        return frozenset(every)
    return frozenset(int(number) - 1 for number in re.findall(r"\d+", calls[-1])) & frozenset(every)


def votes(keys: Iterable[Key], weights: Iterable[float]) -> dict[Key, float]:
    """The weight of each key that says anything, the heaviest first, of equals the one seen first."""
    found: dict[Key, float] = {}
    for key, weight in zip(keys, weights, strict=True):
        if key:
            found[key] = found.get(key, 0.0) + weight
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def union(ranked: Iterable[frozenset[int]], count: int, size: int) -> frozenset[int]:
    """What the first `count` selections hold together; without any, all of 0 to `size` - 1."""
    chosen = frozenset[int]().union(*list(ranked)[:count])
    return chosen or frozenset(range(size))
