"""A collection in BEIR's form: passages, queries, and which passage answers which query."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from germane.core.errors import RecordsError, nearest
from germane.core.records import Data, Row, open_rows, stream_rows
from germane.retrieval import Passage

Judgements = dict[str, dict[str, int]]  # query -> passage -> how relevant


@dataclass(frozen=True)
class Query:
    """What is asked."""

    id: str
    text: str


def stream_passages(path: str) -> Iterator[Passage]:
    """The passages of a file as they come: none is held.

    Raises:
        RecordsError: No such file, unreadable, or a record without id and text.
    """
    try:
        for number, row in enumerate(stream_rows(Data(name="corpus", path=path)), 1):
            place = f"{path}, record {number}"
            title = row.get("title") or ""
            if not isinstance(title, str):
                raise RecordsError(f"{place}: its title must be text; got {title!r}.")
            yield Passage(_id(row, place), title, _text(row, "text", place))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecordsError(f"{path}: cannot be read: {error}") from None


def passage_ids(path: str) -> set[str]:
    """The ids of a corpus, every record of it checked.

    Raises:
        RecordsError: As `stream_passages`; or it is empty, or an id comes twice.
    """
    ids: set[str] = set()
    for passage in stream_passages(path):
        if passage.id in ids:
            raise RecordsError(f"{path}: two passages have the id {passage.id!r}.")
        ids.add(passage.id)
    if not ids:
        raise RecordsError(f"{path}: holds no records.")
    return ids


def read_queries(data: Data) -> list[Query]:
    """The queries, their ids unlike.

    Raises:
        RecordsError: Unreadable, empty, a record without id and text, or an id that comes twice.
    """
    found: dict[str, Query] = {}
    for number, row in enumerate(open_rows(data), 1):
        place = f"{data.path}, record {number}"
        query = Query(_id(row, place), _text(row, data.text, place))
        if not query.text.strip():
            raise RecordsError(f"{place}: its query is empty.")
        if query.id in found:
            raise RecordsError(f"{data.path}: two queries have the id {query.id!r}.")
        found[query.id] = query
    return list(found.values())


def _id(row: Row, place: str) -> str:
    value: Any = row.get("_id")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RecordsError(
            f"{place}: has no id in field '_id'{nearest('_id', row)} Fields: {', '.join(row)}."
        )
    if not value or value.split() != [value]:
        raise RecordsError(f"{place}: an id must not be empty or hold spaces; got {value!r}.")
    return value


def _text(row: Row, field: str, place: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise RecordsError(
            f"{place}: has no text in field {field!r}{nearest(field, row)} Fields: {', '.join(row)}."
        )
    return value


def read_judgements(path: str) -> Judgements:
    """Judgements: BEIR's (query, passage, relevance) or trec's (query, 0, passage, relevance).

    Raises:
        RecordsError: No such file, of another form, empty, or a pair judged twice.
    """
    found: Judgements = {}
    try:
        with Path(path).expanduser().open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and not (number == 1 and line.lower().startswith("query-id")):
                    query, passage, relevance = _judgement(line, f"{path}, line {number}")
                    if passage in found.setdefault(query, {}):
                        raise RecordsError(f"{path}, line {number}: {query!r} and {passage!r} come twice.")
                    found[query][passage] = relevance
    except (OSError, UnicodeDecodeError) as error:
        raise RecordsError(f"{path}: cannot be read: {error}") from None
    if not found:
        raise RecordsError(f"{path}: holds no judgements.")
    return found


def _judgement(line: str, place: str) -> tuple[str, str, int]:
    parts = line.split()
    try:
        query, *_, passage, relevance = parts
        if len(parts) in (3, 4):
            return query, passage, int(relevance)
    except ValueError:
        pass
    raise RecordsError(
        f"{place}: must be query, passage and relevance (BEIR), or query, 0, passage and relevance (trec); "
        f"got {line.strip()!r}."
    )


def check_judgements(
    path: str, judgements: Judgements, queries: Collection[str], passages: Collection[str] | None
) -> None:
    """Refuse judgements of queries or passages that are not there; passages None are not known yet."""
    _refuse_unknown(path, "query", judgements, queries)
    if passages is not None:
        judged: Mapping[str, None] = {passage: None for each in judgements.values() for passage in each}
        _refuse_unknown(path, "passage", judged, passages)


def _refuse_unknown(path: str, kind: str, asked: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise RecordsError(
            f"{path}: judges {len(unknown)} of {len(asked)} ids of a {kind} that is not there, "
            f"such as {unknown[0]!r}."
        )
