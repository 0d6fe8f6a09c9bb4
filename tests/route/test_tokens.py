"""Calls are written and read exactly, and the losses are the formulas'."""

from __future__ import annotations

import math
import random

import pytest
import torch
import transformers
from parts import byte_tokenizer
from torch.nn import functional

from germane.core.errors import CheckpointError
from germane.tasks.route import _tokens
from germane.tasks.route._tokens import Call, disarm, parse_call, write_call
from germane.tasks.route.functional_token import pad_right


@pytest.mark.parametrize(
    ("output", "call"),
    [
        ("<route_3>('What is torque?')<route_end>", Call(3, "What is torque?")),
        ("  <route_12> ( 'a' ) <route_end> and more", Call(12, "a")),
        ('<route_0>("double quotes")<route_end>', Call(0, "double quotes")),
        ("<route_0>()<route_end>", Call(0, None)),
        ("<route_0>( )<route_end>", Call(0, None)),
        ("<route_0>('')<route_end>", Call(0, "")),
        (r"<route_1>('it\'s \\ here\nnow')<route_end>", Call(1, "it's \\ here\nnow")),
        ("<route_1>('it's what's in \"quotes\"')<route_end>", Call(1, "it's what's in \"quotes\"")),
        ("<route_1>('f('x') is')<route_end>", Call(1, "f('x') is")),
        ("<route_1>('first')<route_end><route_2>('second')<route_end>", Call(1, "first")),
        ("<route_1>('cut')<route_end", "it does not end with ') <route_end>'"),
        ("<route_1>('cut in the midd", "it does not end with ') <route_end>'"),
        ("<route_1>('ends\\", "it does not end with ') <route_end>'"),
        (
            "<route_1>('no bracket'<route_end><route_2>('b')<route_end>",
            "it does not end with ') <route_end>'",
        ),
        ("<route_1>", "does not begin with a functional token and a bracket"),
        ("Sure! <route_1>('a')<route_end>", "does not begin with a functional token and a bracket"),
        ("<route_x>('a')<route_end>", "does not begin with a functional token and a bracket"),
        ("<route_1>(a)<route_end>", "its argument is not in quotes"),
        ("<route_1>(", "its argument is not in quotes"),
        ("", "does not begin with a functional token and a bracket"),
    ],
)
def test_parser(output: str, call: Call | str):
    assert parse_call(output) == call


def test_what_is_written_is_read_back():
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choices("ab'\"\\()\n\r <>é", k=generator.randrange(12)))
        assert parse_call(write_call(5, text)) == Call(5, text)
    assert parse_call(write_call(7, None)) == Call(7, None)


def test_a_query_cannot_hold_a_functional_token():
    assert disarm("a <route_0>('x')<route_end> b") == "a < route_0>('x')< route_end> b"
    assert disarm("<route>, <router_1>") == "<route>, <router_1>"
    assert parse_call(write_call(1, "x')<route_end>")) == Call(1, "x')< route_end>")


def test_weighted_loss_by_hand():
    # Two targets. The first has logits (0, ln 3): its class 1 has probability 3/4, so ln(4/3), weight 2.
    # The second has equal logits: ln 2, weight 1. The third is no target. (2 ln(4/3) + ln 2) / 3.
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [9.0, 0.0]]])
    labels = torch.tensor([[1, 0, -100]])
    weights = torch.tensor([[2.0, 1.0, 5.0]])
    expected = (2 * math.log(4 / 3) + math.log(2)) / 3
    assert float(_tokens.weighted_cross_entropy(logits, labels, weights)) == pytest.approx(
        expected, rel=1e-6
    )


def test_rows_are_fitted_to_the_loss_over_the_whole_vocabulary():
    torch.manual_seed(0)
    states, others, rows = torch.randn(6, 4), torch.randn(9, 4), torch.randn(3, 4)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    _, losses = _tokens.fit_rows(states, (states @ others.T).logsumexp(1), labels, rows, 1, 0.1)
    whole = functional.cross_entropy(states @ torch.cat([rows, others]).T, labels)
    assert losses[0] == pytest.approx(float(whole), rel=1e-5)
    fitted, losses = _tokens.fit_rows(states, (states @ others.T).logsumexp(1), labels, rows, 300, 0.1)
    assert losses[-1] < losses[0] / 3
    assert torch.equal((states @ fitted.T).argmax(1), labels)


def test_learning_rate_rises_over_a_tenth_and_falls_to_nothing():
    assert [_tokens.schedule(n, 20) for n in (0, 1, 2, 11, 19)] == pytest.approx([0.5, 1, 1, 0.5, 1 / 18])


def test_every_record_is_in_one_batch_of_its_length():
    lengths = [3, 90, 4, 88, 5, 91, 2, 89]
    groups = _tokens.batches(lengths, 4, torch.Generator().manual_seed(0))
    assert sorted(index for group in groups for index in group) == list(range(8))
    assert sorted(max(lengths[index] for index in group) for group in groups) == [5, 91]


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_at_the_mean(tied: bool):
    tokenizer = byte_tokenizer()
    known = len(tokenizer)
    config = transformers.LlamaConfig(
        vocab_size=known, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    means = [weight.data.mean(dim=0) for weight in _tokens.embedding_weights(model)]
    assert len(means) == (1 if tied else 2)
    numbers = _tokens.add_tokens(model, tokenizer, 2, 0.0, 0)
    assert numbers == [known, known + 1, known + 2]
    for weight, mean in zip(_tokens.embedding_weights(model), means, strict=True):
        assert torch.allclose(weight.data[numbers], mean.expand(3, -1), atol=1e-6)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert tokenizer("<route_1>x<route_end>")["input_ids"][::2] == numbers[1:]


def test_spare_rows_are_used_and_none_is_lost():
    tokenizer = byte_tokenizer()
    config = transformers.GPT2Config(vocab_size=len(tokenizer) + 40, n_embd=8, n_layer=1, n_head=1)
    model = transformers.GPT2LMHeadModel(config)
    _tokens.add_tokens(model, tokenizer, 3, 0.1, 0)
    assert model.get_input_embeddings().weight.shape[0] == config.vocab_size


def test_an_output_layer_with_bias_is_refused():
    config = transformers.GPTJConfig(vocab_size=50, n_embd=8, n_layer=1, n_head=1, rotary_dim=4)
    with pytest.raises(CheckpointError, match="without bias"):
        _tokens.embedding_weights(transformers.GPTJForCausalLM(config))


def test_padding_on_the_right():
    tokens, mask = pad_right([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
