"""Set-Based Prompting: masks and positions by hand and as the official code has them; order has no effect."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
import zoo

from germane.attention import Attending, attend, in_a_row
from germane.core.checkpoint import Checkpoint
from germane.core.errors import CheckpointError, SettingError
from germane.tasks.attend.set_based_prompting import SetBasedPrompting

OFFICIAL = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "set_based_prompting.json").read_text(encoding="utf-8")
)
WIDE = 0.3  # spread of the random weights, so that order has an effect worth the name
SIZE = {**zoo.SIZE, "vocab_size": 64, "max_position_embeddings": 64, "initializer_range": WIDE}
ROTARY = {**SIZE, "num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, zoo.llama_config(initializer_range=WIDE)),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(**ROTARY, sliding_window=48)),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**ROTARY)),
    "gpt-neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**SIZE, rotary_pct=0.5)),
    "gpt2": (transformers.GPT2LMHeadModel, zoo.gpt2_config()),
}
OPTIONS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]
PROMPTS = [["w11 w12", list(order), "w13 w14"] for order in itertools.permutations(OPTIONS)]
OTHER = ["w20 w21 w22 w23 w24", ["w25 w26", "w27"], "w28", ["w29", "w30 w31 w32"], "w33"]
each = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def models():
    """Each model, made once; no test changes its weights."""
    made = {}

    def get(name, attention="sdpa"):
        if name not in made:
            made[name] = zoo.make(*MODELS[name])
        made[name].set_attn_implementation(attention)
        return made[name].eval()

    return get


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.tokenizer()


def apply(model, tokenizer, **settings):
    return attend(model, tokenizer, method="set-based-prompting", **settings)


def effect_of_order(attending, prompts=PROMPTS) -> float:
    logits = torch.stack(attending.logits(prompts))
    return float((logits.amax(0) - logits.amin(0)).max())


# One token, then a set of texts of 2, 1 and 2 tokens, then two tokens.
HAND = [[9], ([[1, 2]], [[3]], [[4, 5]]), [6, 7]]


def test_positions_and_mask_of_three_texts_by_hand():
    layout = SetBasedPrompting().arrange(HAND)
    assert layout.tokens == [9, 1, 2, 3, 4, 5, 6, 7]
    assert layout.positions == [0, 1, 2, 1, 1, 2, 3, 4]
    assert layout.ending == 2
    assert layout.sees.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]


def test_a_set_in_a_text_of_a_set_by_hand():
    nested = [[9], ([[1], ([[2]], [[3, 4]])], [[5]]), [6]]
    layout = SetBasedPrompting().arrange(nested)
    assert layout.tokens == [9, 1, 2, 3, 4, 5, 6]
    assert layout.positions == [0, 1, 2, 2, 3, 1, 4]
    assert layout.sees.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]


def test_continuations_branch_off_beside_each_other():
    layout = in_a_row([[9, 8]]).branch([[1, 2], [3]])
    assert layout.tokens == [9, 8, 1, 2, 3]
    assert layout.positions == [0, 1, 2, 3, 2]
    assert layout.sees.int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("case", OFFICIAL["cases"])
def test_masks_positions_and_logits_are_those_of_the_official_code(case, models, tokenizer):
    prompt = [part if isinstance(part[0], int) else tuple(part) for part in case["prompt"]]
    layout = SetBasedPrompting().arrange(prompt)
    assert layout.positions == case["positions"]
    assert layout.sees.int().tolist() == case["mask"]
    with torch.no_grad():
        logits = Attending(models("llama"), tokenizer).read([layout], layout.ending)[0]
    torch.testing.assert_close(logits, torch.tensor(case["logits"]), rtol=0, atol=1e-5)


@each
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_order_of_four_options_changes_a_logit(name, attention, models, tokenizer):
    model = models(name, attention)
    with apply(model, tokenizer) as attending:
        assert effect_of_order(attending) < 1e-4
    assert effect_of_order(Attending(model, tokenizer)) > 1e-2


@each
def test_in_double_precision_less_than_a_billionth_is_left(name, models, tokenizer):
    model = models(name).double()  # with sdpa: the eager attention works its weights out in float32
    try:
        with apply(model, tokenizer) as attending:
            assert effect_of_order(attending) < 1e-9
    finally:
        model.float()


@pytest.mark.parametrize("half", ["mask", "positions"])
def test_half_of_the_method_is_not_enough(half, models, tokenizer):
    with apply(models("llama"), tokenizer, **{half: False}) as attending:
        assert effect_of_order(attending) > 1e-2


def test_sorted_sets_give_results_equal_to_the_bit_also_in_bfloat16(models, tokenizer):
    model = zoo.make(*MODELS["llama"]).bfloat16()
    nested = [["w1", [["w2", ["w3", "w4 w5"], "w6"], "w7"], "w8"]]
    nested += [["w1", ["w7", ["w2", ["w4 w5", "w3"], "w6"]], "w8"]]
    with apply(model, tokenizer, canonical=True) as attending:
        assert effect_of_order(attending) == 0
        assert effect_of_order(attending, nested) == 0


def test_several_and_nested_sets_have_no_order(models, tokenizer):
    several = [
        ["w1", list(first), "w9", list(second), "w2"]
        for first in itertools.permutations(["w3", "w4 w5"])
        for second in itertools.permutations(["w6 w7 w8", "w10", "w11 w12"])
    ]
    nested = [
        ["w1", list(outer), "w8"]
        for inner in itertools.permutations(["w3", "w4 w5"])
        for outer in itertools.permutations([["w2", list(inner), "w6"], "w7 w9", "w10"])
    ]
    with apply(models("llama"), tokenizer) as attending:
        assert effect_of_order(attending, several) < 1e-5
        assert effect_of_order(attending, nested) < 1e-5
    assert effect_of_order(Attending(models("llama"), tokenizer), several) > 1e-2


@each
def test_a_set_of_one_text_is_plain_prompting(name, models, tokenizer):
    model = models(name)
    plain = Attending(model, tokenizer)
    prompt = ["w1 w2", ["w3 w4"], "w5 w6"]
    with apply(model, tokenizer) as attending:
        assert torch.equal(attending.logits([prompt])[0], plain.logits([prompt])[0])
        assert attending.generate([prompt], 6) == plain.generate([prompt], 6)
        tokens = tokenizer("w1 w2 w3 w4 w5 w6", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            usual = model(tokens).logits[0, -2:]
        torch.testing.assert_close(attending.logits([prompt])[0], usual, rtol=0, atol=1e-5)


@each
def test_generation_with_a_cache_is_generation_without_one(name, models, tokenizer):
    model = models(name)
    with apply(model, tokenizer) as attending:
        written = attending.generate([OTHER], 8)[0]
        layout, row = attending.lay_out(OTHER), []
        for _ in range(8):
            longer = layout.branch([row]) if row else layout
            with torch.no_grad():
                row.append(int(attending.read([longer], 1)[0, -1].argmax()))
            if row[-1] == tokenizer.eos_token_id:
                break
    assert written == tokenizer.decode(row, skip_special_tokens=True)


@each
def test_generation_has_no_order_and_a_batch_writes_what_single_prompts_do(name, models, tokenizer):
    prompts = [*PROMPTS[:6], OTHER, ["w40"]]
    with apply(models(name), tokenizer) as attending:
        together = attending.generate(prompts, 6)
        assert together == [attending.generate([prompt], 6)[0] for prompt in prompts]
        assert len(set(together[:6])) == 1
        assert len(set(together)) > 1


@each
def test_a_batch_has_the_logits_and_log_probabilities_of_single_prompts(name, models, tokenizer):
    prompts, answers = [PROMPTS[3], OTHER, ["w40"]], [["w1", "w2 w3 w4"], ["w5 w6"], ["w7", "w8"]]
    with apply(models(name), tokenizer) as attending:
        alone = [attending.logits([prompt])[0] for prompt in prompts]
        for one, other in zip(attending.logits(prompts), alone, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        singles = [attending.log_probabilities([p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
        for one, other in zip(attending.log_probabilities(prompts, answers), singles, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_log_probabilities_are_those_of_the_plain_text(models, tokenizer):
    model = models("llama")
    found = Attending(model, tokenizer).log_probabilities([["w1", ["w2"], "w3"]], [["w4 w5", "w6"]])[0]
    for answer, value in zip(("w4 w5", "w6"), found, strict=True):
        tokens = tokenizer(f"w1 w2 w3 {answer}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            chances = model(tokens).logits[0].log_softmax(-1)
        own = [float(chances[place - 1, tokens[0, place]]) for place in range(4, tokens.shape[1])]
        assert value == pytest.approx(sum(own) / len(own), abs=1e-5)


@each
@pytest.mark.parametrize("fails", [False, True])
def test_after_the_block_the_model_is_what_it_was_to_the_bit(name, fails, models, tokenizer):
    model = models(name)
    model.train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    tokens = torch.tensor([[2, 5, 9, 30]])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = model.eval()(tokens).logits
        written = model.generate(tokens, max_new_tokens=5, do_sample=False)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    try:
        with apply(model, tokenizer) as attending:
            attending.generate([OTHER], 3)
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, before)
        assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), written)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_attention_without_masks_is_replaced_in_the_block_only(tokenizer):
    model = zoo.make(*MODELS["llama"])
    model.set_attn_implementation("flex_attention")
    with apply(model, tokenizer) as attending:
        assert model.config._attn_implementation == "sdpa"
        assert effect_of_order(attending) < 1e-4
    assert model.config._attn_implementation == "flex_attention"


def test_a_prompt_that_begins_with_a_set_has_the_special_tokens_before_it(models, tokenizer):
    with apply(models("llama"), tokenizer) as attending:
        layout = attending.lay_out([["w1", "w2"], "w3"])
    assert layout.tokens == [2, *tokenizer("w1 w2 w3", add_special_tokens=False)["input_ids"]]
    assert layout.positions == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        (["w1", [], "w2"], "a set of the prompt is empty"),
        (["w1", ["w2", ""], "w3"], "a text of a set, '', has no tokens"),
        (["w1", ["w2", "w3"]], "whose last part is a text"),
        (["w1", ["w2", "w3"], ""], "last text, '', has no tokens"),
        ("w1", "a prompt is a list"),
        ([], "a prompt is a list"),
        (["w1 " * 63, ["w2", "w3"], "w4"], "reaches position 66; the model reads 64"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(prompt, match, models, tokenizer):
    with apply(models("llama"), tokenizer) as attending, pytest.raises(SettingError, match=match):
        attending.logits([prompt])


def test_room_for_new_tokens_and_the_window_are_looked_at_first(models, tokenizer):
    with apply(models("llama"), tokenizer) as attending:
        attending.lay_out(["w1 " * 30, ["w2 " * 30] * 4, "w3"])  # 152 tokens up to position 62
        with pytest.raises(SettingError, match="reaches position 65"):
            attending.generate([["w1 " * 50, ["w2", "w3"], "w4"]], 12)
    with (
        apply(models("mistral"), tokenizer) as attending,
        pytest.raises(SettingError, match="53 tokens.*last 48 only"),
    ):
        attending.generate([["w1 " * 40, ["w2", "w3"], "w4"]], 9)


def test_an_answer_without_tokens_is_refused(models, tokenizer):
    with pytest.raises(SettingError, match="an answer, '', has no tokens"):
        Attending(models("llama"), tokenizer).log_probabilities([["w1"]], [["w2", ""]])


@pytest.mark.parametrize(
    ("kind", "config", "match"),
    [
        (
            transformers.BloomForCausalLM,
            transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2),
            "does not take positions",
        ),
        (
            transformers.FalconForCausalLM,
            transformers.FalconConfig(
                vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=True
            ),
            "does not take positions",
        ),
        (
            transformers.MambaForCausalLM,
            transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2),
            "does not take positions",
        ),
        (
            transformers.RecurrentGemmaForCausalLM,
            transformers.RecurrentGemmaConfig(
                vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                num_attention_heads=2, lru_width=16,
            ),
            "order still moved its logits",
        ),
    ],
    ids=["bloom", "falcon-alibi", "mamba", "recurrent-gemma"],
)  # fmt: skip
def test_models_that_take_no_layout_are_refused(kind, config, match, tokenizer):
    model = zoo.make(kind, config).train()
    with pytest.raises(CheckpointError, match=match), apply(model, tokenizer):
        pass
    assert model.training


def test_such_a_model_is_refused_by_its_files_before_it_is_loaded(tmp_path):
    config = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    folder = zoo.save(zoo.make(transformers.BloomForCausalLM, config), tmp_path / "bloom")
    with pytest.raises(CheckpointError, match="BloomForCausalLM does not take positions"):
        SetBasedPrompting().check_model(str(folder), Checkpoint(folder))
    folder = zoo.save(zoo.make(*MODELS["gpt2"]), tmp_path / "gpt2")
    SetBasedPrompting().check_model(str(folder), Checkpoint(folder))
