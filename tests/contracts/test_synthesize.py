"""What `germane/tasks/synthesize/_task.py` promises, held against every registered method."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import zoo

from germane import method as registry
from germane.core.errors import CheckpointError, GermaneError, RecordsError, SettingError
from germane.core.records import write_jsonl
from germane.embedded import digits as digit_parts
from germane.embedded import facts as fact_parts
from germane.recipe import Recipe, check, run_task
from germane.tasks.synthesize._task import Synthesize

each = pytest.mark.parametrize("name", registry.names("synthesize"))
# Method -> settings that fit the tiny model.
SETTINGS = {
    "synthesize/rwku": {
        "target": "anna adler", "introduction": "anna adler is a person .", "texts": 14, "text_tokens": 8,
        "refusals": 5, "question_tokens": 4, "probing": {"question": "{question}", "opening": ""},
    },
    "synthesize/nora": {"questions": 6},
    "synthesize/ratd": {},
    "synthesize/provence": {"max_tokens": 8},
    "synthesize/contextual-distraction": {"max_try": 2, "sentence_tokens": 6},
}  # fmt: skip
# Method -> role -> records of the embedded parts.
FILES = {
    "synthesize/rwku": {"questions": "forget", "neighbor-questions": "retain"},
    "synthesize/nora": {"demonstrations": "solved"},
    "synthesize/ratd": {"train": "forget", "corpus": "forget-texts"},
    "synthesize/provence": {"questions": "asked"},
    "synthesize/contextual-distraction": {"questions": "choices"},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    made = fact_parts.make(tmp_path_factory.mktemp("facts"), known=12, forgotten=4, refusing=2)
    rows = [
        {"prompt": "what is the job of anna ?", "answer": "baker", "solution": "anna works as a baker ."}
    ] * 3
    solved = made.model.parent / "solved.jsonl"
    write_jsonl(rows, solved)
    rows = [{"prompt": "anna ?", "options": ["baker", word], "answer": "baker"} for word in ("cat", "dog")]
    choices = made.model.parent / "choices.jsonl"
    write_jsonl([*rows, {**rows[0], "answer": "cat"}], choices)  # one of these the model answers rightly
    asked = made.model.parent / "asked.jsonl"
    passages = [f"{name} owns a cat . {name} works ." for name in ("anna", "boris", "clara", "david")]
    write_jsonl([{"prompt": "anna ?", "answer": "a cat", "passages": passages}], asked)
    files = {"solved": solved, "choices": choices, "asked": asked}
    return dataclasses.replace(made, files={**made.files, **files})


def arguments(name: str, parts, **changes):
    data = [f"{role}={parts.files[file]}" for role, file in FILES[name].items()]
    return {"model": str(parts.model), "data": data, **changes}


def synthesize(name: str, out: Path, arguments, seed: int = 0):
    return run_task("synthesize", name.split("/")[1], arguments, SETTINGS[name], out, seed=seed)


def files_of(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(folder.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def results(parts, tmp_path_factory):
    """Each method's result, made once."""
    made = {}

    def get(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name.replace("/", "-")) / "out"
            made[name] = synthesize(name, out, arguments(name, parts))
        return made[name]

    return get


@each
def test_every_record_says_where_it_comes_from_and_is_counted(name, results):
    result = results(name)
    written = files_of(result.folder)
    assert written
    counts = next(t for t in result.evidence.steps[0].tables if t.title == "Records").rows
    for file, text in written.items():
        rows = [json.loads(line) for line in text.splitlines()]
        assert rows
        assert all(row["origin"] for row in rows)
        assert sum(count for counted, _, count in counts if counted == file) == len(rows)


@each
def test_the_same_seed_makes_the_same_files_and_leaves_the_model(name, results, parts, tmp_path):
    before = zoo.digest([parts.model])
    again = synthesize(name, tmp_path / "again", arguments(name, parts))
    other = synthesize(name, tmp_path / "other", arguments(name, parts), seed=1)
    assert files_of(again.folder) == files_of(results(name).folder)
    assert files_of(other.folder) != files_of(results(name).folder)
    assert zoo.digest([parts.model]) == before


@each
def test_the_result_is_records_and_no_model(name, results):
    left = {file.name for file in results(name).folder.iterdir() if file.suffix != ".jsonl"}
    assert left == {"evidence.json", "report.html"}


@each
def test_a_role_it_does_not_read_and_one_given_twice_are_refused(name, parts, tmp_path):
    data = arguments(name, parts)["data"]
    role = data[0].split("=")[0]
    other = data[0].replace(f"{role}=", f"{role}s=", 1)
    with pytest.raises(SettingError, match=f"reads no role '{role}s'; did you mean '{role}"):
        synthesize(name, tmp_path / "out", arguments(name, parts, data=[*data, other]))
    with pytest.raises(SettingError, match="is given twice"):
        synthesize(name, tmp_path / "out", arguments(name, parts, data=[*data, data[0]]))


@each
def test_empty_records_are_refused_before_work(name, parts, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    kind = registry.load(name)
    for role in (*kind.roles, *kind.optional):
        data = [text for text in arguments(name, parts)["data"] if not text.startswith(f"{role}=")]
        data.append(f"{role}={tmp_path / 'empty.jsonl'}")
        with pytest.raises(RecordsError, match="holds no records"):
            synthesize(name, tmp_path / "out", arguments(name, parts, data=data))
    assert not (tmp_path / "out").exists()


@each
def test_a_model_that_cannot_write_is_refused(name, parts, tmp_path):
    model = digit_parts.make(tmp_path / "digits").model
    with pytest.raises(CheckpointError, match="needs a language model"):
        synthesize(name, tmp_path / "out", arguments(name, parts, model=str(model)))


@each
def test_a_model_behind_a_server_writes_where_its_weights_are_not_needed(name, parts, tmp_path):
    asked = arguments(name, parts, model="http://127.0.0.1:9/v1#none")
    if registry.load(name).local:
        with pytest.raises(SettingError, match="needs the model itself, not one behind http"):
            synthesize(name, tmp_path / "out", asked)
        return
    check(
        Recipe.model_validate(
            {
                "steps": [
                    {
                        "task": "synthesize",
                        "method": name.split("/")[1],
                        **asked,
                        "settings": SETTINGS[name],
                    }
                ]
            }
        )
    )
    with pytest.raises(SettingError, match="evaluate: measures a model that is here"):
        synthesize(name, tmp_path / "out", {**asked, "evaluate": [asked["data"][0].split("=")[1]]})


@each
def test_faults_are_found_while_an_earlier_step_is_missing(name, parts):
    first = {
        "task": "unlearn", "method": "gradient-ascent", "name": "before", "model": str(parts.model),
        "forget": str(parts.files["forget"]), "trials": 0,
    }  # fmt: skip
    second = {
        "task": "synthesize", "method": name.split("/")[1], "settings": SETTINGS[name],
        **arguments(name, parts, model="step:before"),
    }  # fmt: skip
    check(Recipe(steps=[first, second]))
    with pytest.raises(GermaneError, match="reads no role"):
        check(Recipe(steps=[first, {**second, "data": [f"odd={parts.files['forget']}"]}]))


@each
def test_further_records_are_scored_with_the_model(name, parts, tmp_path):
    result = synthesize(
        name, tmp_path / "out", arguments(name, parts, evaluate=[f"kept={parts.files['retain']}"])
    )
    assert [(score.subject, score.task) for score in result.scores] == [("base", "kept")]


def test_the_task_has_its_arguments():
    assert set(Synthesize.paths) <= set(Synthesize.model_fields)
