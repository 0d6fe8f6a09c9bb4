"""What a retrieval method supplies, and an index that is opened to be searched.

An index is the folder that the task retrieve makes: `index.json` says by which method, the passages
lie in one file that is read by position, and the rest is the method's own. `load_index` opens it
memory-mapped; other tasks reach it here.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_serializer, model_validator

from germane.core.errors import MissingExtra, RecordsError, SettingError
from germane.core.settings import Settings, validate
from germane.method import Method, build

FILE = "index.json"
_TEXTS, _OFFSETS, _ORDER = "passages.jsonl", "offsets.npy", "order.npy"


@dataclass(frozen=True)
class Passage:
    """One entry of a corpus."""

    id: str
    title: str
    text: str

    @property
    def whole(self) -> str:
        """Title and text as one."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True)
class Hit:
    """A passage found, with its score."""

    id: str
    score: float
    title: str
    text: str


@dataclass(frozen=True)
class Ranking:
    """What was found for one query: positions of passages, the best first, and their scores."""

    positions: NDArray[np.int64]
    scores: NDArray[np.float32]


class Passages:
    """The passages of an index, read from disk one at a time, in order or by position.

    Attributes:
        order: Of every passage, where it stands when all are sorted by id, the last first: so are equal
            scores ordered, as trec_eval does it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _TEXTS
        self._offsets: NDArray[np.int64] = open_array(folder / _OFFSETS)
        self.order: NDArray[np.int64] = open_array(folder / _ORDER)
        size = self._file.stat().st_size if self._file.is_file() else -1
        if len(self._offsets) != len(self.order) + 1 or size != self._offsets[-1]:
            raise RecordsError(f"{self._file}: is not whole; make the index again.")

    @classmethod
    def write(cls, passages: Iterator[Passage], folder: Path) -> Passages:
        """Put passages into `folder` as they come; only their ids are held."""
        offsets, ids = [0], []
        with (folder / _TEXTS).open("wb") as file:
            for passage in passages:
                line = json.dumps([passage.id, passage.title, passage.text], ensure_ascii=False)
                offsets.append(offsets[-1] + file.write(f"{line}\n".encode("utf-8", "surrogatepass")))
                ids.append(passage.id)
        order = np.empty(len(ids), np.int64)
        order[sorted(range(len(ids)), key=ids.__getitem__, reverse=True)] = np.arange(len(ids))
        np.save(folder / _OFFSETS, np.array(offsets, np.int64))
        np.save(folder / _ORDER, order)
        return cls(folder)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Passage]:
        with self._file.open("rb") as file:
            for line in file:
                yield _passage(line)

    def read(self, positions: Sequence[int] | NDArray[np.int64]) -> list[Passage]:
        """The passages at these positions."""
        found = []
        with self._file.open("rb") as file:
            for position in positions:
                file.seek(int(self._offsets[position]))
                found.append(_passage(file.readline()))
        return found

    def best(
        self, scores: NDArray[np.float32], depth: int, among: NDArray[np.int64] | None = None
    ) -> Ranking:
        """The highest scores, equal ones by id.

        Args:
            scores: One for each of `among`.
            depth: How many.
            among: Positions of the passages; None for all.
        """
        positions = np.arange(len(scores)) if among is None else among
        if depth < len(scores):  # all that reach the last place, so that its ties are settled by id
            chosen = scores >= np.partition(scores, len(scores) - depth)[len(scores) - depth]
            positions, scores = positions[chosen], scores[chosen]
        ranked = np.lexsort((self.order[positions], -scores))[:depth]
        return Ranking(positions[ranked].astype(np.int64), scores[ranked].astype(np.float32))


def _passage(line: bytes) -> Passage:
    return Passage(*json.loads(line.decode("utf-8", "surrogatepass")))


def open_array(file: Path) -> NDArray[Any]:
    """An array of an index, memory-mapped.

    Raises:
        RecordsError: The file is missing or damaged.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RecordsError(f"{file}: cannot be read: {error}; make the index again.") from None


class Search(Protocol):
    """An opened index."""

    def __call__(self, queries: Sequence[str], depth: int) -> list[Ranking]:
        """The best passages of each query."""


@dataclass(frozen=True)
class Opened:
    """An opened index, with those it is made of.

    Attributes:
        search: Finds passages.
        parts: What the method combines or improves on, by name: measured beside it.
    """

    search: Search
    parts: Mapping[str, Search] = field(default_factory=dict)


class Retriever(Method):
    """A method of retrieval.

    Attributes:
        libraries: Modules of optional libraries that it needs, each with the name to install it by.
    """

    libraries: ClassVar[Mapping[str, str]] = {}

    def check(self) -> None:
        """Raise a `GermaneError` for a library or model that is missing or of the wrong kind."""
        for module, library in self.libraries.items():
            if find_spec(module) is None:
                raise MissingExtra(library, "retrieve", self.name)

    def models(self) -> list[Path]:
        """Folders of the models that it reads."""
        return []

    @abstractmethod
    def index(self, passages: Passages, folder: Path) -> None:
        """Write what `open` needs into `folder`, which exists and is empty."""

    @abstractmethod
    def open(self, passages: Passages, folder: Path) -> Opened:
        """Open what `index` wrote."""


class RetrieverRequest(Settings):
    """A retrieval method by name, with settings."""

    name: str = Field(description="the method")
    settings: dict[str, Any] = Field(default={}, description="its settings")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def __repr__(self) -> str:
        return f"{self.name} {self.settings}" if self.settings else self.name

    @field_serializer("settings")
    def _whole_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All of them, as the method has them: an index must open elsewhere, and after defaults change."""
        return self.build().model_dump(mode="json")

    def build(self) -> Retriever:
        """The method, its settings checked."""
        found = build(f"retrieve/{self.name.removeprefix('retrieve/')}", self.settings)
        assert isinstance(found, Retriever)
        return found


@dataclass(frozen=True)
class Index:
    """An index to be searched.

    Attributes:
        retriever: The method it was made by.
        passages: Its passages.
        opened: The method's search, and those of its parts.
    """

    retriever: Retriever
    passages: Passages
    opened: Opened

    def search(self, queries: Sequence[str], depth: int = 100) -> list[list[Hit]]:
        """The best passages of each query, with their texts."""
        if depth < 1:
            raise SettingError(f"depth: must be at least 1; got {depth}.")
        if not queries:
            return []
        return [self._hits(ranking) for ranking in self.opened.search(queries, depth)]

    def _hits(self, ranking: Ranking) -> list[Hit]:
        found = self.passages.read(ranking.positions)
        return [
            Hit(passage.id, float(score), passage.title, passage.text)
            for passage, score in zip(found, ranking.scores, strict=True)
        ]


class Header(Settings):
    """What `index.json` says."""

    method: str = Field(description="the method")
    settings: dict[str, Any] = Field(description="its settings")

    @classmethod
    def read(cls, folder: Path) -> Header:
        """The header of an index.

        Raises:
            RecordsError: It is no index, or the file is damaged.
        """
        try:
            content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecordsError(f"{folder}: is no index: it has no {FILE}.") from None
        except (OSError, ValueError) as error:
            raise RecordsError(f"{folder / FILE}: cannot be read: {error}") from None
        return validate(cls, content, str(folder / FILE))

    def build(self) -> Retriever:
        """The method the index was made by."""
        return RetrieverRequest(name=self.method, settings=self.settings).build()


def make_index(retriever: Retriever, passages: Iterator[Passage], folder: Path) -> Index:
    """Index passages, which are read once as they come, into `folder`."""
    written = Passages.write(passages, folder)
    own = folder / "method"
    own.mkdir()
    retriever.index(written, own)
    header = Header(method=retriever.name, settings=retriever.model_dump(mode="json"))
    (folder / FILE).write_text(header.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return Index(retriever, written, retriever.open(written, own))


def load_index(folder: str | Path) -> Index:
    """Open an index that the task retrieve made; its files are mapped, not read into memory.

    Raises:
        GermaneError: It is no index or not whole, or its method's model or library is missing.
    """
    place = Path(folder).expanduser()
    retriever = Header.read(place).build()
    retriever.check()
    passages = Passages(place)
    return Index(retriever, passages, retriever.open(passages, place / "method"))
