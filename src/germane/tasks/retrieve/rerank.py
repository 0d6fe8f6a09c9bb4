"""Reranking: a cross-encoder reads each query together with a first stage's passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from germane.core.checkpoint import read_json
from germane.core.errors import CheckpointError
from germane.method import method
from germane.retrieval import Opened, Passages, Ranking, Retriever, RetrieverRequest, Search
from germane.tasks.retrieve._models import (
    LIBRARY,
    Lazy,
    ModelName,
    check_kind,
    find_model,
    load,
    require_finite_vectors,
)


@method("retrieve/rerank", code="beir-cellar/beir")
class Rerank(Retriever):
    """Rank a first stage's results again, by a cross-encoder.

    Nogueira and Cho, "Passage Re-ranking with BERT", 2019, as BEIR measures it (Thakur et al., "BEIR: A
    Heterogenous Benchmark for Zero-shot Evaluation of Information Retrieval Models", NeurIPS 2021 Datasets
    and Benchmarks). A cross-encoder of sentence-transformers reads query and passage, title and text
    joined by a space, as one text, and gives one score; the first stage's `candidates` best are ordered by
    it, and nothing else is ranked.

    Use it when the first places matter and a second a query may be spent. Not when the first stage misses
    the relevant passages: what it does not find cannot be ranked; and not for many queries without a GPU.

    Differs from BEIR's code: the model's own activation is kept, which does not change the order, but for
    scores that it makes equal.
    """

    libraries: ClassVar[dict[str, str]] = LIBRARY

    first: RetrieverRequest = Field(
        default=RetrieverRequest(name="bm25"), description="first stage: a name, or name and settings"
    )
    model: ModelName = Field(
        description="cross-encoder: folder or hub id, such as cross-encoder/ms-marco-MiniLM-L6-v2"
    )
    candidates: int = Field(default=100, gt=0, description="results of the first stage that are read")
    batch_size: int = Field(default=32, gt=0, description="pairs at a time")

    def check(self) -> None:
        super().check()
        self.first.build().check()
        check_kind(self.model, "ForSequenceClassification", "cross_encoder", self.name)
        labels = read_json(find_model(self.model) / "config.json").get("id2label", {0: "", 1: ""})
        if len(labels) != 1:
            raise CheckpointError(
                f"{self.name}: needs a model with one score; {self.model} has {len(labels)}."
            )

    def models(self) -> list[Path]:
        return [find_model(self.model), *self.first.build().models()]

    def index(self, passages: Passages, folder: Path) -> None:
        self.first.build().index(passages, folder)

    def open(self, passages: Passages, folder: Path) -> Opened:
        first = self.first.build().open(passages, folder).search
        return Opened(_Search(self, passages, first, Lazy(self._load)), {"first stage": first})

    def _load(self) -> Any:
        return load("CrossEncoder", self.model)


@dataclass(frozen=True)
class _Search:
    method: Rerank
    passages: Passages
    first: Search
    model: Lazy

    def __call__(self, queries: Sequence[str], depth: int) -> list[Ranking]:
        found = self.first(queries, self.method.candidates)
        return [self._again(query, each, depth) for query, each in zip(queries, found, strict=True)]

    def _again(self, query: str, found: Ranking, depth: int) -> Ranking:
        if not len(found.positions):
            return found
        pairs = [(query, passage.whole) for passage in self.passages.read(found.positions)]
        scores = np.asarray(
            self.model().predict(pairs, batch_size=self.method.batch_size, show_progress_bar=False),
            dtype=np.float32,
        )
        require_finite_vectors(scores, self.method.model)
        return self.passages.best(scores, depth, found.positions)
