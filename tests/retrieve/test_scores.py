"""Metrics by hand, by pytrec_eval, and by BEIR's own code."""

from __future__ import annotations

import json
import random
from math import log2
from pathlib import Path

import pytest

from germane.tasks.retrieve._scores import measure, per_query

ORACLE = json.loads((Path(__file__).parent.parent / "fixtures" / "beir_resources.json").read_text())[
    "metrics"
]


def test_a_case_worked_out_by_hand():
    judgements = {"q": {"a": 2, "b": 1, "c": 1, "z": 0}, "missing": {"a": 1}}
    values = per_query({"q": ["z", "a", "x", "b"]}, judgements, 100)
    best = 2 / log2(2) + 1 / log2(3) + 1 / log2(4)
    assert values["nDCG@10"]["q"] == pytest.approx((2 / log2(3) + 1 / log2(5)) / best)
    assert values["recall@100"]["q"] == pytest.approx(2 / 3)
    assert values["MRR@10"]["q"] == pytest.approx(1 / 2)
    assert values["MAP"]["q"] == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert {by_query["missing"] for by_query in values.values()} == {0}  # no results count 0
    means = {
        score.metric: score
        for score in measure("result", "t", {"q": ["z", "a", "x", "b"]}, judgements, 100)
    }
    assert means["MRR@10"].value == pytest.approx(1 / 4)
    assert means["MRR@10"].n == 2


def test_values_are_pytrec_evals():
    import pytrec_eval

    generator = random.Random(1)
    passages = [f"d{n}" for n in range(150)]
    judgements = {
        f"q{n}": {passage: generator.choice([0, 1, 2]) for passage in generator.sample(passages, 30)}
        for n in range(5)
    }
    found = {query: generator.sample(passages, 120) for query in judgements}
    values = per_query(found, judgements, 120)
    evaluator = pytrec_eval.RelevanceEvaluator(judgements, {"ndcg_cut.10", "recall.100", "map"})
    run = {query: {name: -float(n) for n, name in enumerate(ids)} for query, ids in found.items()}
    theirs = evaluator.evaluate(run)
    for ours, name in {"nDCG@10": "ndcg_cut_10", "recall@100": "recall_100", "MAP": "map"}.items():
        assert values[ours] == {q: pytest.approx(theirs[q][name], abs=1e-4) for q in judgements}


@pytest.mark.parametrize("depth", [3, 10, 100])
def test_means_are_those_of_beirs_code(depth):
    judgements = ORACLE["qrels"]
    found = {
        query: sorted(row, key=lambda name: row[name], reverse=True)[:depth]
        for query, row in ORACLE["results"].items()
    }
    ten, hundred = min(10, depth), min(100, depth)
    expected = {
        f"nDCG@{ten}": ORACLE["scores"][f"NDCG@{ten}"],
        f"recall@{hundred}": ORACLE["scores"][f"Recall@{hundred}"],
        f"MRR@{ten}": ORACLE["scores"][f"MRR@{ten}"],
        "MAP": ORACLE["scores"][f"MAP@{depth}"],
    }
    scores = measure("result", "t", found, judgements, depth)
    assert {s.metric: s.value for s in scores} == pytest.approx(expected, abs=1e-5)
    assert all(score.low <= score.value <= score.high for score in scores)
