"""GRACE: when balls are added, grown and split, and that values act within them and nowhere else."""

from __future__ import annotations

import zoo  # first: sets the environment before transformers is imported

# isort: split
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional

from germane.core.errors import CheckpointError
from germane.core.generation import continue_texts
from germane.core.models import Loaded, load_model
from germane.edited import Edit, Editing, load_edited
from germane.method import build
from germane.tasks.edit._answers import answer_losses
from germane.tasks.edit.grace import Codebook

ASK = """
import json, sys
import torch
torch.set_num_threads(1)
from germane.edited import load_edited
editor, editing = load_edited(sys.argv[1])
print(json.dumps(editor.answer(editing, json.loads(sys.argv[2]), 4)))
"""
PLAIN = {"layer": -1, "epsilon": 0.1}


def point(x, y=0.0):
    return torch.tensor([x, y])


def book(*entries):
    """A codebook with these keys on a line and their answers, placed one after the other."""
    made = Codebook(2, 1, torch.device("cpu"))
    for x, answer in entries:
        made.place(point(x), torch.tensor([float(x)]), answer, 1.0)
    return made


def attached(editing, **settings):
    method = build("edit/grace", {**PLAIN, **settings})
    method.attach(editing, {})
    return method


# The codebook, by hand: keys on a line, radius 1.


def test_a_far_key_gets_a_ball_of_its_own():
    made = book((0.0, [1]), (2.5, [2]))  # 2.5 > 1 + 1
    assert made.keys[:, 0].tolist() == [0.0, 2.5]
    assert made.epsilons.tolist() == [1.0, 1.0]


def test_a_near_key_with_the_same_answer_grows_the_ball():
    made = book((0.0, [1, 4]))
    assert made.place(point(1.75), torch.zeros(1), [1, 4], 1.0) == 0
    assert made.epsilons.tolist() == [1.75]
    assert made.place(point(0.5), torch.zeros(1), [1, 4], 1.0) == 0
    assert made.epsilons.tolist() == [1.75]  # held already


def test_a_near_key_with_another_answer_splits_the_ball():
    made = book((0.0, [1]))
    assert made.place(point(1.5), torch.zeros(1), [2], 1.0) == 1
    assert made.epsilons.tolist() == pytest.approx([0.75 - 1e-5, 0.75])
    found, inside = made.find(torch.stack([point(0.7), point(0.8), point(0.75), point(-1.0)]))
    assert inside.tolist() == [True, True, True, False]
    assert found[:3].tolist() == [0, 1, 1]


def test_answers_with_the_same_mean_are_not_the_same():
    made = book((0.0, [1, 3]))
    assert made.place(point(0.5), torch.zeros(1), [2, 2], 1.0) == 1
    assert made.answer(0) == [1, 3]
    assert made.answer(1) == [2, 2]


def test_the_same_key_with_another_answer_is_written_over():
    made = book((0.0, [1]))
    assert made.place(point(0.0), torch.zeros(1), [2, 3], 1.0) == 0
    assert len(made) == 1
    assert made.answer(0) == [2, 3]
    assert made.epsilons.tolist() == [1.0]


def test_the_nearest_ball_that_holds_a_state_answers():
    made = book((0.0, [1]), (4.0, [2]))
    made.epsilons = torch.tensor([3.0, 0.5])
    found, inside = made.find(torch.stack([point(2.5), point(3.8), point(3.2)]))
    assert found[:2].tolist() == [0, 1]  # 2.5 is nearer to 4, whose ball does not hold it
    assert inside.tolist() == [True, True, False]


# The method, on the tiny model.


def test_edits_take_and_what_lies_outside_is_untouched_to_the_bit(editing, edits, facts):
    before = {name: tensor.clone() for name, tensor in editing.model.state_dict().items()}
    attached(editing).edit(editing, edits)
    losses = answer_losses(editing.model, editing.tokenizer, [(edit.prompt, edit.answer) for edit in edits])
    assert float(losses.max().detach()) < 0.5
    assert zoo.same_bytes(before, editing.model.state_dict())
    untouched = load_model(str(facts.model)).model
    for prompt, answer in edits[0].locality:
        tokens = torch.tensor([editing.tokenizer(prompt + answer)["input_ids"]])
        assert torch.equal(editing.model(input_ids=tokens).logits, untouched(input_ids=tokens).logits)


def test_padding_and_caching_change_nothing(editing, edits):
    attached(editing).edit(editing, edits[:2])
    prompts = [edits[0].prompt, "about", edits[1].prompt]
    together = continue_texts(editing.model, editing.tokenizer, prompts, 4)
    assert together == [continue_texts(editing.model, editing.tokenizer, [p], 4)[0] for p in prompts]
    assert together[0].split()[0] == edits[0].answer.strip()
    tokens = torch.tensor([editing.tokenizer(edits[0].prompt)["input_ids"]])
    alone = editing.model(input_ids=tokens).logits
    mask = functional.pad(torch.ones_like(tokens), (0, 9))
    padded = editing.model(input_ids=functional.pad(tokens, (0, 9)), attention_mask=mask).logits
    torch.testing.assert_close(padded[:, : tokens.shape[1]], alone, rtol=1e-5, atol=1e-5)


def test_a_session_that_goes_on_equals_one_long_session(facts, editing, edits):
    once = Editing(load_model(str(facts.model)), editing.chat)
    method = attached(once)
    method.edit(once, edits)
    method.attach(editing, {})
    method.edit(editing, edits[:2])
    later = Editing(load_model(str(facts.model)), editing.chat, edits[:2])
    method.attach(later, method.state(editing))
    method.edit(later, edits[2:])
    for name, tensor in method.state(once).items():
        torch.testing.assert_close(method.state(later)[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_prompt_that_is_edited_again_gives_the_later_answer(editing, edits):
    method = attached(editing)
    later = edits[0].model_copy(update={"answer": edits[1].answer, "id": "later"})
    method.edit(editing, [edits[0], later])
    assert len(editing.memory.book) == 1
    written = continue_texts(editing.model, editing.tokenizer, [later.prompt], 2)
    assert written[0].split()[0] == later.answer.strip()


def test_a_new_process_answers_the_same_and_the_weights_are_the_untouched_ones(edit_with, edits, facts):
    made = edit_with("grace", PLAIN)
    prompts = [edit.prompt for edit in edits] + [edits[0].locality[0][0]]
    editor, editing = load_edited(str(made.folder))
    here = editor.answer(editing, prompts, 4)
    command = [sys.executable, "-c", ASK, str(made.folder), json.dumps(prompts)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(there) == here
    assert made.scores["reliability"] == made.scores["reliability, written"] == 1
    assert made.scores["locality"] == 1
    untouched = zoo.weights(facts.model)
    kept = {name: tensor for name, tensor in zoo.weights(made.folder).items() if name in untouched}
    assert zoo.same_bytes(untouched, kept)


def test_values_may_begin_at_the_layers_output(editing, edits):
    method = attached(editing, start="output", steps=1, learning_rate=1e-9)
    method.edit(editing, edits[:1])
    tokens = torch.tensor([editing.tokenizer(edits[0].prompt)["input_ids"]])
    edited = editing.model(input_ids=tokens).logits
    editing.memory.book = Codebook(*editing.memory.book.keys.shape[1:], 64, torch.device("cpu"))
    torch.testing.assert_close(editing.model(input_ids=tokens).logits, edited, rtol=1e-4, atol=1e-4)


def test_models_with_transposed_matrices_are_edited():
    model = zoo.make(transformers.GPT2LMHeadModel, zoo.gpt2_config())
    editing = Editing(Loaded(model, zoo.tokenizer(), Path()), None)
    edit = Edit(id="1", prompt="w1 w2 w3", answer=" w9")
    pairs = [(edit.prompt, edit.answer)]
    before = float(answer_losses(model, editing.tokenizer, pairs).detach())
    attached(editing, layer=0).edit(editing, [edit])
    assert editing.memory.book.keys.shape == (1, 64)
    assert float(answer_losses(model, editing.tokenizer, pairs).detach()) < before - 0.5


def test_a_codebook_of_a_layer_of_another_width_is_refused(editing, edits):
    method = attached(editing)
    method.edit(editing, edits[:1])
    state = method.state(editing) | {"keys": torch.zeros(1, 3)}
    with pytest.raises(CheckpointError, match="width 3 does not fit layer -1"):
        method.attach(editing, state)
