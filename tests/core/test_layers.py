"""Decoder layers and their parts, in four architectures that name and store them differently."""

from __future__ import annotations

import pytest
import torch
import transformers
import zoo
from torch import nn

from germane.core.errors import CheckpointError
from germane.core.layers import attention_output, decoder_layers, layer_at, value_matrix, weight_of

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}
MODELS = {
    "llama": (
        lambda: transformers.LlamaForCausalLM(zoo.llama_config(num_hidden_layers=3)),
        "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj",
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_inner=32)
        ),
        "transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn.c_proj",
    ),
    "opt": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**SIZE, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32)
        ),
        "model.decoder.layers.{}.fc2", "model.decoder.layers.{}.self_attn.out_proj",
    ),
    "gpt-neox": (
        lambda: transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(**SIZE, intermediate_size=32, max_position_embeddings=32)
        ),
        "gpt_neox.layers.{}.mlp.dense_4h_to_h", "gpt_neox.layers.{}.attention.dense",
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


@each
def test_the_parts_are_found(name):
    model = make(name)
    _, value, attention = MODELS[name]
    assert [place for place, _ in decoder_layers(model)] == [
        value.format(n).split(f".{n}.")[0] + f".{n}" for n in range(3)
    ]
    assert value_matrix(model, 1) == (value.format(1), model.get_submodule(value.format(1)))
    assert value_matrix(model, -1)[0] == value.format(2)
    assert attention_output(layer_at(model, 2)[1]) is model.get_submodule(attention.format(2))


@each
def test_a_value_vector_is_a_column_whichever_way_the_weight_is_stored(name):
    """What the matrix adds for one active neuron is that neuron's column."""
    matrix = value_matrix(make(name), 0)[1]
    weight = weight_of(matrix)
    assert weight.shape == (16, 32)
    active = torch.zeros(1, 32)
    with torch.no_grad():
        silent = matrix(active)
        active[0, 5] = 1.0
        assert torch.allclose((matrix(active) - silent)[0], weight[:, 5], atol=1e-6)


@each
def test_the_weight_is_a_view(name):
    matrix = value_matrix(make(name), 0)[1]
    with torch.no_grad():
        weight_of(matrix)[:, 3] = 7.0
    assert int((matrix.weight == 7.0).sum()) == 16


def test_a_layer_that_is_not_there_is_refused_with_the_range():
    for layer in (3, -4):
        with pytest.raises(CheckpointError, match="has 3 layers, from 0 to 2, or from -3 to -1"):
            value_matrix(make("llama"), layer)


def test_a_model_without_layers_is_refused():
    with pytest.raises(CheckpointError, match="has no list of layers"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def test_several_feed_forward_parts_are_refused():
    model = make("llama")
    layer = model.model.layers[1]
    layer.mlp = nn.ModuleList([layer.mlp, make("llama").model.layers[0].mlp])
    with pytest.raises(CheckpointError, match="has 2 feed-forward parts"):
        value_matrix(model, 1)


def test_a_quantised_weight_is_refused():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(CheckpointError, match="no matrix of plain numbers"):
        weight_of(linear)
