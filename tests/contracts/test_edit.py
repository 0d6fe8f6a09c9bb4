"""What `germane/tasks/edit/_task.py` promises, held against every registered edit method."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file

import germane
from germane import method as registry
from germane.core.errors import CheckpointError, GermaneError, RecordsError, SettingError
from germane.core.models import MEMORY, load_model
from germane.core.records import Data, read_rows, write_jsonl
from germane.edited import ORIGINALS, EditList, answer, load_edited
from germane.embedded import digits as digit_parts
from germane.embedded import facts as fact_parts
from germane.recipe import run_task
from germane.tasks.edit._task import EditModel

NAMES = registry.names("edit")
each = pytest.mark.parametrize("name", NAMES)
# Method -> settings that fit the tiny model.
SMALL = {"weight_decay": 0, "kl_weight": 0, "learning_rate": 0.1, "contexts": 0}
SETTINGS = {
    "edit/fine-tune": {"layer": -1, "learning_rate": 1e-2},
    "edit/canonical": {"learning_rate": 1e-3, "epochs": 20, "ball": 1.0},
    "edit/eren": {"reader": "span", "gate": 0.2},
    "edit/grace": {"layer": -1},
    "edit/rome": SMALL,
    "edit/wise": {"layer": -1, "steps": 40, "contexts": 2, "learning_rate": 0.5},
    "edit/memit": {**SMALL, "largest_move": 4, "update_weight": 0.1},
    "edit/sense-tuning": {
        "learning_rate": 0.3,
        "epochs": 20,
        "ball": 10.0,
        "background": 1,
        "divergence_weight": 0.01,
    },
}
LOCATED = ("edit/rome", "edit/memit")  # write where the model has read the subject
SEED = 7


def made(folder, backpack: bool = False):
    """A language model that knows twelve people, and changed facts of four of them."""
    return fact_parts.make(folder, known=12, forgotten=4, refusing=2, backpack=backpack)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return made(tmp_path_factory.mktemp("facts"))


@pytest.fixture(scope="module")
def backpack(tmp_path_factory):
    """The same as a Backpack, and the Backpack edited, for the ensemble."""
    folder = tmp_path_factory.mktemp("backpack")
    parts = made(folder / "facts", backpack=True)
    edited = edit("edit/sense-tuning", folder / "edited", arguments(parts)).folder
    SETTINGS["edit/backpack-ensemble"] = {"edited": str(edited), "original": str(parts.model), "ball": 10.0}
    return parts


@pytest.fixture
def parts(request, llama):
    """What the method that is tested edits."""
    name = request.node.callspec.params.get("name", "") if hasattr(request.node, "callspec") else ""
    if name in ("edit/sense-tuning", "edit/backpack-ensemble"):
        parts = request.getfixturevalue("backpack")
        return parts if name == "edit/sense-tuning" else llama
    if name in LOCATED:
        statements = llama.files["edits"].with_name("statements.jsonl")
        write_jsonl(
            as_statements(read_rows(Data(name="edits", path=str(llama.files["edits"])))), statements
        )
        return dataclasses.replace(llama, files={**llama.files, "edits": statements})
    return llama


def as_statements(rows):
    """The same edits, which two layers have learned as a property of the subject in statements only."""
    return [{**row, "prompt": row["rephrase"][0], "rephrase": [row["prompt"]]} for row in rows]


def arguments(parts, **changes):
    given = {"model": str(parts.model), "edits": str(parts.files["edits"])}
    return {**given, "general": str(parts.files["retain-texts"]), **changes}


def edit(name: str, out: Path, arguments):
    return run_task("edit", name.split("/")[1], arguments, SETTINGS.get(name, {}), out, seed=SEED)


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def results(parts, cache, tmp_path_factory):
    """Each method's result, made once."""

    def get(name):
        if name not in cache:
            out = tmp_path_factory.mktemp(name.replace("/", "-")) / "out"
            cache[name] = edit(name, out, arguments(parts))
        return cache[name]

    return get


def prompts(parts) -> list[str]:
    rows = read_rows(Data(name="edits", path=str(parts.files["edits"])))
    return [row["prompt"] for row in rows] + [pair[0] for row in rows for pair in row["locality"]]


@each
def test_edits_take_and_are_measured_before_and_after(name, results):
    scores = {(s.subject, s.metric): s.value for s in results(name).scores}
    for metric in ("reliability, written", "generality, written", "locality, written"):
        assert {("base", metric), ("result", metric)} <= scores.keys()
    assert scores["base", "locality, written"] == 1.0
    codes = {finding.code for finding in results(name).findings}
    if name == "edit/memit":  # two layers leave too little between subject and answer for four at once
        assert "changed" in codes
        return
    assert scores["result", "reliability, written"] > scores["base", "reliability, written"]
    assert "no-effect" not in codes


@each
def test_the_weights_have_the_form_they_had_and_the_changed_ones_are_kept(name, results, parts):
    folder = results(name).folder
    before, after = (load_file(place / "model.safetensors") for place in (parts.model, folder))
    assert all((t.shape, t.dtype) == (after[n].shape, after[n].dtype) for n, t in before.items())
    added = after.keys() - before.keys()  # only a Backpack grows: by the senses that are changed
    assert all("sense_changes" in n for n in added)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    originals = folder / ORIGINALS / "model.safetensors"
    kept = load_file(originals) if originals.exists() else {}
    assert set(kept) == changed
    assert all(torch.equal(kept[n], before[n]) for n in kept)


@each
def test_a_new_process_answers_the_same(name, results, parts):
    folder = results(name).folder
    code = "import json, sys; from germane.edited import answer; "
    code += "print(json.dumps(answer(sys.argv[1], json.loads(sys.argv[2]), 8)))"
    asked = [sys.executable, "-c", code, str(folder), json.dumps(prompts(parts))]
    written = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert json.loads(written) == answer(str(folder), prompts(parts), 8)


@each
def test_the_edits_are_listed_in_their_order(name, results, parts):
    listed = EditList.read(results(name).folder)
    rows = read_rows(Data(name="edits", path=str(parts.files["edits"])))
    assert listed.method == name
    assert listed.model == str(parts.model)
    assert [edit.id for edit in listed.edits] == ["1", "2", "3", "4"]
    assert [(edit.prompt, edit.answer) for edit in listed.edits] == [
        (r["prompt"], r["answer"]) for r in rows
    ]


@each
def test_an_edit_that_is_taken_back_was_never_made(name, results, parts, tmp_path):
    rows = read_rows(Data(name="edits", path=str(parts.files["edits"])))
    three = tmp_path / "three.jsonl"
    write_jsonl([rows[0], rows[1], rows[3]], three)
    never = edit(name, tmp_path / "never", arguments(parts, edits=str(three)))
    folder = str(results(name).folder)
    back = edit(name, tmp_path / "back", arguments(parts, model=folder, edits=None, take_back=["3"]))
    assert [entry.id for entry in EditList.read(back.folder).edits] == ["1", "2", "4"]
    assert answer(str(back.folder), prompts(parts), 8) == answer(str(never.folder), prompts(parts), 8)
    first, second = (load_file(r.folder / "model.safetensors") for r in (never, back))
    assert all(torch.equal(first[n], second[n]) for n in first)


@each
def test_all_edits_taken_back_give_the_untouched_model(name, results, parts, tmp_path):
    asked = arguments(parts, model=str(results(name).folder), edits=None, take_back=["1", "2", "3", "4"])
    back = edit(name, tmp_path / "back", asked)
    before, after = (load_file(place / "model.safetensors") for place in (parts.model, back.folder))
    assert all(torch.equal(before[n], after[n]) for n in before)
    editor, editing = load_edited(str(back.folder))
    _, untouched = load_edited(str(parts.model))
    editor.attach(untouched, {})
    asked = prompts(parts)
    assert editor.answer(editing, asked, 8) == editor.answer(untouched, asked, 8)


@each
def test_more_edits_can_be_made_later(name, results, parts, tmp_path):
    more = tmp_path / "more.jsonl"
    changed = fact_parts.edits(4, 2, fact_parts.people(6, 4))
    changed = as_statements(changed) if name in LOCATED else changed
    write_jsonl(changed, more)
    again = edit(
        name, tmp_path / "again", arguments(parts, model=str(results(name).folder), edits=str(more))
    )
    assert [entry.id for entry in EditList.read(again.folder).edits] == ["1", "2", "3", "4", "5", "6"]
    scores = {(s.subject, s.metric): s for s in again.scores}
    assert scores["result", "reliability, written"].n == 6
    assert scores["result", "reliability, written"].value > scores["base", "reliability, written"].value
    if name == "edit/backpack-ensemble":  # it knows what its Backpack was edited with
        return
    written = answer(str(again.folder), [row["prompt"] for row in changed], 8)
    assert any(row["answer"].strip() in text for row, text in zip(changed, written, strict=True))


@each
def test_same_seed_same_answers_and_inputs_untouched(name, results, parts, tmp_path):
    before = zoo.digest([parts.model])
    again = edit(name, tmp_path / "again", arguments(parts))
    assert again.scores == results(name).scores
    first, second = (load_file(r.folder / "model.safetensors") for r in (results(name), again))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert zoo.digest([parts.model]) == before


@each
def test_nothing_but_the_result_is_left(name, results):
    assert not list(results(name).folder.glob(".*"))


@each
def test_a_model_with_a_memory_is_not_taken_for_a_plain_one(name, results, tmp_path):
    folder = results(name).folder
    if not (folder / MEMORY).exists():
        load_model(str(folder))
        return
    with pytest.raises(CheckpointError, match="act beside its weights"):
        load_model(str(folder))
    (tmp_path / "damaged").mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes()[:-7])
    (tmp_path / "damaged" / "edits.json").write_bytes((folder / "edits.json").read_bytes())
    with pytest.raises(GermaneError):
        load_edited(str(tmp_path / "damaged"))


def refused(parts, tmp_path, kind, match, name=None, **changes):
    with pytest.raises(kind, match=match):
        edit(name or "edit/fine-tune", tmp_path / "out", arguments(parts, **changes))
    assert not (tmp_path / "out").exists()


def test_nothing_to_do_is_refused(parts, tmp_path):
    refused(parts, tmp_path, SettingError, "nothing to do", edits=None)


def test_an_unknown_edit_cannot_be_taken_back(parts, results, tmp_path):
    folder = str(results("edit/fine-tune").folder)
    refused(parts, tmp_path, SettingError, "has no edit '12'", model=folder, take_back=["12"])
    refused(parts, tmp_path, SettingError, "has no edit '1'.*It has none", take_back=["1"])


def test_an_empty_file_and_records_without_an_answer_are_refused(parts, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(parts, tmp_path, RecordsError, "holds no records", edits=str(empty))
    write_jsonl([{"prompt": "who ?"}], empty)
    refused(parts, tmp_path, RecordsError, "record 1: has no field 'answer'", edits=str(empty))
    write_jsonl([{"prompt": "who ?", "answer": ""}], empty)
    refused(parts, tmp_path, RecordsError, "record 1: answer must be a text", edits=str(empty))


def test_two_edits_of_one_id_are_refused(parts, tmp_path):
    twice = tmp_path / "twice.jsonl"
    write_jsonl(
        [{"id": "x", "prompt": "a", "answer": "b"}, {"id": "x", "prompt": "c", "answer": "d"}], twice
    )
    refused(parts, tmp_path, RecordsError, "record 2: there is an edit 'x' already", edits=str(twice))


def test_a_classifier_is_refused(parts, tmp_path):
    made = digit_parts.make(tmp_path / "digits")
    refused(parts, tmp_path, SettingError, "edits language models", model=str(made.model))


def test_an_edit_that_contradicts_an_earlier_one_is_reported_and_replaces_it(parts, tmp_path):
    rows = read_rows(Data(name="edits", path=str(parts.files["edits"])))
    other = {**rows[0], "answer": " oslo" if rows[0]["answer"] != " oslo" else " lima"}
    write_jsonl([rows[0], other], tmp_path / "two.jsonl")
    result = edit("edit/fine-tune", tmp_path / "out", arguments(parts, edits=str(tmp_path / "two.jsonl")))
    finding = next(f for f in result.findings if f.code == "contradiction")
    assert "edit 2 asks what edit 1 asks" in finding.message
    assert [entry.id for entry in EditList.read(result.folder).edits] == ["1", "2"]
    assert answer(str(result.folder), [rows[0]["prompt"]], 4)[0].split()[0] == other["answer"].strip()


def test_another_method_does_not_go_on(parts, results, tmp_path):
    folder = str(results("edit/fine-tune").folder)
    other = next(name for name in NAMES if name != "edit/fine-tune")
    refused(parts, tmp_path, SettingError, "was edited with edit/fine-tune", other, model=folder)


def test_a_method_that_needs_weights_refuses_an_address(parts, tmp_path):
    refused(parts, tmp_path, SettingError, "does not give away", model="http://localhost:1/v1#m")


def test_the_task_has_its_arguments():
    assert set(EditModel.paths) <= set(EditModel.model_fields)
    assert germane.edit.__doc__
