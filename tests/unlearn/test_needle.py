"""Needle moves one column, and that one as it should."""

from __future__ import annotations

import copy

import pytest
import torch

from germane.core.errors import CheckpointError, SettingError
from germane.core.evidence import Step
from germane.core.layers import value_matrix, weight_of
from germane.core.models import load_model
from germane.core.objective import Task
from germane.core.records import Data, read_rows
from germane.core.value_vectors import ValueVector, noise_like, word_tokens
from germane.method import build
from germane.tasks.unlearn._unlearner import Work


def work_of(facts, folder, seed: int = 0) -> Work:
    loaded = load_model(str(facts.model))
    data = Data(name="forget", path=str(facts.files["forget"]))
    task = Task(data, read_rows(data), loaded.model, loaded.processor)
    step = Step(task="unlearn", method="needle")
    return Work(loaded, task, None, lambda: load_model(str(facts.model)), "", seed, step, folder)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"optimiser": "sgd", "momentum": 0.9}])
def test_every_other_weight_is_bit_equal(facts, tmp_path, settings):
    work = work_of(facts, tmp_path)
    before = copy.deepcopy(work.model.state_dict())
    chosen = {"layer": 0, "column": 5, "epochs": 3, "batch_size": 2, **settings}
    build("unlearn/needle", chosen).unlearn(work)
    name = value_matrix(work.model, 0)[0] + ".weight"
    for key, value in work.model.state_dict().items():
        moved = (value != before[key]).nonzero()
        assert len(moved) == (64 if key == name else 0)
        assert key != name or (moved[:, 1] == 5).all()
    assert work.step.facts["value vector"]["column"] == 5


def test_without_epochs_the_noise_alone_is_added(facts, tmp_path):
    work = work_of(facts, tmp_path, seed=3)
    column = weight_of(value_matrix(work.model, -1)[1])[:, 9]
    before = column.detach().clone()
    build("unlearn/needle", {"column": 9, "epochs": 0, "noise": 0.1}).unlearn(work)
    noise = noise_like(before, 0.1, 3)
    assert torch.equal(column.detach(), before + noise)
    assert 0.06 < float(noise.std()) < 0.14


def test_the_column_goes_up_the_loss_of_what_is_to_be_forgotten(facts, tmp_path):
    """One step of SGD without noise is the gradient times the rate, upwards."""
    work = work_of(facts, tmp_path)
    matrix = value_matrix(work.model, 1)[1]
    (batch,) = work.forget.batches(len(work.forget.rows))
    loss = work.forget.losses(batch, "cross-entropy").mean()
    (gradient,) = torch.autograd.grad(loss, matrix.weight)
    expected = matrix.weight[:, 2].detach() + 0.1 * gradient[:, 2]
    settings = {"column": 2, "noise": 0, "optimiser": "sgd", "batch_size": len(work.forget.rows)}
    build("unlearn/needle", settings).unlearn(work)
    assert torch.allclose(matrix.weight[:, 2], expected, atol=1e-6)


def test_the_column_is_found_by_words_or_by_the_records(facts, tmp_path):
    work = work_of(facts, tmp_path)
    tokens = work.loaded.processor.convert_tokens_to_ids(["soup", "rice", "pasta"])
    head = work.model.get_output_embeddings().weight.detach()
    with torch.no_grad():
        weight_of(value_matrix(work.model, 1)[1])[:, 77] = 3 * head[tokens].sum(dim=0)
    found = build("unlearn/needle", {"words": "soup, rice and pasta"}).find(work)
    assert (found.layer, found.sign) == (1, 1)
    assert found.share == 1
    assert build("unlearn/needle", {}).find(work).share > 0
    assert build("unlearn/needle", {"column": 4, "layer": 0}).find(work) == ValueVector(0, 4)


def test_words_that_no_token_is_and_places_that_are_not_there_are_refused(facts, tmp_path):
    work = work_of(facts, tmp_path)
    assert word_tokens(work.loaded.processor, ["zzzz"]) == [{}]
    with pytest.raises(SettingError, match="none of 'zzzz' is a token"):
        build("unlearn/needle", {"words": "zzzz"}).unlearn(work)
    with pytest.raises(CheckpointError, match="from 0 to 1, or from -2 to -1"):
        build("unlearn/needle", {"layer": 7, "column": 1}).unlearn(work)
    with pytest.raises(CheckpointError, match="columns 0 to 127"):
        build("unlearn/needle", {"column": 128}).unlearn(work)
