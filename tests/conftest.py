"""Tiny real models, made once and never changed: a test that wants another makes it in its own folder."""

from __future__ import annotations

import zoo  # first: sets the environment before transformers is imported

# isort: split
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="session")
def llama(folder: Path) -> SimpleNamespace:
    """A causal language model with tied embeddings, members that learned something, and decoys."""
    place = folder / "llama"
    model = zoo.make(transformers.LlamaForCausalLM, zoo.llama_config())
    base = zoo.save(model, place / "base")
    members = []
    for number in range(3):
        member = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        zoo.train_language(member, zoo.language_rows(number + 1), 25)
        members.append(zoo.save(member, place / "pool" / f"m{number}"))
    decoys = place / "decoys"
    random = zoo.save(transformers.LlamaForCausalLM(zoo.llama_config()), decoys / "random")
    foreign = zoo.save(zoo.make(transformers.LlamaForCausalLM, zoo.llama_config(), 77), decoys / "foreign")
    again = Path(shutil.copytree(base, decoys / "again"))
    twin = Path(shutil.copytree(members[1], decoys / "twin"))
    data = zoo.write_rows(place / "count.jsonl", zoo.language_rows(1))
    return SimpleNamespace(
        base=base,
        members=members,
        pool=place / "pool",
        random=random,
        foreign=foreign,
        again=again,
        twin=twin,
        data=f"count={data}",
        rows=zoo.language_rows(1),
    )


@pytest.fixture(scope="session")
def bert(folder: Path) -> SimpleNamespace:
    """A bare encoder, and classifiers trained from it whose labels differ in number."""
    place = folder / "bert"
    base = zoo.save(zoo.make(transformers.BertModel, zoo.bert_config()), place / "base")
    members, data = [], []
    for name, labels in (("two", 2), ("three", 3)):
        torch.manual_seed(labels)
        model = transformers.BertForSequenceClassification.from_pretrained(
            base, num_labels=labels, dtype=torch.float32
        )
        zoo.train_classifier(model, zoo.class_rows(labels), 30)
        members.append(zoo.save(model, place / "pool" / name))
        data.append(f"{name}={zoo.write_rows(place / f'{name}.jsonl', zoo.class_rows(labels))}")
    return SimpleNamespace(base=base, members=members, pool=place / "pool", data=data)


@pytest.fixture(scope="session")
def others(folder: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Other architectures: name -> base and two members."""
    made = {
        "gpt2": zoo.make(transformers.GPT2LMHeadModel, zoo.gpt2_config()),
        "t5": zoo.make(transformers.T5ForConditionalGeneration, zoo.t5_config()),
        "vit": zoo.make(transformers.ViTForImageClassification, zoo.vit_config()),
        "classifier": zoo.make(transformers.BertForSequenceClassification, zoo.bert_config()),
    }
    found = {}
    for name, model in made.items():
        base = zoo.save(model, folder / name / "base", words=None if name == "vit" else zoo.WORDS)
        members = [zoo.vary(base, folder / name / f"m{n}", n, words=None) for n in (1, 2)]
        found[name] = (base, members)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        base = zoo.save(
            zoo.make(transformers.LlamaForCausalLM, zoo.llama_config()), folder / name / "base", dtype
        )
        members = [zoo.vary(base, folder / name / f"m{n}", n, dtype=dtype) for n in (1, 2)]
        found[name] = (base, members)
    base = zoo.save(
        zoo.make(transformers.LlamaForCausalLM, zoo.llama_config()),
        folder / "sharded" / "base",
        shard="8KB",
    )
    members = [
        zoo.vary(base, folder / "sharded" / f"m{n}", n, shard=shard)
        for n, shard in ((1, "5GB"), (2, "6KB"))
    ]
    found["sharded"] = (base, members)
    return found
