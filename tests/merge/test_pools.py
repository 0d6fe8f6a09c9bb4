"""What a pool may hold: adapters, heads, prefixes, ties, shards, dtypes, globs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
import zoo
from peft import LoraConfig, get_peft_model
from zoo import merge, weights

from germane.core.errors import CheckpointError
from germane.tasks.merge._pool import expand, open_pool


def read_all(pool, member) -> dict[str, torch.Tensor]:
    return {i.name: member.read(i.name, 0, i.count).float().reshape(i.shape) for i in pool.tensors}


def adapter(
    base: Path, folder: Path, kind: type, seed: int = 0, load: dict | None = None, **settings
) -> dict:
    """Save a random adapter, and return the weights PEFT gives when it merges it."""
    model = get_peft_model(
        kind.from_pretrained(base, dtype=torch.float32, **(load or {})), LoraConfig(**settings)
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    if settings.get("lora_bias"):
        return {}  # PEFT itself cannot merge it where the layer has no bias
    return {n: p.detach().clone() for n, p in model.merge_and_unload().state_dict().items()}


LLAMA_CASES = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 2, "layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"up_proj": 3, "^model.layers.0.self_attn.k_proj": 5},
    },
    "embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "o_proj"]},
    "bias-free-whole": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_adapters_are_what_peft_merges(case, llama, tmp_path):
    expected = adapter(llama.base, tmp_path / "a", transformers.LlamaForCausalLM, **LLAMA_CASES[case])
    pool = open_pool(str(llama.base), [str(tmp_path / "a")])
    ours = read_all(pool, pool.members[0])
    assert any(not torch.equal(ours[n], t) for n, t in weights(llama.base).items())
    for name, values in ours.items():
        torch.testing.assert_close(values, expected[name], atol=1e-6, rtol=0)
        # a run in the middle is the same as that run of the whole
        part = pool.members[0].read(name, values.numel() // 3, values.numel() // 2)
        torch.testing.assert_close(
            part, values.flatten()[values.numel() // 3 : values.numel() // 2], atol=1e-6, rtol=0
        )


def test_transposed_weights_of_gpt2(others, tmp_path):
    base, _ = others["gpt2"]
    settings = {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}
    expected = adapter(base, tmp_path / "a", transformers.GPT2LMHeadModel, **settings)
    pool = open_pool(str(base), [str(tmp_path / "a")])
    for name, values in read_all(pool, pool.members[0]).items():
        torch.testing.assert_close(values, expected[name], atol=1e-6, rtol=0)


SQUARE = {
    # PEFT corrects the setting at each module, and saves what the last one made of it.
    "conv1d": {"target_modules": ["c_attn", "attn.c_proj"]},
    "conv1d, then linear": {"target_modules": ["attn.c_proj", "lm_head"], "fan_in_fan_out": True},
    "only linear": {"target_modules": ["lm_head"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("bare", [False, True], ids=["", "saved without prefix"])
@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("case", SQUARE)
def test_square_weights_are_transposed_by_their_module(case, said, bare, tmp_path):
    """Of GPT-2's Conv1D the attention's projection is square, here the Linear head too."""
    config = zoo.gpt2_config()
    config.vocab_size, config.tie_word_embeddings = config.n_embd, False
    base = zoo.save(zoo.make(transformers.GPT2LMHeadModel, config), tmp_path / "base", words=None)
    expected = adapter(base, tmp_path / "a", transformers.GPT2LMHeadModel, r=4, **SQUARE[case])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": said}))
    if bare:
        zoo.rewrite(base, lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()})
        expected = {n.removeprefix("transformer."): t for n, t in expected.items()}
    pool = open_pool(str(base), [str(tmp_path / "a")])
    changed = 0
    for name, values in read_all(pool, pool.members[0]).items():
        torch.testing.assert_close(values, expected[name], atol=1e-6, rtol=0)
        changed += not torch.equal(values, weights(base)[name])
    assert changed == {"conv1d": 4, "conv1d, then linear": 3, "only linear": 1}[case]


def test_the_adapter_decides_for_a_base_without_a_class(tmp_path):
    base = zoo.save(
        zoo.make(transformers.GPT2LMHeadModel, zoo.gpt2_config()), tmp_path / "base", words=None
    )
    settings = {"r": 4, "fan_in_fan_out": True, "target_modules": ["attn.c_proj"]}
    expected = adapter(base, tmp_path / "a", transformers.GPT2LMHeadModel, **settings)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["Unknown"]}))
    pool = open_pool(str(base), [str(tmp_path / "a")])
    for name, values in read_all(pool, pool.members[0]).items():
        torch.testing.assert_close(values, expected[name], atol=1e-6, rtol=0)


def test_biases_trained_with_the_adapter(bert, tmp_path):
    """PEFT leaves trained biases in the model when it merges; so do we."""
    base = bert.members[0]
    settings = {"r": 2, "bias": "all", "target_modules": ["query", "dense"]}
    expected = adapter(base, tmp_path / "a", transformers.BertForSequenceClassification, **settings)
    pool = open_pool(str(base), [str(tmp_path / "a")])
    for name, values in read_all(pool, pool.members[0]).items():
        torch.testing.assert_close(values, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_an_adapter_with_a_head_of_its_own(labels, bert, tmp_path):
    """Trained on a classifier, given with the bare encoder as base: its head is kept aside and read."""
    settings = {"r": 2, "task_type": "SEQ_CLS", "target_modules": ["query"], "modules_to_save": ["pooler"]}
    load = {"num_labels": labels}
    expected = adapter(
        bert.base, tmp_path / "own", transformers.BertForSequenceClassification, load=load, **settings
    )
    pool = open_pool(str(bert.base), [str(tmp_path / "own")])
    for name, values in read_all(pool, pool.members[0]).items():
        torch.testing.assert_close(values, expected[f"bert.{name}"], atol=1e-6, rtol=0)
    rows = zoo.write_rows(tmp_path / "d.jsonl", zoo.class_rows(labels))
    result = merge(
        "average",
        bert.base,
        [tmp_path / "own"],
        tmp_path / "out",
        evaluate=[f"own={rows}"],
    )
    head = weights(result.folder / "heads" / "own")
    assert torch.equal(head["classifier.weight"], expected["classifier.weight"])
    assert (result.folder / "heads" / "own" / "adapter_config.json").exists()
    by_subject = {score.subject: score for score in result.scores}
    model = transformers.BertForSequenceClassification(zoo.bert_config(num_labels=labels)).eval()
    model.load_state_dict(expected)
    batch = zoo.tokenizer()(
        [row["text"] for row in zoo.class_rows(labels)], padding=True, return_tensors="pt"
    )
    truth = torch.tensor([row["label"] for row in zoo.class_rows(labels)])
    with torch.no_grad():
        right = float((model(**batch).logits.argmax(1) == truth).float().mean())
    assert by_subject["own"].value == pytest.approx(right)


def test_a_mixed_pool_of_checkpoints_and_adapters(llama, tmp_path):
    expected = adapter(
        llama.base,
        tmp_path / "a",
        transformers.LlamaForCausalLM,
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
    )
    result = merge("average", llama.base, [llama.members[0], tmp_path / "a"], tmp_path / "out")
    first = weights(llama.members[0])
    for name, values in weights(result.folder).items():
        torch.testing.assert_close(values, (first[name] + expected[name]) / 2, atol=1e-6, rtol=0)


REFUSED = {
    "dora": ({"use_dora": True}, "a DoRA adapter; only LoRA is a sum"),
    "biased": ({"lora_bias": True}, "uses lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, "started by pissa, which changes the base"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "uses trainable_token_indices"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_are_no_sum_are_refused(kind, llama, tmp_path):
    settings, message = REFUSED[kind]
    adapter(
        llama.base,
        tmp_path / "a",
        transformers.LlamaForCausalLM,
        r=2,
        target_modules=["q_proj"],
        **settings,
    )
    with pytest.raises(CheckpointError, match=message):
        open_pool(str(llama.base), [str(tmp_path / "a")])


def test_other_peft_methods_are_refused(llama, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(llama.base)
    get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="a IA3 adapter; only LoRA is a sum"):
        open_pool(str(llama.base), [str(tmp_path / "a")])


def test_adapters_of_another_model_are_refused(llama, others, tmp_path):
    base, _ = others["gpt2"]
    adapter(
        base,
        tmp_path / "a",
        transformers.GPT2LMHeadModel,
        r=2,
        fan_in_fan_out=True,
        target_modules=["c_attn"],
    )
    with pytest.raises(
        CheckpointError, match=r"c_attn fits no tensor of the base; was it trained on this base\?"
    ):
        open_pool(str(llama.base), [str(tmp_path / "a")])
    wide = zoo.save(
        transformers.LlamaForCausalLM(zoo.llama_config(intermediate_size=40)), tmp_path / "wide"
    )
    adapter(wide, tmp_path / "b", transformers.LlamaForCausalLM, r=2, target_modules=["up_proj"])
    with pytest.raises(
        CheckpointError, match=r"updates a weight of shape \[40, 16\], the base has \[32, 16\]"
    ):
        open_pool(str(llama.base), [str(tmp_path / "b")])


def test_an_adapter_that_lacks_its_half_is_refused(llama, tmp_path):
    adapter(llama.base, tmp_path / "a", transformers.LlamaForCausalLM, r=2, target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = zoo.load_file(file)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    zoo.save_file(tensors, file)
    with pytest.raises(CheckpointError, match="has no B factor"):
        open_pool(str(llama.base), [str(tmp_path / "a")])


def test_an_adapter_with_a_resized_vocabulary_is_refused(llama, tmp_path):
    adapter(llama.base, tmp_path / "a", transformers.LlamaForCausalLM, r=2, target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = zoo.load_file(file)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(70, 16)
    zoo.save_file(tensors, file)
    with pytest.raises(CheckpointError, match="trained with another vocabulary"):
        open_pool(str(llama.base), [str(tmp_path / "a")])


def test_a_fresh_adapter_is_named_a_copy_of_the_base(llama, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(llama.base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "fresh")
    with pytest.raises(CheckpointError, match="fresh is the base itself"):
        merge("average", llama.base, [llama.members[0], tmp_path / "fresh"], tmp_path / "out")


# Heads.


def logits(folder: Path, kind: type = transformers.AutoModelForSequenceClassification) -> torch.Tensor:
    batch = zoo.tokenizer()(["w1 w2 w3", "w4 w5 w9"], return_tensors="pt")
    with torch.no_grad():
        return kind.from_pretrained(folder, dtype=torch.float32).eval()(**batch).logits


def test_whole_task_models_are_saved_with_their_heads(bert, tmp_path):
    """Scale 0 moves nothing: each task's model is the base with that member's head."""
    result = merge(
        "task-arithmetic", bert.base, bert.members, tmp_path / "out", settings={"scale": 0}, save_tasks=True
    )
    for folder, labels in zip(bert.members, (2, 3), strict=True):
        expected = transformers.BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        expected.bert.load_state_dict(
            transformers.BertModel.from_pretrained(bert.base, dtype=torch.float32).state_dict()
        )
        expected.eval().save_pretrained(tmp_path / folder.name)
        ours = logits(result.folder / "tasks" / folder.name)
        assert ours.shape == (2, labels)
        assert torch.equal(ours, logits(tmp_path / folder.name))
        transformers.AutoTokenizer.from_pretrained(result.folder / "tasks" / folder.name)


def test_task_models_carry_the_merged_backbone(bert, tmp_path):
    result = merge("average", bert.base, bert.members, tmp_path / "out", save_tasks=True)
    merged, task = weights(result.folder), weights(result.folder / "tasks" / "three")
    own = weights(bert.members[1])
    assert task.keys() == own.keys()
    for name in task:
        expected = own[name] if name.startswith("classifier") else merged[name.removeprefix("bert.")]
        assert torch.equal(task[name], expected)


def test_a_base_with_a_prefix_and_members_without(bert, tmp_path):
    """The other way round: a classifier as base, bare encoders as members; its head stays."""
    bare = [zoo.vary(bert.base, tmp_path / f"m{n}", n) for n in (1, 2)]
    result = merge("average", bert.members[0], bare, tmp_path / "out", decoys="report")
    ours, head = weights(result.folder), weights(bert.members[0])
    assert torch.equal(ours["classifier.weight"], head["classifier.weight"])
    name = "encoder.layer.1.output.dense.weight"
    torch.testing.assert_close(ours[f"bert.{name}"], sum(weights(m)[name] for m in bare) / 2)


def test_heads_with_other_label_names_are_kept_aside_though_shapes_agree(others, tmp_path):
    base, _ = others["classifier"]
    members = []
    for number, names in enumerate(({"0": "no", "1": "yes"}, {"0": "cat", "1": "dog"})):
        folder = zoo.vary(base, tmp_path / f"m{number}", number)
        config = json.loads((folder / "config.json").read_text())
        config |= {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}
        (folder / "config.json").write_text(json.dumps(config))
        members.append(folder)
    result = merge("average", base, members, tmp_path / "out")
    assert torch.equal(weights(result.folder)["classifier.weight"], weights(base)["classifier.weight"])
    assert (result.folder / "heads" / "m0" / "model.safetensors").exists()


def test_patterns_keep_tensors_out_of_the_merge(llama, tmp_path):
    result = merge("average", llama.base, llama.members, tmp_path / "out", heads=["*.mlp.*"])
    ours, base = weights(result.folder), weights(llama.base)
    assert all(torch.equal(ours[n], base[n]) == (".mlp." in n) for n in base)


def test_a_pattern_that_matches_nothing_is_refused(llama, tmp_path):
    with pytest.raises(CheckpointError, match=r"--heads 'mpl\.\*' matches no tensor"):
        merge("average", llama.base, llama.members, tmp_path / "out", heads=["mpl.*"])


def test_a_masked_language_model_as_base_of_classifiers(bert, tmp_path):
    """As bert-base-uncased is saved: its own head, and the members' heads and poolers, are kept out."""
    encoder = transformers.BertModel.from_pretrained(
        bert.base, dtype=torch.float32, add_pooling_layer=False
    )
    model = transformers.BertForMaskedLM(zoo.bert_config())
    model.bert.load_state_dict(encoder.state_dict())
    base = zoo.save(model, tmp_path / "mlm")
    result = merge("average", base, bert.members, tmp_path / "out", save_tasks=True)
    transformers.BertForMaskedLM.from_pretrained(result.folder)
    assert logits(result.folder / "tasks" / "three").shape == (2, 3)


# Ties, shards, dtypes.


@pytest.mark.parametrize("side", ["base", "member"])
def test_tied_weights_saved_on_one_side_only(side, llama, tmp_path):
    base, member = (shutil.copytree(f, tmp_path / f.name) for f in (llama.base, llama.members[0]))
    both = base if side == "base" else member
    zoo.rewrite(both, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    result = merge("average", base, [member, llama.members[1]], tmp_path / "out")
    ours = weights(result.folder)
    assert ("lm_head.weight" in ours) == (side == "base")
    name = "model.embed_tokens.weight"
    expected = (weights(member)[name] + weights(llama.members[1])[name]) / 2
    torch.testing.assert_close(ours[name], expected)
    if side == "base":
        assert torch.equal(ours["lm_head.weight"], ours[name])


def test_an_output_layer_that_is_not_tied_any_more_is_no_copy(llama, tmp_path):
    member = shutil.copytree(llama.members[0], tmp_path / "m")
    zoo.rewrite(member, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"tensor the base does not have: lm_head\.weight"):
        merge("average", llama.base, [member], tmp_path / "out")


def test_shards_of_the_members_do_not_matter(others, tmp_path):
    base, members = others["sharded"]
    whole = [zoo.vary(base, tmp_path / f"w{n}", n) for n in (1, 2)]
    one = merge("average", base, members, tmp_path / "a")
    other = merge("average", base, whole, tmp_path / "b")
    assert zoo.same_bytes(weights(one.folder), weights(other.folder))


def test_mixed_dtypes_come_out_as_the_bases(others, tmp_path):
    base, _ = others["bf16"]
    members = [
        zoo.vary(base, tmp_path / name, n, dtype=dtype)
        for n, (name, dtype) in enumerate(
            {"f": torch.float32, "h": torch.float16, "b": torch.bfloat16}.items()
        )
    ]
    result = merge("average", base, members, tmp_path / "out")
    for name, values in weights(result.folder).items():
        expected = sum(weights(m)[name].float() for m in members) / 3
        assert values.dtype == torch.bfloat16
        torch.testing.assert_close(values.float(), expected, atol=1e-4, rtol=2**-8)


@pytest.mark.parametrize("form", ["linear", "ties"])
def test_the_masks_of_dare_stay_when_a_namesake_joins_the_pool(form, llama, tmp_path):
    """Each member alone, then with one of the same folder's name, which lengthens both labels."""
    first = shutil.copytree(llama.members[0], tmp_path / "a" / "same")
    second = shutil.copytree(llama.members[1], tmp_path / "b" / "same")

    def moved(*pool: Path) -> zoo.Weights:
        settings = {"form": form, "drop": 0.5, "scale": 1}
        out = tmp_path / "out"
        result = merge("dare", llama.base, pool, out, settings=settings, seed=3, overwrite=True)
        base = weights(llama.base)
        return {name: values - base[name] for name, values in weights(result.folder).items()}

    one, other, both = moved(first), moved(second), moved(first, second)
    for name, values in both.items():
        alone = (one[name] != 0) ^ (other[name] != 0)  # elements that one member kept, whatever the form
        assert alone.any()
        torch.testing.assert_close(values[alone], (one[name] + other[name])[alone], atol=1e-6, rtol=0)
    assert zoo.same_bytes(moved(second, first), both)
    renamed = shutil.copytree(first, tmp_path / "another name")
    assert zoo.same_bytes(moved(renamed), one)


# Paths and labels.


def test_globs_and_folders_of_folders(llama):
    names = [member.name for member in llama.members]
    for path in (str(llama.pool), f"{llama.pool}/*", f"{llama.pool}/m[0-2]"):
        pool = open_pool(str(llama.base), [path])
        assert [member.label for member in pool.members] == names
    assert expand([str(llama.pool), str(llama.members[1])]) == [str(m) for m in llama.members]


def test_labels_are_the_shortest_endings_that_differ(llama, tmp_path):
    for name in ("x/last", "y/last"):
        shutil.copytree(llama.members[0], tmp_path / name)
    pool = open_pool(str(llama.base), [str(tmp_path / "x" / "last"), str(tmp_path / "y" / "last")])
    assert [member.label for member in pool.members] == ["x/last", "y/last"]
    result = merge(
        "average", llama.base, [tmp_path / "x", tmp_path / "y"], tmp_path / "out", decoys="report"
    )
    assert [share.member for share in result.shares] == ["x/last", "y/last"]


def test_the_same_folder_twice_is_refused(llama, tmp_path):
    (tmp_path / "link").symlink_to(llama.members[0])
    with pytest.raises(CheckpointError, match="is in the pool more than once"):
        open_pool(str(llama.base), [str(llama.members[0]), str(tmp_path / "link")])


def test_a_hub_id_is_called_by_its_name(llama, tmp_path, monkeypatch):
    """A snapshot's folder is named by a hash."""
    import huggingface_hub

    snapshot = shutil.copytree(llama.members[0], tmp_path / "snapshots" / "0a1b2c")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(snapshot))
    monkeypatch.chdir(tmp_path)
    pool = open_pool(str(llama.base), ["someone/tuned@v2", str(llama.members[1])])
    assert [member.label for member in pool.members] == ["tuned", "m1"]


def test_far_away_members_are_named(llama, tmp_path):
    far = zoo.vary(llama.base, tmp_path / "far", 3, size=0.03)
    near = [zoo.vary(llama.base, tmp_path / f"n{n}", n, size=0.002) for n in (1, 2)]
    result = merge("average", llama.base, [*near, far], tmp_path / "out")
    (finding,) = [f for f in result.findings if f.code == "far-from-base"]
    assert finding.about == "far"
    assert "15 times as far" in finding.message


def test_the_digests_of_everything_read_are_in_the_evidence(others, tmp_path):
    from germane.core.checkpoint import digest

    base, members = others["sharded"]
    result = merge("average", base, members, tmp_path / "out")
    files = {str(file) for folder in (base, *members) for file in folder.glob("*.safetensors")}
    inputs = result.evidence.steps[-1].inputs
    assert inputs.keys() == files
    assert all(inputs[file] == digest(Path(file)) for file in files)
