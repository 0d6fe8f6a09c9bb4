"""Learned sparse retrieval: weights of vocabulary terms, also of terms that a text does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from germane.core.errors import CheckpointError
from germane.method import method
from germane.retrieval import Opened, Passages, Ranking, Retriever, open_array
from germane.tasks.retrieve._models import (
    CHUNK,
    LIBRARY,
    Lazy,
    ModelName,
    batches,
    check_kind,
    find_model,
    load,
    require_finite_vectors,
)

_ARRAYS = ("data", "indices", "indptr")  # as scipy names the parts of a matrix by columns


@method("retrieve/sparse", paper="2306.07471", code="castorini/pyserini")
class Sparse(Retriever):
    """Rank by weights that a masked language model gives to terms of its vocabulary (SPLADE).

    Formal et al., "From Distillation to Hard Negative Sampling: Making Sparse Neural IR Models More
    Effective", SIGIR 2022; a reference model of Kamalloo et al., "Resources for Brewing BEIR", SIGIR 2024.
    A sparse encoder of sentence-transformers gives every term of the vocabulary the weight

        w_j = max over positions i of log(1 + ReLU(logit_ij)),

    mostly 0; title and text are joined by a space, and the score is the inner product of the weights of
    query and passage. The index is an inverted one, exact, and mapped when opened; passages that share no
    term with the query are not ranked.

    Use it when a SPLADE model fits the language: it holds names as BM25 does, and adds related terms.
    Not without a model that was trained for it: a plain masked language model gives weights to nearly
    every term. Encoding costs as much as for dense retrieval.

    Differs from the paper's reference: weights are not rounded to whole numbers, as Lucene's impact index
    needs them.
    """

    libraries: ClassVar[dict[str, str]] = {**LIBRARY, "scipy": "scipy"}

    model: ModelName = Field(description="sparse encoder: folder or hub id, such as naver/splade-v3")
    max_terms: int | None = Field(
        default=None, gt=0, description="keep the so many heaviest terms of a text; default: all"
    )
    batch_size: int = Field(default=16, gt=0, description="texts at a time")

    def check(self) -> None:
        super().check()
        check_kind(self.model, "ForMaskedLM", "sparse_encoder", self.name)

    def models(self) -> list[Path]:
        return [find_model(self.model)]

    def index(self, passages: Passages, folder: Path) -> None:
        model, ends, width = self._load(), [0], 0
        with (folder / "values").open("wb") as values, (folder / "terms").open("wb") as terms:
            for batch in batches(passages, CHUNK * self.batch_size, "encoding"):
                encoded = self.encode(model.encode_document, [passage.whole for passage in batch])
                encoded.data.astype(np.float32).tofile(values)
                encoded.indices.astype(np.int64).tofile(terms)
                ends += (ends[-1] + encoded.indptr[1:].astype(np.int64)).tolist()
                width = encoded.shape[1]
        if ends[-1] == 0:
            raise CheckpointError(f"{self.name}: {self.model} gives no term of any passage a weight.")
        _invert(folder, ends, width)

    def open(self, passages: Passages, folder: Path) -> Opened:
        data, indices, indptr = (open_array(folder / f"{name}.npy") for name in _ARRAYS)
        return Opened(_Search(self, passages, data, indices, indptr, Lazy(self._load)))

    def encode(self, encode: Any, texts: Sequence[str]) -> Any:
        """(texts, vocabulary) weights, as a matrix of scipy by rows."""
        from scipy.sparse import csr_matrix

        weights = encode(
            list(texts), batch_size=self.batch_size, max_active_dims=self.max_terms,
            show_progress_bar=False, convert_to_sparse_tensor=True, save_to_cpu=True,
        ).coalesce()  # fmt: skip
        values = weights.values().numpy()
        require_finite_vectors(values, self.model)
        matrix = csr_matrix((values, weights.indices().numpy()), shape=tuple(weights.shape))
        matrix.eliminate_zeros()
        return matrix

    def _load(self) -> Any:
        return load("SparseEncoder", self.model)


def _invert(folder: Path, ends: list[int], width: int) -> None:
    """The weights in `folder` from rows, a passage each, to columns, a term each."""
    from scipy.sparse import csr_matrix

    values = np.memmap(folder / "values", np.float32, "r")
    terms = np.memmap(folder / "terms", np.int64, "r")
    matrix = csr_matrix((values, terms, ends), shape=(len(ends) - 1, width)).tocsc()
    for name in _ARRAYS:
        np.save(folder / f"{name}.npy", getattr(matrix, name))
    for name in ("values", "terms"):
        (folder / name).unlink()


@dataclass(frozen=True)
class _Search:
    method: Sparse
    passages: Passages
    data: NDArray[np.float32]
    indices: NDArray[np.int64]
    indptr: NDArray[np.int64]
    model: Lazy

    def __call__(self, queries: Sequence[str], depth: int) -> list[Ranking]:
        weights = self.method.encode(self.model().encode_query, queries)
        return [self._one(weights[number], depth) for number in range(len(queries))]

    def _one(self, query: Any, depth: int) -> Ranking:
        total = np.zeros(len(self.passages), np.float32)
        for term, weight in zip(query.indices, query.data, strict=True):
            start, end = self.indptr[term], self.indptr[term + 1]
            total[self.indices[start:end]] += weight * self.data[start:end]
        positions = np.flatnonzero(total)
        return self.passages.best(total[positions], depth, positions)
