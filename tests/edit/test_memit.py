"""MEMIT: its least squares, its spread over layers, and its effect on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import zoo

from germane.core.layers import layer_at, value_matrix, weight_of
from germane.edited import Edit
from germane.method import build
from germane.tasks.edit.memit import _states, least_squares_change, mean_keys

ORACLE = json.loads((Path(__file__).parents[1] / "fixtures" / "memit.json").read_text())
SMALL = {
    "weight_decay": 0.0, "kl_weight": 0.0, "learning_rate": 0.1, "contexts": 0, "largest_move": 4.0,
    "update_weight": 0.1,
}  # fmt: skip


def problem(edits):
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    keys = torch.randn(6, edits, generator=generator, dtype=torch.float64)
    missing = torch.randn(4, edits, generator=generator, dtype=torch.float64)
    return keys, missing, texts.T @ texts / 50


def test_the_change_solves_the_least_squares_problem():
    """D minimises |D K - R|^2 + w tr(D C D^T): stacked as ordinary least squares of D^T."""
    keys, missing, moment = problem(3)
    root = torch.linalg.cholesky(7.0 * moment)
    rows = torch.cat([keys.T, root.T])
    wanted = torch.linalg.lstsq(rows, torch.cat([missing.T, torch.zeros(6, 4, dtype=torch.float64)]))
    assert torch.allclose(least_squares_change(keys, missing, moment, 7.0), wanted.solution.T, atol=1e-10)


def test_one_edit_by_hand():
    """k = (1, 2), C the unit matrix, w = 5: k^T (5 + k k^T)^-1 = k / (5 + 5)."""
    change = least_squares_change(
        torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0]]), torch.eye(2, dtype=torch.float64), 5.0
    )
    assert torch.allclose(change, torch.tensor([[1.0, 2.0]], dtype=torch.float64), atol=1e-12)


def test_without_weight_on_the_texts_a_single_edit_reaches_its_value():
    keys, missing, moment = problem(1)
    change = least_squares_change(keys, missing, moment, 1e-9)
    assert torch.allclose(change @ keys, missing, atol=1e-6)


def test_changes_are_those_of_the_official_code(sines, monkeypatch):
    given = ORACLE["inputs"]
    editing, moment = sines()
    monkeypatch.setattr("germane.tasks.edit.memit.second_moments", lambda *_: [moment, moment])
    weights = [weight_of(value_matrix(editing.model, layer)[1]) for layer in (0, 1)]
    before = [weight.detach().clone() for weight in weights]
    settings = {name: given[name] for name in ("layer", "layers", "steps", "update_weight")}
    edits = [Edit(id=str(number), **each) for number, each in enumerate(given["edits"])]
    build("edit/memit", {**settings, "kl_weight": 0.0, "contexts": 0}).edit(editing, edits)
    for weight, old, wanted in zip(weights, before, ORACLE["outputs"]["changes"], strict=True):
        assert torch.allclose(weight - old, torch.tensor(wanted), atol=1e-5)


def test_keys_over_contexts_are_those_of_the_official_code(sines):
    editing, _ = sines()
    edits = [Edit(id=str(n), **each) for n, each in enumerate(ORACLE["inputs"]["edits"])]
    keys = mean_keys(editing, edits, ORACLE["inputs"]["contexts"], value_matrix(editing.model, 1)[1])
    assert torch.allclose(keys, torch.tensor(ORACLE["outputs"]["keys"]), atol=1e-5)


def test_four_edits_move_their_surroundings_less_than_a_fast_fine_tuning(edit_with):
    result = edit_with("memit", SMALL)
    tuned = edit_with("fine-tune", {"learning_rate": 1e-3})
    assert result.scores["locality"] > tuned.scores["locality"]


def test_an_edit_takes_and_little_else_moves(facts, edits, edit_with):
    file = zoo.write_rows(facts.model.parent / "one.jsonl", [edits[1].model_dump()])
    result = edit_with("memit", SMALL, file)
    assert result.scores["reliability"] == 1.0
    assert result.scores["locality"] >= 0.9


def test_all_layers_up_to_the_last_share_the_work(sines):
    editing, _ = sines()
    before = {name: weight.clone() for name, weight in editing.model.state_dict().items()}
    edits = [Edit(id=str(n), **each) for n, each in enumerate(ORACLE["inputs"]["edits"])]
    build("edit/memit", {**SMALL, "layer": -2, "layers": 5}).edit(editing, edits)
    after = editing.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"transformer.h.{number}.mlp.c_proj.weight" for number in (0, 1)}


def test_more_weight_on_the_texts_moves_less(editing, edits, facts):
    _, matrix = value_matrix(editing.model, 0)
    before, moved = matrix.weight.detach().clone(), []
    for weight in (1.0, 1e5):
        with torch.no_grad():
            matrix.weight.copy_(before)
        build("edit/memit", {**SMALL, "update_weight": weight}).edit(editing, edits[:1])
        moved.append(float((matrix.weight - before).detach().norm()))
    assert 0 < moved[1] < moved[0] / 2


def test_the_states_reach_their_goals_where_the_texts_have_no_weight(sines):
    """In a GPT-2, whose matrices are stored the other way round."""
    editing, _ = sines()
    editing.general = ["anna adler works as a baker . anna adler lives in oslo"] * 4
    edits = [Edit(id=str(n), **each) for n, each in enumerate(ORACLE["inputs"]["edits"])]
    method = build("edit/memit", {**SMALL, "layer": 1, "layers": 2, "update_weight": 1e-9})
    _, last = layer_at(editing.model, 1)
    goals = method._goals(editing, edits, [""], last)
    before = _states(editing, edits, last)
    method.edit(editing, edits)
    assert isinstance(value_matrix(editing.model, 1)[1], transformers.pytorch_utils.Conv1D)
    assert (goals - before).norm() > 0.5
    assert torch.allclose(_states(editing, edits, last), goals, atol=1e-3)


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(Exception, match="update_weight"):
        build("edit/memit", {"update_weight": 0})
