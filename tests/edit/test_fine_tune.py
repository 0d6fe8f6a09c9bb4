"""Fine-tuning on edits: what moves, how far, and when it ends."""

from __future__ import annotations

import pytest
import torch
import zoo

from germane.core.errors import CheckpointError
from germane.core.training import Diverged
from germane.method import build
from germane.tasks.edit._answers import answer_losses

LAYER = "model.layers.1.mlp.down_proj.weight"


def test_no_weight_leaves_the_bound_and_some_reach_it(facts, edit_with):
    settings = {"layer": -1, "learning_rate": 1e-2, "norm_bound": 0.005}
    before, after = zoo.weights(facts.model), zoo.weights(edit_with("fine-tune", settings).folder)
    furthest = float((after[LAYER] - before[LAYER]).abs().max())
    assert furthest == pytest.approx(0.005, abs=1e-7)


def test_only_the_layers_value_matrix_moves(facts, edit_with):
    settings = {"layer": 1, "learning_rate": 1e-2}
    before, after = zoo.weights(facts.model), zoo.weights(edit_with("fine-tune", settings).folder)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {LAYER}


def test_without_a_layer_all_weights_may_move(facts, edit_with):
    before, after = zoo.weights(facts.model), zoo.weights(edit_with("fine-tune").folder)
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) / 2


def test_an_edit_ends_where_its_loss_is_low_enough(editing, edits):
    def loss():
        with torch.no_grad():
            return float(
                answer_losses(editing.model, editing.tokenizer, [(edits[0].prompt, edits[0].answer)])
            )

    first = loss()
    settings = {"learning_rate": 1e-3, "steps": 100}
    build("edit/fine-tune", {**settings, "enough": first + 1}).edit(editing, edits[:1])
    assert loss() == first
    build("edit/fine-tune", {**settings, "enough": 1.0}).edit(editing, edits[:1])
    stopped = loss()
    assert 0.05 < stopped <= 1.0
    build("edit/fine-tune", {**settings, "enough": 0.01}).edit(editing, edits[:1])
    assert loss() <= 0.01


def test_a_loss_that_is_not_finite_names_edit_and_step_and_nothing_is_written(edit_with, edits, tmp_path):
    with pytest.raises(Diverged, match=f"edit {edits[0].id}, step 2"):
        edit_with("fine-tune", {"learning_rate": 1e30})
    assert not list(tmp_path.iterdir())


def test_a_layer_that_is_not_there_is_refused_before_the_model_is_loaded(edit_with, monkeypatch):
    monkeypatch.setattr("germane.tasks.edit._task.load_model", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(CheckpointError, match="layer 7: the model has 2 layers"):
        edit_with("fine-tune", {"layer": 7})
