"""What every route method promises, on tiny real models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zoo
from parts import TOPICS, Places, train

from germane.core.errors import RecordsError, SettingError
from germane.core.evidence import Evidence
from germane.method import build, names
from germane.tasks.route import Decision, load_router

CASES = {**{name: {} for name in names("route")}, "route/functional-token frozen": {"frozen": True}}
QUERIES = ["w1 w2 w41", "w11 w13", "w23", "", "it's <route_0>('x')<route_end> \u00e9\n", "w12 " * 400]


def method_of(case: str) -> str:
    return case.split(" ", maxsplit=1)[0]


@pytest.fixture(scope="module")
def routers(places: Places, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("contract")
    for number, (case, settings) in enumerate(CASES.items()):
        train(places, method_of(case), place / str(number), **settings)
    return {case: place / str(number) for number, case in enumerate(CASES)}


def said(decisions: list[Decision]) -> list[tuple[Any, ...]]:
    return [(d.worker, d.query, d.output, d.fallback, round(d.score, 4)) for d in decisions]


@pytest.mark.parametrize("case", CASES)
def test_always_a_member_with_its_score(routers: dict[str, Path], case: str):
    decisions = load_router(routers[case]).route_all(QUERIES)
    assert len(decisions) == len(QUERIES)
    for decision, query in zip(decisions, QUERIES, strict=True):
        assert decision.worker in TOPICS
        assert list(decision.scores) == list(TOPICS)
        assert all(0 <= score <= 1 for score in decision.scores.values())
        assert decision.score == decision.scores[decision.worker]
        assert decision.asked == query
        assert decision.query == query or not decision.fallback


@pytest.mark.parametrize("case", CASES)
def test_a_query_alone_goes_where_it_goes_among_others(routers: dict[str, Path], case: str):
    router = load_router(routers[case])
    assert said([router.route(query) for query in QUERIES[:3]]) == said(router.route_all(QUERIES)[:3])


def test_the_same_decisions_in_another_process(routers: dict[str, Path]):
    script = """
import json, sys
from germane.tasks.route import load_router
queries = json.loads(sys.argv[1])
print(json.dumps([[[d.worker, d.query, d.output, d.fallback, round(d.score, 4)] for d in
      load_router(folder).route_all(queries)] for folder in sys.argv[2:]]))
"""
    command = [sys.executable, "-c", script, json.dumps(QUERIES), *(str(path) for path in routers.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    for path, there in zip(routers.values(), json.loads(done.stdout), strict=True):
        assert [tuple(row) for row in there] == said(load_router(path).route_all(QUERIES))


@pytest.mark.parametrize("case", CASES)
def test_same_seed_same_router(places: Places, routers: dict[str, Path], tmp_path: Path, case: str):
    train(places, method_of(case), tmp_path / "again", **CASES[case])
    first, second = ({**_files(path)} for path in (routers[case], tmp_path / "again"))
    assert first == second


def _files(folder: Path) -> dict[str, bytes]:
    kept = [path for path in folder.iterdir() if path.name not in ("evidence.json", "report.html")]
    return {path.name: path.read_bytes() for path in kept}


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_not_changed(places: Places, tmp_path: Path, case: str):
    folders = [places.base, places.encoder, places.graph.parent]
    before = zoo.digest(folders)
    train(places, method_of(case), tmp_path / "out", **CASES[case])
    assert zoo.digest(folders) == before


@pytest.mark.parametrize("method", names("route"))
@pytest.mark.parametrize("field", ["data", "evaluate"])
def test_an_unknown_label_is_refused_before_training(
    places: Places, tmp_path: Path, method: str, field: str
):
    from germane.recipe import run_task

    rows = [{"text": "w1", "label": "red"}, {"text": "w2", "label": "gren"}]
    bad = zoo.write_rows(tmp_path / "bad.jsonl", rows)
    arguments = {"graph": str(places.graph), "data": [f"learn={places.learn}"], field: [f"bad={bad}"]}
    settings = places.settings(method)
    with pytest.raises(
        RecordsError, match=r"record 2: label 'gren'.*did you mean 'green'.* Nodes of 'router'"
    ):
        run_task("route", method.split("/")[1], arguments, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", names("route"))
def test_unknown_settings_are_refused_and_known_ones_explained(method: str):
    with pytest.raises(SettingError, match="did you mean 'threshold'"):
        build(method, {"treshold": 0.5})
    for field in type(build(method, {})).model_fields.values():
        assert field.description


@pytest.mark.parametrize("case", CASES)
def test_a_higher_threshold_never_places_more(routers: dict[str, Path], case: str):
    router = load_router(routers[case])
    placed = []
    for threshold in (0.0, 0.5, 0.9, 1.0):
        router.threshold = threshold
        placed.append(sum(not decision.fallback for decision in router.route_all(QUERIES)))
    assert placed == sorted(placed, reverse=True)


@pytest.mark.parametrize("case", CASES)
def test_evidence_compares_with_chance_and_with_keywords(routers: dict[str, Path], case: str):
    step = Evidence.read(routers[case]).steps[0]
    scores = {(score.subject, score.metric): score for score in step.scores}
    result = scores["result", "accuracy"]
    assert result.n == 9
    assert result.low <= result.value <= result.high
    assert ("result", "parse rate") in scores
    assert ("random", "accuracy") in scores
    assert (("keyword", "accuracy") in scores) is (case != "route/keyword")
    table = step.tables[0]
    assert table.columns == ["belongs to", *TOPICS]
    assert sum(int(row[1 + n]) for n, row in enumerate(table.rows)) == round(result.value * 9)
    assert (routers[case] / "report.html").exists()
    assert step.inputs
