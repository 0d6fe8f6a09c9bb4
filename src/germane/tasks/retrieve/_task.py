"""The retrieve task: a corpus and queries give ranked passages.

Promised for every method: a corpus, queries or judgements that are missing, empty, of the wrong form or at
odds with each other are refused before any work; the corpus is read record by record; equal scores are
ordered by id; the same request gives the same ranking; the result is an index that opens
memory-mapped in another process and ranks as before, beside the run files; scores come with the number of
queries and an interval.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from germane.core.checkpoint import digest
from germane.core.errors import MissingExtra, SettingError
from germane.core.evidence import Finding, Step
from germane.core.progress import announce, bar
from germane.core.records import Data
from germane.job import Job, is_reference
from germane.method import Method
from germane.retrieval import Header, Index, Ranking, Retriever, Search, load_index, make_index
from germane.tasks.retrieve._collection import (
    Judgements,
    Query,
    check_judgements,
    passage_ids,
    read_judgements,
    read_queries,
    stream_passages,
)
from germane.tasks.retrieve._scores import measure

_AT_A_TIME = 64  # queries that are searched together
Found = dict[str, list[tuple[str, float]]]  # query -> passages with scores, the best first


class Retrieve(Job):
    """Find the passages of a corpus that answer queries."""

    task: ClassVar[str] = "retrieve"
    paths: ClassVar[tuple[str, ...]] = ("corpus",)

    corpus: str = Field(
        description="passages with _id, title and text (.jsonl, .parquet, .csv), or an index made earlier"
    )
    queries: Data | None = Field(default=None, description="records with _id and text")
    qrels: str = Field(default="", description="judgements to score on: BEIR's .tsv, or trec's qrels")
    depth: int = Field(default=100, gt=0, description="how many passages a query gets")

    def check(self, method: Method) -> None:
        """Arguments, models, and every record, before any work."""
        queries, judgements = self._check_requests(method)
        index = self._index_folder()
        if index is not None:
            _check_same(method, Header.read(index).build(), index)
            passages = load_index(index).passages
            known = {passage.id for passage in passages} if judgements else None
        else:
            known = passage_ids(self.corpus)
        check_judgements(self.qrels, judgements, {query.id for query in queries}, known)

    def check_early(self, method: Method) -> None:
        """The same but for what an earlier step has yet to make."""
        waiting = [self.qrels, self.queries.path if self.queries else ""]
        if any(is_reference(path) for path in waiting):
            _retriever(method).check()
        else:
            queries, judgements = self._check_requests(method)
            check_judgements(self.qrels, judgements, {query.id for query in queries}, None)
        if not is_reference(self.corpus) and self._index_folder() is None:
            passage_ids(self.corpus)

    def run(self, method: Method, folder: Path, step: Step, seed: int) -> None:
        """Write index and run files into `folder`, which exists and is empty."""
        retriever = _retriever(method)
        with step.stage("check"):
            step.inputs = self._digests(retriever)
        with step.stage("index"):
            index = self._open(retriever, folder)
        step.facts["passages"] = len(index.passages)
        if self.queries is None:
            return
        queries = read_queries(self.queries)
        announce(f"{retriever.name}: asking {len(queries)} queries")
        with step.stage("search"):
            found = self._search(index, index.opened.search, queries)
            _write_run(folder, index.retriever.name.rpartition("/")[2], queries, found)
        step.findings += _findings(self.queries.name, queries, found)
        if self.qrels:
            with step.stage("evaluate"):
                self._score(index, queries, found, step)

    def _check_requests(self, method: Method) -> tuple[list[Query], Judgements]:
        """What can be known without the corpus; the queries and judgements."""
        if self.evaluate:
            raise SettingError("evaluate: retrieve scores on --queries and --qrels, not on records.")
        if self.qrels and self.queries is None:
            raise SettingError("qrels: need the queries they judge: --queries FILE.")
        _retriever(method).check()
        queries = read_queries(self.queries) if self.queries else []
        if not self.qrels:
            return queries, {}
        _require_measures()
        return queries, read_judgements(self.qrels)

    def _index_folder(self) -> Path | None:
        """The index made earlier, if `corpus` is one."""
        folder = Path(self.corpus).expanduser()
        return folder if folder.is_dir() else None

    def _open(self, retriever: Retriever, folder: Path) -> Index:
        made = self._index_folder()
        if made is not None:
            return load_index(made)
        announce(f"{retriever.name}: indexing {self.corpus}")
        return make_index(retriever, stream_passages(self.corpus), folder)

    def _search(self, index: Index, search: Search, queries: Sequence[Query]) -> Found:
        """Ids and scores for each query; a passage with the id of the query is the query itself."""
        found: Found = {}
        with bar("searching", len(queries)) as advance:
            for start in range(0, len(queries), _AT_A_TIME):
                asked = queries[start : start + _AT_A_TIME]
                rankings = search([query.text for query in asked], self.depth + 1)
                for query, ranking in zip(asked, rankings, strict=True):
                    others = [pair for pair in _pairs(index, ranking) if pair[0] != query.id]
                    found[query.id] = others[: self.depth]
                advance(len(asked))
        return found

    def _score(self, index: Index, queries: Sequence[Query], found: Found, step: Step) -> None:
        assert self.queries is not None
        judgements = read_judgements(self.qrels)
        subjects = {"result": found}
        asked = [query for query in queries if query.id in judgements]
        for label, part in index.opened.parts.items() if self.references else ():
            subjects[label] = self._search(index, part, asked)
        for subject, results in subjects.items():
            ids = {query: [passage for passage, _ in pairs] for query, pairs in results.items()}
            step.scores += measure(subject, self.queries.name, ids, judgements, self.depth)
        step.facts["judged queries"] = len(judgements)

    def _digests(self, retriever: Retriever) -> dict[str, str]:
        named = [self.corpus, self.qrels, self.queries.path if self.queries else ""]
        places = [*(Path(path).expanduser() for path in named if path), *retriever.models()]
        return {str(file): digest(file) for place in places for file in _files(place)}


def _files(place: Path) -> Iterator[Path]:
    if place.is_dir():  # a model, or an index
        yield from sorted(file for file in place.rglob("*") if file.is_file() and file.suffix != ".html")
    elif place.is_file():
        yield place


def _pairs(index: Index, ranking: Ranking) -> list[tuple[str, float]]:
    ids = [passage.id for passage in index.passages.read(ranking.positions)]
    return [(name, float(score)) for name, score in zip(ids, ranking.scores, strict=True)]


def _check_same(asked: Method, made: Retriever, folder: Path) -> None:
    """Refuse an index that another method, or other settings, made."""
    if asked.name != made.name:
        raise SettingError(f"{folder}: was made by {made.name}, and cannot be searched by {asked.name}.")
    wanted, there = asked.model_dump(mode="json"), made.model_dump(mode="json")
    for name in asked.model_fields_set:
        given, kept = wanted[name], there[name]
        if given != kept:
            raise SettingError(f"{folder}: was made with {name}={kept}; make it again for {name}={given}.")


def _retriever(method: Method) -> Retriever:
    if not isinstance(method, Retriever):
        raise SettingError(f"{method.name}: is no method of retrieval.")
    return method


def _require_measures() -> None:
    try:
        import ir_measures  # noqa: F401
    except ImportError:
        raise MissingExtra("ir-measures", "retrieve", "scoring on qrels") from None


def _write_run(folder: Path, tag: str, queries: Sequence[Query], found: Found) -> None:
    """`run.trec` for trec_eval, and `run.jsonl`, a line a query."""
    with (folder / "run.trec").open("w", encoding="utf-8") as run:
        for query in queries:
            for rank, (passage, score) in enumerate(found[query.id], 1):
                run.write(f"{query.id} Q0 {passage} {rank} {score!r} {tag}\n")
    with (folder / "run.jsonl").open("w", encoding="utf-8") as run:
        for query in queries:
            hits = [{"id": passage, "score": score} for passage, score in found[query.id]]
            line = {"_id": query.id, "text": query.text, "hits": hits}
            run.write(json.dumps(line, ensure_ascii=False) + "\n")


def _findings(name: str, queries: Sequence[Query], found: Found) -> Iterator[Finding]:
    empty = [query.id for query in queries if not found[query.id]]
    if empty:
        yield Finding(
            code="queries-without-results", severity="warning", about=name,
            message=f"{len(empty)} of {len(queries)} queries found nothing, such as {empty[0]!r}; "
            "where they are judged, they count 0.",
        )  # fmt: skip
