"""WISE: the routing score, the margins, the merge, the router, and sessions that go on."""

from __future__ import annotations

import zoo  # first: sets the environment before transformers is imported

# isort: split
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn import functional

from germane.core.chat import pad_left
from germane.core.errors import CheckpointError, SettingError
from germane.core.generation import continue_texts
from germane.core.models import Loaded
from germane.edited import STOP, Edit, Editing, load_edited
from germane.method import build
from germane.tasks.edit._answers import answer_losses
from germane.tasks.edit.wise import (
    choose,
    draw_mask,
    is_done,
    linear,
    margin_loss,
    masked_step,
    routing_score,
    ties,
)

ORACLE = {
    name: torch.tensor(value) if isinstance(value, (list, float)) else value
    for name, value in json.loads(
        (Path(__file__).parents[1] / "fixtures" / "wise.json").read_text()
    ).items()
}
QUICK = {"layer": -1, "steps": 12, "contexts": 1, "save_every": 2, "merge_every": 4}
ASK = """
import json, sys
import torch
torch.set_num_threads(1)
from germane.edited import load_edited
editor, editing = load_edited(sys.argv[1])
print(json.dumps(editor.answer(editing, json.loads(sys.argv[2]), 4)))
"""


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def wise(editing, **changes):
    """The method, attached."""
    method = build("edit/wise", {**QUICK, **changes})
    method.attach(editing, {})
    return method


# The mathematics, by hand.


def test_the_score_is_the_mean_length_over_tokens_that_are_not_padding():
    moved = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 2.0], [30.0, 40.0]]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert routing_score(moved, mask, torch.zeros_like(moved)).tolist() == [3.0, 2.0]


def test_the_score_of_the_code_compares_outputs_after_the_activation():
    output, moved = torch.tensor([[[-1.0, 2.0]]]), torch.tensor([[[-5.0, 3.0]]])
    # relu: (0, 2) to (0, 5)
    assert routing_score(moved, torch.ones(1, 1), output, torch.relu).tolist() == [3.0]


def test_margins_are_averaged_over_the_rows_that_miss_them():
    # other 7 is 2 above alpha 5; rows 10 and 30: 10 below beta 20 in one of two; 10 - 7 is 7 short of gamma 10
    found = margin_loss(torch.tensor([10.0, 30.0]), torch.tensor(7.0), 5.0, 20.0, 10.0)
    assert float(found) == 2 + 10 + 7
    assert float(margin_loss(torch.tensor([25.0]), torch.tensor(4.0), 5.0, 20.0, 10.0)) == 0


def test_the_highest_score_above_its_own_threshold_answers():
    scores = torch.tensor([[9.0, 1.0, 5.0, 2.0], [8.0, 2.0, 6.0, 4.0]])
    assert choose(scores, [10.0, 3.0]).tolist() == [1, -1, 1, 1]
    assert choose(scores, [1.5, 3.0]).tolist() == [0, -1, 1, 1]


def test_ties_averages_what_agrees_with_the_heavier_sign():
    deltas = torch.tensor([[[4.0, 1.0, -3.0, 0.5]], [[2.0, -5.0, 0.1, 4.0]]])
    # kept: (4, 0, -3, 0) and (0, -5, 0, 4)
    assert ties(deltas, [0.5, 0.5], 0.5).tolist() == [[4.0, -5.0, -3.0, 4.0]]
    # kept: all; signs + (6 > 0), - (-4), - (-2.9), + ; means 3, -5, -3, 2.25
    close(ties(deltas, [0.5, 0.5], 1.0), torch.tensor([[3.0, -5.0, -3.0, 2.25]]))


def test_the_mask_has_its_share_of_ones_and_depends_on_seed_and_shard():
    mask = draw_mask(torch.zeros(200, 500), 0.2, 3, 0)
    assert abs(float(mask.mean()) - 0.2) < 0.005
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mask, draw_mask(torch.zeros(200, 500), 0.2, 3, 0))
    assert not torch.equal(mask, draw_mask(torch.zeros(200, 500), 0.2, 3, 1))
    assert not torch.equal(mask, draw_mask(torch.zeros(200, 500), 0.2, 4, 0))


def test_a_step_moves_what_is_in_the_mask_and_stays_within_the_bound():
    delta = torch.tensor([0.5, 0.5, 0.9, -0.9])
    masked_step(delta, torch.tensor([1.0, 1.0, -4.0, 4.0]), torch.tensor([1.0, 0.0, 1.0, 1.0]), 0.1, 1.0)
    close(delta, torch.tensor([0.4, 0.5, 1.0, -1.0]))


def test_training_stops_when_the_loss_is_small_and_still():
    assert not is_done([0.01])
    assert is_done([0.01, 0.01005])
    assert not is_done([0.01, 0.012])
    assert not is_done([0.03, 0.03])


# The official code, on fixed numbers.


@pytest.mark.parametrize(("name", "weights"), [("ties", [1 / 3] * 3), ("ties_uneven", [0.2, 0.2, 0.6])])
def test_ties_is_the_official_one(name, weights):
    deltas = ORACLE["members"] - ORACLE["base"]
    close(ORACLE["base"] + ties(deltas, weights, 0.53), ORACLE[name])


def test_ties_of_one_keeps_what_the_official_magnitude_keeps():
    close(ties(ORACLE["members"][:1] - ORACLE["base"], [1.0], 0.53), ORACLE["magnitude"])


def test_linear_of_two_is_the_official_one():
    members = ORACLE["members"][:2]
    close(ORACLE["base"] + linear(members - ORACLE["base"], [0.5, 0.5]), ORACLE["linear"])


def test_the_official_slerp_of_side_memories_is_linear():
    near = {name: torch.tensor(value) for name, value in ORACLE["near"].items()}
    found = near["base"] + linear(near["members"] - near["base"], [0.5, 0.5])
    close(found, near["slerp"])


def test_the_activated_score_is_the_official_one():
    output, moved = ORACLE["output"], ORACLE["moved_to"] - ORACLE["output"]
    close(routing_score(moved, torch.ones(2, 5), output, functional.silu), ORACLE["euc"])
    output, moved, mask = ORACLE["long"], ORACLE["long_moved_to"] - ORACLE["long"], torch.ones(1, 101)
    close(routing_score(moved, mask, output, functional.silu, asking=True), ORACLE["euc_long"])
    close(routing_score(moved, mask, output, functional.silu), ORACLE["euc_long_training"])


def test_the_margins_are_the_official_ones():
    output, moved = ORACLE["batch"], ORACLE["batch_moved_to"] - ORACLE["batch"]
    scores = routing_score(moved, torch.ones(4, 5), output, functional.silu)
    close(margin_loss(scores[:-1], scores[-1], *ORACLE["margins"].tolist()), ORACLE["activation_loss"])


# The method, on the tiny model.


@pytest.fixture
def written(editing, edits):
    """Two edits in the working side, whose shard is not full."""
    method = wise(editing, save_every=4, steps=40, layer=0)
    method.edit(editing, edits[:2])
    return SimpleNamespace(method=method, editing=editing, edits=edits[:2], memory=editing.memory)


def test_an_edit_moves_a_share_of_the_side_and_nothing_of_the_model(editing, edits):
    before = {name: tensor.clone() for name, tensor in editing.model.state_dict().items()}
    wise(editing, mask_share=0.3).edit(editing, edits[:1])
    memory = editing.memory
    moved = (memory.working.delta != 0).float().mean()
    mask = draw_mask(memory.working.delta, 0.3, 0, 0)
    assert 0.2 < float(moved) < 0.31
    assert not memory.working.delta[mask == 0].any()
    assert float(memory.working.delta.abs().max()) <= 1.0
    assert zoo.same_bytes(before, editing.model.state_dict())


def test_epsilon_is_the_least_score_of_the_edits(editing, edits, monkeypatch):
    found = []
    method = wise(editing, save_every=4)
    finish = editing.memory.finish_edit
    monkeypatch.setattr(editing.memory, "finish_edit", lambda value: (found.append(value), finish(value)))
    method.edit(editing, edits[:3])
    assert len(set(found)) == 3
    assert editing.memory.working.epsilon == min(found)


def test_shards_are_put_aside_and_merged(editing, edits):
    method = wise(editing)
    method.edit(editing, edits[:3])
    memory = editing.memory
    assert (len(memory.shards), len(memory.merged), memory.count) == (1, 0, 3)
    method.edit(editing, edits[3:])
    assert (len(memory.shards), len(memory.merged)) == (0, 1)
    assert not memory.working.delta.any()


@pytest.mark.parametrize(("retrieve", "count"), [(True, 2), (False, 1)])
def test_retrieve_keeps_a_side_for_each_merge_and_merge_keeps_one(editing, edits, retrieve, count):
    wise(editing, retrieve=retrieve, save_every=1, merge_every=2).edit(editing, edits)
    memory = editing.memory
    assert len(memory.merged) == count
    epsilons = [side.epsilon for side in memory.merged]
    expected = epsilons if retrieve else [min(epsilons)]
    assert memory.thresholds()[:-1] == pytest.approx([0.88 * epsilon for epsilon in expected])


def test_padding_does_not_change_the_decision(written):
    editing, memory = written.editing, written.memory
    rows = [editing.tokenizer(edit.prompt)["input_ids"] for edit in written.edits] + [[5, 6, 7]]
    alone = []
    for row in rows:
        editing.model(input_ids=torch.tensor([row]))
        alone += memory._held.tolist()
    tokens, mask = pad_left(rows, 0)
    editing.model(input_ids=tokens, attention_mask=mask)
    assert memory._held.tolist() == alone
    wide = torch.zeros(3, 40, dtype=torch.long)
    wide[:, : tokens.shape[1]] = tokens
    editing.model(input_ids=wide, attention_mask=(wide != 0).long())
    assert memory._held.tolist() == alone
    assert 0 in alone


def test_padding_does_not_change_what_a_side_answers(written):
    editing, edit = written.editing, written.edits[0]
    tokens = torch.tensor([editing.tokenizer(edit.prompt)["input_ids"]])
    padded = functional.pad(tokens, (0, 30))
    mask = functional.pad(torch.ones_like(tokens), (0, 30))
    alone = editing.model(input_ids=tokens).logits
    close(editing.model(input_ids=padded, attention_mask=mask).logits[:, : tokens.shape[1]], alone)
    assert written.memory._held.tolist() == [0]


def test_the_decision_on_the_prompt_is_held_while_it_is_continued(written, monkeypatch):
    editing, memory = written.editing, written.memory
    decisions = []
    monkeypatch.setattr(
        "germane.tasks.edit.wise.choose",
        lambda scores, thresholds: decisions.append(0) or torch.zeros(scores.shape[1], dtype=torch.long),
    )
    continue_texts(editing.model, editing.tokenizer, [written.edits[0].prompt], 4)
    assert len(decisions) == 1
    assert memory._held.tolist() == [0]


def test_answers_written_with_a_cache_are_those_of_a_side_that_is_always_on(written):
    editing, memory = written.editing, written.memory
    prompt = written.edits[0].prompt
    routed = continue_texts(editing.model, editing.tokenizer, [prompt], 5)
    memory.training = True  # answers whatever the score
    assert continue_texts(editing.model, editing.tokenizer, [prompt], 5) == routed


def test_edits_take_and_what_scores_low_is_the_untouched_model(written, facts):
    editing = written.editing
    pairs = [(edit.prompt, edit.answer) for edit in written.edits]
    losses = answer_losses(editing.model, editing.tokenizer, pairs)
    text = torch.tensor([editing.tokenizer("not yes about")["input_ids"]])
    written.method.attach(fresh := Editing(again(facts), editing.chat), {})
    assert (losses < answer_losses(fresh.model, fresh.tokenizer, pairs) - 2).all()
    written.memory.working.epsilon = 1e6
    assert torch.equal(editing.model(input_ids=text).logits, fresh.model(input_ids=text).logits)


def again(facts):
    from germane.core.models import load_model

    return load_model(str(facts.model))


@pytest.mark.parametrize(
    "changes", [{}, {"retrieve": False}, {"replay": True, "merge_every": 2}, {"calibrate": True}]
)
def test_a_session_that_goes_on_equals_one_long_session(facts, editing, edits, changes):
    general = editing.general
    once = Editing(again(facts), editing.chat, general=general)
    settings = {"save_every": 2, "merge_every": 2, "steps": 6, **changes}
    method = wise(once, **settings)
    method.edit(once, edits)
    for first in (1, 2):
        method.attach(begun := Editing(again(facts), editing.chat, general=general), {})
        method.edit(begun, edits[:first])
        state = {name: tensor.clone() for name, tensor in method.state(begun).items()}
        later = Editing(again(facts), editing.chat, edits[:first], general, seed=99)
        method.attach(later, state)
        method.edit(later, edits[first:])
        for name, tensor in method.state(once).items():
            close(method.state(later)[name], tensor)


def test_layers_below_are_run_once_for_an_edit_and_give_the_same(editing, edits, facts):
    method = wise(editing, steps=3, contexts=0, layer=1)
    calls = []
    lower = editing.model.model.layers[0].mlp
    lower.register_forward_hook(lambda *_: calls.append(1))
    method.edit(editing, edits[:1])
    assert len(calls) == 1
    assert "forward" not in vars(editing.model.model.layers[0])


def test_replay_keeps_earlier_edits_from_opening_the_working_side(facts, editing, edits):
    def opened(replay):
        fresh = Editing(again(facts), editing.chat, general=editing.general)
        method = wise(fresh, save_every=2, merge_every=2, steps=30, replay=replay, alpha=0.5)
        method.edit(fresh, edits[:3])
        memory = fresh.memory
        memory.training = True
        fresh.model(input_ids=torch.tensor([fresh.tokenizer(edits[0].prompt)["input_ids"]]))
        return float(memory.scores.detach())

    assert opened(True) < opened(False)


def test_calibrated_thresholds_keep_held_out_texts_out(editing, edits):
    method = wise(editing, act_ratio=0.01, calibrate=True, steps=30)
    method.edit(editing, edits)
    memory = editing.memory

    def answered():
        found = []
        for text in editing.general[1::2]:
            editing.model(input_ids=torch.tensor([editing.tokenizer(text)["input_ids"]]))
            found += (memory._held >= 0).tolist()
        return sum(found) / len(found)

    assert answered() <= 0.2
    for side in memory.sides:
        side.floor = 0.0
    assert answered() > 0.5


def test_a_new_process_answers_the_same_and_the_weights_are_the_untouched_ones(edit_with, edits, facts):
    made = edit_with("wise", {**QUICK, "steps": 40, "layer": 0, "save_every": 1, "merge_every": 2})
    prompts = [edit.prompt for edit in edits] + [edits[0].locality[0][0]]
    editor, editing = load_edited(str(made.folder))
    here = editor.answer(editing, prompts, 4)
    command = [sys.executable, "-c", ASK, str(made.folder), json.dumps(prompts)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(there) == here
    untouched = zoo.weights(facts.model)
    kept = {name: tensor for name, tensor in zoo.weights(made.folder).items() if name in untouched}
    assert zoo.same_bytes(untouched, kept)
    assert here[:4] != continue_texts(again(facts).model, editing.tokenizer, prompts[:4], 4, STOP)


def test_models_with_transposed_matrices_are_edited():
    model = zoo.make(transformers.GPT2LMHeadModel, zoo.gpt2_config())
    editing = Editing(Loaded(model, zoo.tokenizer(), Path()), None)
    edit = Edit(id="1", prompt="w1 w2 w3", answer=" w9", irrelevant="w30 w31 w32")
    method = wise(editing, layer=0, learning_rate=0.3, contexts=0, steps=60)
    pairs = [(edit.prompt, edit.answer)]
    before = float(answer_losses(model, editing.tokenizer, pairs).detach())
    method.edit(editing, [edit])
    assert editing.memory.working.delta.shape == (16, 64)
    assert float(answer_losses(model, editing.tokenizer, pairs).detach()) < before - 0.5


def test_a_model_in_half_precision_has_its_side_memory_in_full(facts, edits, editing):
    loaded = again(facts)
    loaded.model.to(torch.bfloat16)
    half = Editing(loaded, editing.chat, general=editing.general)
    method = wise(half)
    method.edit(half, edits[:1])
    assert half.memory.working.delta.dtype == torch.float32
    assert half.memory.working.delta.any()
    assert half.model.dtype == torch.bfloat16


# Bad input.


def test_edits_without_an_irrelevant_text_need_general_ones(editing, edits):
    editing.general = []
    with pytest.raises(SettingError, match="edit 1 has no field irrelevant.*--general"):
        wise(editing).edit(editing, edits)


def test_calibration_needs_general_texts(editing, edits):
    editing.general = editing.general[:1]
    with pytest.raises(SettingError, match="at least 2 with --general"):
        wise(editing, calibrate=True).edit(editing, edits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"save_every": 3, "merge_every": 4}, "multiple of save_every"),
        ({"replay": True, "retrieve": False}, "replay is for retrieve"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        build("edit/wise", settings)


def test_a_memory_of_a_layer_of_another_shape_is_refused(editing, edits):
    method = wise(editing)
    method.edit(editing, edits[:1])
    state = method.state(editing) | {"side.0": torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match="does not fit layer -1"):
        method.attach(editing, state)
