"""How good rankings are, as trec_eval measures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from germane.core.evidence import Score
from germane.core.statistics import bootstrap_mean
from germane.tasks.retrieve._collection import Judgements


def measure(
    subject: str, task: str, found: Mapping[str, Sequence[str]], judgements: Judgements, depth: int
) -> list[Score]:
    """NDCG at 10, recall at 100, MRR at 10 and MAP, means over the judged queries; no results count 0.

    Args:
        subject: Whose scores they are.
        task: Name of the queries.
        found: Query -> ids of passages, the best first.
        judgements: Query -> passage -> relevance.
        depth: How many were asked for; the cut-offs are no deeper.
    """
    by_metric = per_query(found, judgements, depth)
    scores = []
    for metric, by_query in by_metric.items():
        values = np.array([by_query[query] for query in judgements], np.float64)
        low, high = bootstrap_mean(values)
        scores.append(
            Score(
                subject=subject, task=task, metric=metric, value=float(values.mean()), n=len(values),
                low=low, high=high,
            )
        )  # fmt: skip
    return scores


def per_query(
    found: Mapping[str, Sequence[str]], judgements: Judgements, depth: int
) -> dict[str, dict[str, float]]:
    """Metric -> judged query -> value.

    Ranks stand for scores, so that every tool behind ir_measures sees the same order.
    """
    import ir_measures
    from ir_measures import AP, RR, Qrel, R, ScoredDoc, nDCG

    ten, hundred = min(10, depth), min(100, depth)
    metrics = {
        nDCG @ ten: f"nDCG@{ten}", R @ hundred: f"recall@{hundred}", RR @ ten: f"MRR@{ten}", AP: "MAP",
    }  # fmt: skip
    judged = [
        Qrel(query, passage, value) for query, by in judgements.items() for passage, value in by.items()
    ]
    ranked = [
        ScoredDoc(query, passage, float(-rank))
        for query in judgements
        for rank, passage in enumerate(found.get(query, ()))
    ]
    values = {name: dict.fromkeys(judgements, 0.0) for name in metrics.values()}
    for each in ir_measures.iter_calc(list(metrics), judged, ranked):
        values[metrics[each.measure]][each.query_id] = each.value
    return values
