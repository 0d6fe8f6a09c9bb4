"""Several requests: growing numbers of records at once, and one after another."""

import pytest

from germane.core.errors import SettingError
from germane.core.records import Data, read_rows, write_jsonl
from germane.recipe import run_task

QUESTIONS = {"verbatim_tokens": 4, "examples": 0, "question": "{question}", "answer_tokens": 4}


def arguments(facts, **changes):
    files = facts.files
    given = {
        "model": str(facts.model), "initial": str(facts.initial), "forget": str(files["forget"]),
        "retain": str(files["retain"]), "requests": 2, "trials": 1, "references": False,
    }  # fmt: skip
    return {**given, **changes}


def course(result, name):
    (plot,) = [plot for plot in result.evidence.steps[0].plots if plot.title.startswith("utility as more")]
    return next(series.values for series in plot.series if series.name == name)


def test_both_courses_are_measured_and_nothing_else_is_left(facts, tmp_path):
    result = run_task(
        "unlearn", "npo", arguments(facts), {"epochs": 3, "learning_rate": 3e-4}, tmp_path / "out"
    )
    scores = {score.metric: score.value for score in result.scores}
    at_once, in_turn = course(result, "at once"), course(result, "one after another")
    assert len(at_once) == len(in_turn) == 2
    assert at_once[-1] == scores["utility"]
    assert in_turn[0] == at_once[0]
    assert scores["scalability (least utility)"] == min(at_once)
    assert scores["sustainability (least utility)"] == min(in_turn)
    assert not list(result.folder.glob(".*"))


def test_each_request_is_what_a_run_of_its_own_would_be(facts, tmp_path):
    """Also of a method that puts something aside for all its trials."""
    settings = {"epochs": 2, "learning_rate": 1e-3, "alpha": 1.0}
    whole = run_task("unlearn", "task-vector", arguments(facts, trials=0), settings, tmp_path / "whole")
    rows = read_rows(Data(name="forget", path=str(facts.files["forget"])))
    write_jsonl(rows[: len(rows) // 2], tmp_path / "first.jsonl")
    asked = arguments(facts, trials=0, requests=1, forget=str(tmp_path / "first.jsonl"))
    first = run_task("unlearn", "task-vector", asked, settings, tmp_path / "first")
    assert course(whole, "at once")[0] == {s.metric: s.value for s in first.scores}["utility"]


def test_a_suite_measures_every_request(facts, tmp_path):
    data = [f"forget-questions={facts.files['forget']}", f"retain-questions={facts.files['retain']}"]
    asked = arguments(
        facts, holdout=str(facts.files["holdout"]), data=data,
        suites=[{"name": "muse", "settings": QUESTIONS}],
    )  # fmt: skip
    result = run_task("unlearn", "gradient-ascent", asked, {"epochs": 1}, tmp_path / "out")
    scores = {score.metric: score.value for score in result.scores}
    assert scores["scalability (least KnowMem utility)"] > 0.5
    assert "sustainability (least KnowMem utility)" in scores


def test_more_requests_than_records_and_no_yardstick_are_refused(facts, tmp_path):
    with pytest.raises(SettingError, match="requests: 99 parts of 8 forget records"):
        run_task("unlearn", "npo", arguments(facts, requests=99), {}, tmp_path / "out")
    with pytest.raises(SettingError, match="--retain FILE"):
        run_task("unlearn", "npo", arguments(facts, retain=None), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_context_too_short_for_a_suite_is_refused_before_work(facts, tmp_path):
    data = [f"forget-questions={facts.files['forget']}", f"retain-questions={facts.files['retain']}"]
    asked = arguments(facts, holdout=str(facts.files["holdout"]), data=data, suites=["muse"])
    with pytest.raises(SettingError, match="reads 128 tokens at most"):
        run_task("unlearn", "npo", asked, {}, tmp_path / "out")
    assert not list(tmp_path.iterdir())
