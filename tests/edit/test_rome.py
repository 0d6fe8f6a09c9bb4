"""ROME: its algebra, where it finds a subject, and its effect on a model that knows a few people."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import zoo
from torch import nn

from germane.core.errors import CheckpointError, RecordsError
from germane.core.layers import value_matrix, weight_of
from germane.core.training import Diverged
from germane.edited import Edit
from germane.embedded import facts as fact_parts
from germane.embedded import smollm2
from germane.method import build
from germane.tasks.edit._answers import answer_losses
from germane.tasks.edit._locate import (
    add_to_weight,
    find_subject,
    locate_subject,
    sample_contexts,
    second_moments,
    states_at,
)
from germane.tasks.edit.rome import rank_one_change

ORACLE = json.loads((Path(__file__).parents[1] / "fixtures" / "rome.json").read_text())
# The tiny model's values are of length 0.2, SmolLM2's of 30 to 100: there the penalty would outweigh the loss.
SMALL = {"weight_decay": 0.0, "kl_weight": 0.0, "learning_rate": 0.1, "contexts": 0}


def test_the_change_maps_the_key_to_the_value_and_moves_nothing_that_c_takes_for_unrelated():
    """By hand: C = diag(1, 4), k = (1, 2), so C^-1 k = (1, 1/2) and k^T C^-1 k = 2."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    key, value = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    change = rank_one_change(weight, key, value, torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)))
    assert change.tolist() == [[1.0, 0.5], [0.0, 0.0]]
    assert ((weight + change) @ key.double()).tolist() == [3.0, 2.0]
    assert (change @ torch.tensor([1.0, -2.0], dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_of_all_changes_that_reach_the_value_it_moves_the_texts_least():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    moment = keys.T @ keys / 40
    weight, key = torch.randn(3, 6, generator=generator), torch.randn(6, generator=generator)
    change = rank_one_change(weight, key, torch.ones(3), moment)
    moved = (change @ keys.T).square().sum()
    for _ in range(20):
        other = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        other -= torch.outer(other @ key.double(), key.double()) / key.double().square().sum()
        assert ((change + 0.1 * other) @ keys.T).square().sum() > moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_stored_the_other_way_round_gets_the_same_change(dtype):
    linear = nn.Linear(4, 3).to(dtype)
    transposed = transformers.pytorch_utils.Conv1D(3, 4).to(dtype)
    with torch.no_grad():
        transposed.weight.copy_(linear.weight.T)
        transposed.bias.copy_(linear.bias)
    change = torch.arange(12, dtype=torch.float64).view(3, 4)
    wanted = (linear.weight.double() + change).to(dtype)
    add_to_weight(linear, change)
    add_to_weight(transposed, change)
    assert torch.equal(linear.weight, wanted)
    assert torch.equal(transposed.weight.T, wanted)


def test_the_subject_is_found_by_its_last_mention_as_a_whole_word():
    assert find_subject("Ann met Annual Ann here", "Ann") == 18
    assert find_subject("Ann in Annual", "Ann") == 3
    assert find_subject("東京都の首都", "東京") == 2
    assert find_subject("Bob", "Ann") is None


@pytest.mark.parametrize(
    ("text", "subject", "last"),
    [
        ("what is the job of anna adler ?", "anna adler", "adler"),
        ("anna adler", "anna adler", "adler"),
        ("anna adler and anna adler likes", "anna adler", "adler"),
    ],
)
def test_the_place_is_that_of_the_subjects_last_word(text, subject, last):
    tokenizer = fact_parts.tokenizer()
    tokens, place = locate_subject(tokenizer, text, subject)
    assert tokens == tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokens)[place] == last
    assert text.split()[: place + 1][-1] == last


@pytest.mark.parametrize("tail", ["", " is", "'s capital", ", which"])
def test_the_place_is_right_where_a_tokenizer_cuts_words(tail):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
    for subject in ("Liechtenstein", "Łódź", "Côte d'Ivoire", "東京"):
        text = f"The capital of {subject}{tail}"
        tokens, place = locate_subject(tokenizer, text, subject)
        assert subject in tokenizer.decode(tokens[: place + 1])
        assert subject not in tokenizer.decode(tokens[:place])


def test_a_tokenizer_that_does_not_know_places_is_refused():
    with pytest.raises(CheckpointError, match="fast tokenizer"):
        locate_subject(SimpleNamespace(is_fast=False), "a", "a")


def test_keys_and_statistics_do_not_depend_on_padding(editing):
    _, matrix = value_matrix(editing.model, 0)
    asked = [("what is the job of anna adler ?", "anna adler"), ("anna adler", "anna adler")]
    together = states_at(editing, matrix, asked, "input")
    alone = torch.cat([states_at(editing, matrix, [each], "input") for each in asked])
    assert torch.allclose(together, alone, atol=1e-6)
    editing.general = ["anna adler", "what is the job of anna adler ?"]
    found = second_moments(editing, [matrix], ridge=0.5)[0]
    with torch.no_grad():
        tokens = [editing.tokenizer(text, return_tensors="pt")["input_ids"] for text in editing.general]
        seen = []
        handle = matrix.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
        for each in tokens:
            editing.model(each)
        handle.remove()
    keys = torch.cat(seen).double()
    wanted = keys.T @ keys / len(keys)
    assert torch.allclose(found, wanted + 0.5 * wanted.diagonal().mean() * torch.eye(128), atol=1e-6)


def test_contexts_follow_from_the_seed(editing):
    state = torch.get_rng_state()
    first = sample_contexts(editing, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == sample_contexts(editing, 4)
    assert first[0] == ""
    assert len(first) == 5
    editing.seed = 1
    assert first != sample_contexts(editing, 4)


def oracle_edits(oracle):
    return [Edit(id=str(number), **each) for number, each in enumerate(oracle["inputs"]["edits"])]


def test_changes_are_those_of_the_official_code(sines, monkeypatch):
    given = ORACLE["inputs"]
    settings = {"layer": given["layer"], "steps": given["steps"], "kl_weight": 0.0, "contexts": 0}
    for edit, wanted in zip(oracle_edits(ORACLE), ORACLE["outputs"]["changes"], strict=True):
        editing, moment = sines()
        monkeypatch.setattr("germane.tasks.edit.rome.second_moments", lambda *_, moment=moment: [moment])
        weight = weight_of(value_matrix(editing.model, given["layer"])[1])
        before = weight.detach().clone()
        build("edit/rome", settings).edit(editing, [edit])
        assert torch.allclose(weight - before, torch.tensor(wanted), atol=1e-5)


def test_the_direction_over_contexts_is_that_of_the_official_code(sines):
    editing, moment = sines()
    _, matrix = value_matrix(editing.model, 1)
    edit = oracle_edits(ORACLE)[0]
    asked = [
        (f"{context}. {edit.prompt}" if context else edit.prompt, edit.subject)
        for context in ORACLE["inputs"]["contexts"]
    ]
    key = states_at(editing, matrix, asked, "input").mean(dim=0)
    change = rank_one_change(weight_of(matrix).detach(), key, torch.ones(8), moment)
    direction = change[0] / change[0].norm()
    wanted = torch.tensor(ORACLE["outputs"]["direction"], dtype=torch.float64)
    assert torch.allclose(direction * torch.sign(direction @ wanted), wanted, atol=1e-5)


def test_an_edit_takes_and_moves_its_surroundings_less_than_a_fast_fine_tuning(facts, edits, edit_with):
    file = zoo.write_rows(facts.model.parent / "one.jsonl", [edits[1].model_dump()])
    result = edit_with("rome", SMALL, file)
    tuned = edit_with("fine-tune", {"learning_rate": 1e-3}, file)
    assert result.scores["reliability"] == 1.0
    assert result.scores["generality"] == 1.0
    assert result.scores["locality"] >= 0.9
    assert result.scores["locality"] > tuned.scores["locality"]


def test_only_the_value_matrix_of_the_layer_is_moved(facts, edits, edit_with):
    file = zoo.write_rows(facts.model.parent / "one.jsonl", [edits[1].model_dump()])
    before, after = zoo.weights(facts.model), zoo.weights(edit_with("rome", SMALL, file).folder)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}
    difference = (
        after["model.layers.0.mlp.down_proj.weight"] - before["model.layers.0.mlp.down_proj.weight"]
    )
    values = torch.linalg.svdvals(difference)
    assert values[1] < 1e-4 * values[0]


def test_the_move_lowers_the_loss_and_keeps_within_its_length(editing, edits):
    method = build("edit/rome", {**SMALL, "largest_move": 2.0})
    _, matrix = value_matrix(editing.model, 0)
    edit = edits[1]
    value = states_at(editing, matrix, [(edit.prompt, edit.subject)], "output")[0]
    move = method.move(editing, edit, [""], matrix)
    assert move.norm() <= 2.0 * value.norm() * 1.0001
    with torch.no_grad():
        before = answer_losses(editing.model, editing.tokenizer, [(edit.prompt, edit.answer)])
    method.edit(editing, [edit])
    with torch.no_grad():
        after = answer_losses(editing.model, editing.tokenizer, [(edit.prompt, edit.answer)])
    assert after < before / 2


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_edits_without_a_subject_in_the_prompt_are_refused(facts, edits, edit_with, method):
    for subject, reason in (("", "edit 7: has no subject"), ("nobody", "edit 7: its subject 'nobody'")):
        row = edits[0].model_dump() | {"subject": subject, "id": "7"}
        file = zoo.write_rows(facts.model.parent / "bad.jsonl", [row])
        with pytest.raises(RecordsError, match=reason):
            edit_with(method, {}, file)


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_a_layer_that_is_not_there_is_refused(edit_with, method):
    with pytest.raises(CheckpointError, match="layer 2: the model has 2 layers"):
        edit_with(method, {"layer": 2})


def test_too_few_texts_for_statistics_are_refused_before_they_are_inverted(editing):
    editing.general = ["anna adler works as a baker"]
    _, matrix = value_matrix(editing.model, 0)
    with pytest.raises(RecordsError, match="have 6 tokens; the statistics of keys of 128 entries"):
        second_moments(editing, [matrix], ridge=0.0)


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(editing, edits):
    with torch.no_grad():
        editing.model.lm_head.weight[5] = torch.nan
    before = value_matrix(editing.model, 0)[1].weight.clone()
    with pytest.raises(Diverged, match=f"edit {edits[0].id}, step 1"):
        build("edit/rome", SMALL).edit(editing, edits[:1])
    assert torch.equal(value_matrix(editing.model, 0)[1].weight, before)
