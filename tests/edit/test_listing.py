"""Edits are listed and asked from the command line, and compared like other methods."""

import json

import pytest
from click.testing import CliRunner

from germane.cli import root
from germane.comparison import compare
from germane.core.errors import CheckpointError
from germane.edited import EditList, load_edited
from germane.recipe import run_task

SETTINGS = {"layer": -1, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def edited(facts, tmp_path_factory):
    out = tmp_path_factory.mktemp("edited") / "out"
    asked = {"model": str(facts.model), "edits": str(facts.files["edits"])}
    return run_task("edit", "fine-tune", asked, SETTINGS, out).folder


def said(*arguments):
    result = CliRunner().invoke(root, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_edits_are_listed_and_the_model_answers(edited):
    listed = EditList.read(edited)
    first = listed.edits[0]
    text = said("edits", str(edited), "--ask", first.prompt)
    assert text.startswith(f"{first.id}: {first.prompt}{first.answer}\n")
    assert text.rstrip().endswith(first.answer.strip())
    assert json.loads(said("edits", str(edited), "--json")) == json.loads(listed.model_dump_json())


def test_a_model_without_edits_has_none(facts):
    assert said("edits", str(facts.model)) == ""


def test_a_damaged_list_is_said(edited, tmp_path):
    (tmp_path / "config.json").write_bytes((edited / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((edited / "model.safetensors").read_bytes())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((edited / file).read_bytes())
    (tmp_path / "edits.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_edited(str(tmp_path))


def test_methods_are_compared_by_reach_and_locality(facts, tmp_path):
    result = compare(
        "edit", methods=["fine-tune", "grace"], out=tmp_path / "out",
        arguments={"model": str(facts.model), "edits": str(facts.files["edits"])},
        settings={"fine-tune": SETTINGS, "grace": {"layer": -1}},
    )  # fmt: skip
    assert {row.status for row in result.evidence.rows} == {"done", "reference"}
    (scatter,) = result.evidence.scatters
    assert {point.name for point in scatter.points} >= {"fine-tune", "grace", "base"}
    assert not scatter.lower_x
