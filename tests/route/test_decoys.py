"""Workers that nothing belongs to must not draw queries away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parts import TOPICS, Places, query_rows, written

from germane.recipe import read_recipe, run, run_task
from germane.tasks.route import load_router

ROOT = Path(__file__).parents[2]
DECOYS = {
    "foreign": {"description": "w50 w51 w52"},
    "empty words": {"description": "the a of"},
    "twin": {"description": " ".join(TOPICS["red"])},
}


def accuracy(places: Places, method: str, folder: Path, decoys: dict[str, Any], **settings: Any) -> float:
    workers = {name: {"description": " ".join(words)} for name, words in TOPICS.items()}
    graph = written(folder / "graph", {"workers": {**workers, **decoys}})
    arguments = {"graph": str(graph), "data": [f"learn={places.learn}"]}
    run_task("route", method, arguments, {**places.settings(method), **settings}, folder / "out")
    rows = query_rows(3, 6)
    decisions = load_router(folder / "out").route_all([row["text"] for row in rows])
    return sum(d.worker == row["label"] for d, row in zip(decisions, rows, strict=True)) / len(rows)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("keyword", {}),
        ("functional-token", {"frozen": True, "row_learning_rate": 0.5}),
        ("embedding", {"encoder": "minilm"}),
    ],
)
def test_decoys_do_not_hurt(places: Places, tmp_path: Path, method: str, settings: dict[str, Any]):
    alone = accuracy(places, method, tmp_path / "alone", {}, **settings)
    assert alone > 0.5
    assert accuracy(places, method, tmp_path / "decoys", DECOYS, **settings) >= alone


@pytest.mark.slow
def test_the_example_learns_and_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    changes = {"steps.0.settings.frozen": True, "fail_on": []}
    result = run(read_recipe("examples/route.yaml", changes), tmp_path / "out")
    values = {s.subject: s.value for s in result.scores if s.metric == "accuracy"}
    assert values["result"] > values["keyword"]
    answer = load_router(tmp_path / "out").route("the brakes of my car make a noise")
    assert answer.worker == "cars"
