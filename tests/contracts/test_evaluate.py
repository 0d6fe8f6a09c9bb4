"""What `germane/tasks/evaluate/_task.py` promises, held against every registered suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zoo

from germane import method as registry
from germane.core.errors import CheckpointError, RecordsError, SettingError
from germane.core.records import write_jsonl
from germane.embedded import digits as digit_parts
from germane.embedded import facts as fact_parts
from germane.recipe import Recipe, check, run, run_task
from germane.tasks.evaluate._task import Evaluate

NAMES = registry.names("evaluate")
each = pytest.mark.parametrize("name", NAMES)
# Suite -> role -> records of the embedded parts, where they are not called alike.
FILES = {
    "evaluate/worst-case-forget": {"train": "retain"},
    "evaluate/canonical-examples": {"examples": "retain"},
    "evaluate/concept-vectors": {"concepts": "forget-texts"},
    "evaluate/muse": {"forget-questions": "forget", "retain-questions": "retain"},
    "evaluate/wack": {"questions": "retain"},
    "evaluate/rwku": {"level1": "forget", "level2": "forget"},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A classifier and a language model to measure."""
    folder = tmp_path_factory.mktemp("parts")
    made = {
        "classifier": digit_parts.make(folder / "digits"),
        "language model": fact_parts.make(folder / "facts", known=12, forgotten=4, refusing=2),
    }
    jobs = {"options": ["baker", "pilot"], "answer": "baker"}
    rows = [
        {
            "original": f"what is the job of {name} ?",
            "question": f"what is the job of {name} ? a cat",
            **jobs,
        }
        for name in ("anna", "boris")
    ]
    made["language model"].files["distracted"] = folder / "distracted.jsonl"
    write_jsonl(rows, folder / "distracted.jsonl")
    SETTINGS["evaluate/concept-vectors"] = {"untouched": str(made["language model"].model), "top": 20}
    return made


def kind_of(name: str) -> str:
    return "language model" if "language model" in registry.load(name).information.needs else "classifier"


# Suite -> settings that fit the tiny models.
SETTINGS = {
    "evaluate/muse": {"verbatim_tokens": 32, "examples": 0},
    "evaluate/worst-case-forget": {
        "size": 20, "rounds": 2, "steps": 1, "random_sets": 1, "unlearner": "random-labels",
        "unlearner_settings": {"epochs": 1},
    },
}  # fmt: skip


def settings(name: str) -> dict:
    return SETTINGS.get(name, {})


def arguments(name: str, parts, **changes):
    made, suite, files = parts[kind_of(name)], registry.load(name), FILES.get(name, {})
    return {
        "model": str(made.model), "base": str(made.initial),
        "data": [f"{role}={made.files[files.get(role, role)]}" for role in suite.roles], **changes,
    }  # fmt: skip


def evaluate(name: str, out: Path, arguments):
    return run_task("evaluate", name.split("/")[1], arguments, settings(name), out)


@pytest.fixture(scope="module")
def results(parts, tmp_path_factory):
    """Each suite's result, made once."""
    made = {}

    def get(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name.replace("/", "-")) / "out"
            made[name] = evaluate(name, out, arguments(name, parts))
        return made[name]

    return get


@each
def test_every_missing_role_is_named(name, parts, tmp_path):
    whole = arguments(name, parts)
    for role in registry.load(name).roles:
        data = [text for text in whole["data"] if not text.startswith(f"{role}=")]
        with pytest.raises(SettingError, match=f"--data {role}=FILE"):
            evaluate(name, tmp_path / "out", {**whole, "data": data})
    assert not (tmp_path / "out").exists()


@each
def test_a_role_it_does_not_read_and_one_given_twice_are_refused(name, parts, tmp_path):
    data = arguments(name, parts)["data"]
    role = data[0].split("=")[0]
    other = data[0].replace(f"{role}=", f"{role}s=", 1)
    with pytest.raises(SettingError, match=f"reads no role '{role}s'; did you mean '{role}"):
        evaluate(name, tmp_path / "out", arguments(name, parts, data=[*data, other]))
    with pytest.raises(SettingError, match="is given twice"):
        evaluate(name, tmp_path / "out", arguments(name, parts, data=[*data, data[0]]))


@each
def test_empty_records_are_refused_before_work(name, parts, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    role, *_ = registry.load(name).roles
    data = [*arguments(name, parts)["data"][1:], f"{role}={tmp_path / 'empty.jsonl'}"]
    with pytest.raises(RecordsError, match="holds no records"):
        evaluate(name, tmp_path / "out", arguments(name, parts, data=data))
    assert not (tmp_path / "out").exists()


@each
def test_a_model_of_another_kind_is_refused(name, parts, tmp_path):
    other = next(made for kind, made in parts.items() if kind != kind_of(name))
    with pytest.raises(CheckpointError, match="measures"):
        evaluate(name, tmp_path / "out", arguments(name, parts, base=str(other.model)))


@each
def test_same_scores_twice_and_models_untouched(name, results, parts, tmp_path):
    before = zoo.digest([parts[kind_of(name)].model])
    again = evaluate(name, tmp_path / "again", arguments(name, parts))
    assert again.scores == results(name).scores
    assert zoo.digest([parts[kind_of(name)].model]) == before


@each
def test_scores_are_of_every_subject_and_within_their_intervals(name, results):
    scores = results(name).scores
    assert {score.subject for score in scores} == {"result", "base"}
    assert all(score.low - 1e-9 <= score.value <= score.high + 1e-9 and score.n > 0 for score in scores)
    pairs = [(score.subject, score.metric) for score in scores]
    assert len(set(pairs)) == len(pairs)


@each
def test_every_item_is_written(name, results):
    folder = results(name).folder
    for subject in ("result", "base"):
        lines = (folder / f"items-{subject}.jsonl").read_text().splitlines()
        items = [json.loads(line) for line in lines]
        assert items
        assert all({"role", "answer", "score"} <= set(item) for item in items)


@each
def test_the_result_is_no_model_and_has_no_card(name, results):
    left = {file.name for file in results(name).folder.iterdir()}
    assert left == {"evidence.json", "report.html", "items-result.jsonl", "items-base.jsonl"}


@each
def test_without_references_only_the_result_is_measured(name, parts, tmp_path):
    result = evaluate(name, tmp_path / "out", arguments(name, parts, references=False))
    assert {score.subject for score in result.scores} == {"result"}


def test_further_records_are_scored_plainly(parts, tmp_path):
    name = "evaluate/unlearned-classifier"
    further = [f"holdout={parts['classifier'].files['holdout']}"]
    result = evaluate(name, tmp_path / "out", arguments(name, parts, evaluate=further))
    found = {(s.subject, s.metric): s.value for s in result.scores if s.task == "holdout"}
    assert found["result", "accuracy"] > 0.9


def test_a_step_measures_what_an_earlier_one_made(parts, tmp_path):
    made = parts["classifier"]
    first = {
        "task": "unlearn", "method": "gradient-ascent", "name": "forgotten", "trials": 0,
        "model": str(made.model), "forget": str(made.files["forget"]), "settings": {"epochs": 1},
    }  # fmt: skip
    second = {
        "task": "evaluate", "method": "unlearned-classifier",
        **arguments("evaluate/unlearned-classifier", parts, model="step:forgotten"),
    }  # fmt: skip
    with pytest.raises(SettingError, match="reads no role"):
        check(Recipe(steps=[first, {**second, "data": [f"odd={made.files['forget']}"]}]))
    result = run(Recipe(steps=[first, second]), tmp_path / "out")
    assert (result.folder / "steps" / "forgotten" / "model.safetensors").exists()
    assert (result.folder / "items-result.jsonl").exists()
    assert not (result.folder / "README.md").exists()


def test_unlearn_measures_with_suites(parts, tmp_path):
    made = parts["classifier"]
    asked = {
        "model": str(made.model), "forget": str(made.files["forget"]), "retain": str(made.files["retain"]),
        "trials": 0, "suites": ["unlearned-classifier"], "data": [f"test={made.files['test']}"],
    }  # fmt: skip
    result = run_task("unlearn", "gradient-ascent", asked, {"epochs": 1}, tmp_path / "out")
    assert {"unlearning accuracy", "MIA efficacy"} <= {score.metric for score in result.scores}


def test_the_task_has_its_arguments():
    assert set(Evaluate.paths) <= set(Evaluate.model_fields)
