"""Backpacks: senses contribute log-linearly, nothing looks ahead, and a saved model is the same again."""

from __future__ import annotations

import zoo  # first: sets the environment before transformers is imported

# isort: split
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from germane.core.backpack import BackpackConfig, BackpackForCausalLM, SenseChanges, SenseWeights
from germane.core.models import is_language_model, load_model

ORACLE = json.loads((Path(__file__).parents[1] / "fixtures" / "canonical_examples.json").read_text())


def config(**changes: object) -> BackpackConfig:
    return BackpackConfig(
        **{
            "vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "num_senses": 4,
            "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> BackpackForCausalLM:
    return zoo.make(BackpackForCausalLM, config())


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(4, 64, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_are_the_weighted_senses_seen_through_the_embeddings(model, tokens):
    senses, weights = model.backpack.senses(tokens), model.backpack.weights(tokens)
    table = model.backpack.gpt2_model.wte.weight
    for text, place in ((0, 0), (1, 4)):
        hidden = torch.zeros(16)
        for sense in range(4):
            for seen in range(place + 1):
                hidden += weights[text, sense, place, seen] * senses[text, sense, seen]
        assert torch.allclose(model(tokens).logits[text, place], table @ hidden, atol=1e-5)


@torch.no_grad()
def test_the_weights_are_softmaxes_of_scaled_inner_products():
    part = SenseWeights(config(n_embd=2, n_head=1, num_senses=1))
    part.c_attn.weight.copy_(torch.eye(2).repeat(2, 1))
    part.c_attn.bias.zero_()
    found = part(torch.tensor([[[1.0, 0.0], [2.0, 1.0]]]), None)[0, 0]
    ratio = math.exp((5 - 2) / math.sqrt(2))  # <q2, k2> = 5, <q2, k1> = 2
    assert found[0].tolist() == [1, 0]
    assert found[1].tolist() == pytest.approx([1 / (1 + ratio), ratio / (1 + ratio)])


@torch.no_grad()
def test_a_words_senses_do_not_depend_on_its_text(model, tokens):
    other = tokens.flip(1)
    assert torch.allclose(
        model.backpack.senses(tokens)[:, :, 2], model.backpack.senses(other)[:, :, 4], atol=1e-6
    )


@torch.no_grad()
def test_no_position_sees_a_later_word(model, tokens):
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 60 + 4
    before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(model, tokens, left):
    fill, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(tokens)
    parts = ([fill, tokens], [fill, ones]) if left else ([tokens, fill], [ones, fill])
    padded = model(torch.cat(parts[0], 1), attention_mask=torch.cat(parts[1], 1)).logits
    padded = padded[:, 3:] if left else padded[:, :7]
    assert torch.allclose(padded, model(tokens).logits, atol=1e-5)


@torch.no_grad()
def test_the_loss_is_that_of_the_next_words(model, tokens):
    labels = tokens.clone()
    labels[:, :3] = -100
    logs = model(tokens).logits.log_softmax(-1)
    wanted = -torch.stack([logs[n, i, tokens[n, i + 1]] for n in range(2) for i in range(2, 6)]).mean()
    assert float(model(tokens, labels=labels).loss) == pytest.approx(float(wanted), abs=1e-5)


def test_generating_takes_the_likeliest_word_each_time(model, tokens):
    text = tokens[:1]
    for _ in range(5):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    mask = torch.ones_like(tokens[:1])
    written = model.generate(
        tokens[:1],
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert written.tolist() == text.tolist()


@torch.no_grad()
def test_changes_of_senses_are_as_the_official_model_makes_them():
    known = ORACLE["backpack"]
    senses, weights = torch.tensor(known["senses"]), torch.tensor(known["weights"])
    width = senses.shape[-1]
    small = config(n_embd=width, n_head=1, num_senses=senses.shape[1], changed_senses=len(known["changed"]))
    changes = SenseChanges(small)
    changes.places = torch.tensor([token * senses.shape[1] + sense for token, sense in known["changed"]])
    changes.vectors.copy_(torch.tensor(known["vectors"]))
    hidden = (weights @ (senses + changes(torch.tensor(known["tokens"])))).sum(dim=1)
    assert torch.allclose(hidden, torch.tensor(known["hidden"]), atol=1e-5)
    assert [list(place) for place in changes.listed()] == known["changed"]


@torch.no_grad()
def test_a_changed_sense_moves_the_logits_by_its_weight_and_no_other_word(tokens):
    model = zoo.make(BackpackForCausalLM, config())
    before, word = model(tokens).logits, int(tokens[0, 2])
    changes = model.change_senses([(word, 1)])
    assert torch.equal(model(tokens).logits, before)
    changes.vectors[0] = torch.arange(16.0)
    weight = model.backpack.weights(tokens)[0, 1, :, tokens[0] == word].sum(dim=-1)
    added = weight[:, None] * (model.lm_head.weight @ torch.arange(16.0))
    assert torch.allclose(model(tokens).logits[0] - before[0], added, atol=1e-4)
    model.change_senses([(5, 0)])
    assert model.backpack.sense_changes.listed() == sorted([(5, 0), (word, 1)])
    assert torch.allclose(model(tokens).logits[0] - before[0], added, atol=1e-4)
    model.forget_changes()
    assert torch.equal(model(tokens).logits, before)


def test_a_saved_model_is_plain_and_the_same_again(tokens, tmp_path):
    model = zoo.make(BackpackForCausalLM, config())
    model.change_senses([(9, 3), (4, 0)]).vectors.data.normal_()
    zoo.save(model, tmp_path / "saved")
    names = zoo.weights(tmp_path / "saved").keys()
    assert "lm_head.weight" not in names
    assert {"backpack.gpt2_model.wte.weight", "backpack.sense_weight_net.c_attn.weight",
            "backpack.sense_network.final_mlp.c_proj.weight", "backpack.sense_changes.vectors"} <= names  # fmt: skip
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved")).model
    assert is_language_model(loaded)
    for found in (again, loaded):
        assert isinstance(found, BackpackForCausalLM)
        assert found.lm_head.weight is found.backpack.gpt2_model.wte.weight
        assert torch.equal(found(tokens).logits, model(tokens).logits)
