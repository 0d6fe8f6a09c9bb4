"""Data files as records: JSON Lines, CSV, Parquet, or a data set of the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from germane.core.errors import MissingExtra, RecordsError, nearest
from germane.core.settings import Settings

Row = dict[str, Any]


class Data(Settings):
    """A named set of records and what its fields mean.

    Records with a prompt and an answer are for generation; records with a text, an image or numbers,
    and a label, for classification; a text alone is language to be predicted, or unlabelled text, as
    the model that reads it has it.
    """

    name: str = Field(description="what the records are called in tables")
    path: str = Field(description="a .jsonl, .json, .csv or .parquet file, or a hub data set")
    head: str = Field(
        default="", description="pool member, or model folder, whose head reads them; default: the name"
    )
    text: str = Field(default="text", description="field with the text")
    pair: str = Field(default="", description="field with a second text, if there is one")
    label: str = Field(default="label", description="field with the class")
    prompt: str = Field(default="prompt", description="field with the prompt")
    answer: str = Field(default="answer", description="field with the answer to learn or score")
    image: str = Field(
        default="image", description="field with an image: a file beside the records, or numbers 0 to 255"
    )
    split: str = Field(default="train", description="split of a hub data set")
    subset: str = Field(default="", description="configuration of a hub data set, where it has several")
    limit: int | None = Field(default=None, gt=0, description="use the first so many records")
    max_tokens: int = Field(default=128, gt=0, description="longer texts are cut here")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Accept `name=path`; a path alone is named after its file."""
        if not isinstance(value, str):
            return value
        name, sign, path = value.partition("=")
        return {"name": name, "path": path} if sign else {"name": Path(value).stem, "path": value}


def read_rows(data: Data) -> list[Row]:
    """The records of `data`, at most `limit`.

    Raises:
        RecordsError: No such file, unreadable, empty, or without the fields a model can use.
    """
    rows = open_rows(data)
    _check_fields(data, rows)
    return rows


def open_rows(data: Data) -> list[Row]:
    """The same for records in the form of someone else, whose fields the caller looks at.

    Raises:
        RecordsError: No such file, unreadable, or empty.
    """
    rows = []
    try:
        for row in stream_rows(data):
            rows.append(row)
            if data.limit is not None and len(rows) >= data.limit:
                break
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecordsError(f"{data.path}: cannot be read: {error}") from None
    if not rows:
        raise RecordsError(f"{data.path}: holds no records.")
    return rows


def stream_rows(data: Data) -> Iterator[Row]:
    """The records of a file or data set, one at a time.

    Raises:
        RecordsError: No such file, or unreadable.
    """
    file = Path(data.path).expanduser()
    if file.is_file():
        readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
        if file.suffix in readers:
            return readers[file.suffix](file)
        if file.suffix == ".parquet":
            return _load_dataset(data, "parquet", data_files=str(file), split="train")
        raise RecordsError(f"{file}: germane reads .jsonl, .json, .csv and .parquet.")
    if data.path.count("/") == 1 and not file.suffix:
        return _load_dataset(data, data.path, data.subset or None, split=data.split)
    raise RecordsError(f"{data.path}: no such file.")


def _read_jsonl(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse(line, f"{file}, line {number}")


def _read_json(file: Path) -> Iterator[Row]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordsError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise RecordsError(f"{file}: must hold a list of objects.")
    yield from content


def _read_csv(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


def _parse(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RecordsError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise RecordsError(f"{place}: must be an object with named fields.")
    return row


def _load_dataset(data: Data, *arguments: Any, **options: Any) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtra("datasets", "data", f"reading {data.path}") from None
    try:
        yield from load_dataset(*arguments, **options)
    except Exception as error:
        raise RecordsError(f"{data.path}: {str(error).splitlines()[0]}") from None


def _check_fields(data: Data, rows: list[Row]) -> None:
    """Every record has a text, a prompt and an answer, an image, or numbers."""
    first = set(rows[0])
    if data.image in first or _are_numbers(data, rows[0]):
        return
    wanted = [data.prompt, data.answer] if data.prompt in first else [data.text]
    wanted += [data.pair] if data.pair else []
    for number, row in enumerate(rows, 1):
        for name in wanted:
            if not isinstance(row.get(name), str):
                raise RecordsError(
                    f"{data.path}, record {number}: has no text in field {name!r}"
                    f"{nearest(name, row)} Fields: {', '.join(row)}."
                )


def _are_numbers(data: Data, row: Row) -> bool:
    """Whether a record is a row of a table: numbers, but for its label."""
    values = [value for name, value in row.items() if name != data.label]
    try:
        return data.text not in row and len([float(value) for value in values]) > 0
    except (TypeError, ValueError):
        return False


def write_jsonl(rows: list[Row], file: Path) -> None:
    """Write records, one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
