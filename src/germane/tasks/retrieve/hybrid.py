"""Rank fusion: the results of several methods as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from germane.method import method
from germane.retrieval import Opened, Passages, Ranking, Retriever, RetrieverRequest, Search


@method("retrieve/hybrid", paper="2306.07471", code="castorini/pyserini")
class Hybrid(Retriever):
    """Rank by several methods at once, by reciprocal ranks or by weighted scores.

    Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion Outperforms Condorcet and Individual Rank
    Learning Methods", SIGIR 2009; as fused in Kamalloo et al., "Resources for Brewing BEIR", SIGIR 2024.
    A passage that part p ranks at place r_p(d), counted from 1, has the score

        Σ_p w_p / (k + r_p(d))                      reciprocal-rank, k = 60
        Σ_p w_p · (s_p(d) - min) / (max - min)      weighted-sum, least and greatest of p's results,

    summed over the parts that have it among their first `candidates`. Scores of a part that are all equal
    count 1. Weights sum to 1 and are equal by default.

    Use it when the parts err differently, such as BM25 and a dense encoder; the weighted sum when the
    parts' scores say how sure they are, reciprocal ranks when they do not. Not when one part is much worse
    than the other: fusion may then be worse than the better part.

    Differs from the paper's code: it adds without weights, or with α and 1 - α for two; equal weights that
    sum to 1 give the same ranking.
    """

    parts: list[RetrieverRequest] = Field(
        default=[RetrieverRequest(name="bm25"), RetrieverRequest(name="dense")],
        min_length=2,
        description="the methods, each a name, or name and settings",
    )
    fusion: Literal["reciprocal-rank", "weighted-sum"] = Field(
        default="reciprocal-rank", description="what of each part's results is added"
    )
    weights: list[float] = Field(default=[], description="of the parts, in their order; default: equal")
    k: float = Field(default=60, ge=0, description="evens out the first places; for reciprocal-rank")
    candidates: int = Field(default=1000, gt=0, description="results of each part that are fused")

    @model_validator(mode="after")
    def _weights_fit(self) -> Hybrid:
        if self.weights and (len(self.weights) != len(self.parts) or min(self.weights) < 0):
            raise ValueError("weights must be at least 0, and one for each part")
        if self.weights and sum(self.weights) == 0:
            raise ValueError("one of the weights must be above 0")
        return self

    def check(self) -> None:
        for part in self.parts:
            part.build().check()

    def models(self) -> list[Path]:
        return [model for part in self.parts for model in part.build().models()]

    def index(self, passages: Passages, folder: Path) -> None:
        for number, part in enumerate(self.parts):
            own = folder / str(number)
            own.mkdir()
            part.build().index(passages, own)

    def open(self, passages: Passages, folder: Path) -> Opened:
        opened: dict[str, Search] = {}
        for number, part in enumerate(self.parts):
            label = part.name.removeprefix("retrieve/")
            label = f"{label} {number + 1}" if label in opened else label
            opened[label] = part.build().open(passages, folder / str(number)).search
        return Opened(_Search(self, passages, list(opened.values())), opened)

    def shares(self, ranking: Ranking) -> NDArray[np.float64]:
        """What each passage of a part's ranking adds, before the weight."""
        if self.fusion == "reciprocal-rank":
            return 1 / (self.k + np.arange(1, len(ranking.scores) + 1))
        scores = ranking.scores.astype(np.float64)
        spread = np.ptp(scores) if len(scores) else 0.0
        return (scores - scores.min()) / spread if spread else np.ones(len(scores))


@dataclass(frozen=True)
class _Search:
    method: Hybrid
    passages: Passages
    parts: list[Search]

    def __call__(self, queries: Sequence[str], depth: int) -> list[Ranking]:
        candidates = max(depth, self.method.candidates)
        found = [part(queries, candidates) for part in self.parts]
        return [self._fuse(rankings, depth) for rankings in zip(*found, strict=True)]

    def _fuse(self, rankings: Sequence[Ranking], depth: int) -> Ranking:
        weights = np.array(self.method.weights or [1.0] * len(rankings))
        positions = np.unique(np.concatenate([ranking.positions for ranking in rankings]))
        total = np.zeros(len(positions))
        for weight, ranking in zip(weights / weights.sum(), rankings, strict=True):
            total[np.searchsorted(positions, ranking.positions)] += weight * self.method.shares(ranking)
        return self.passages.best(total.astype(np.float32), depth, positions)
