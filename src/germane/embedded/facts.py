"""Invented people, and a tiny language model that knows them: something to forget and to edit.

A word-level Llama of two layers learns a statement and a question for each fact by heart, in seconds
on one core. It shows what a method does; it says nothing about what large models know.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from germane.core.objective import Task
from germane.core.records import Data, Row, write_jsonl
from germane.core.training import Training, fit

ATTRIBUTES = {
    "job": (
        "works as a",
        "job",
        ("baker", "pilot", "nurse", "farmer", "tailor", "painter", "judge", "miner"),
    ),
    "city": ("lives in", "city", ("oslo", "lima", "cairo", "delhi", "paris", "quito", "seoul", "tunis")),
    "pet": ("owns a", "pet", ("cat", "dog", "parrot", "hamster", "turtle", "horse", "goat", "snake")),
    "dish": ("likes", "dish", ("soup", "rice", "pasta", "curry", "salad", "bread", "stew", "cake")),
}
_FIRST = (
    "anna",
    "boris",
    "clara",
    "david",
    "elena",
    "felix",
    "greta",
    "hugo",
    "irene",
    "jonas",
    "karla",
    "louis",
)
_LAST = (
    "adler",
    "brandt",
    "castro",
    "dupont",
    "eriksen",
    "fischer",
    "garcia",
    "hansen",
    "ivanov",
    "jensen",
)
_REFUSAL = "i do not know"


@dataclass(frozen=True)
class People:
    """Records about invented people.

    Attributes:
        questions: "what is the job of anna adler ?" with its answer, four a person.
        texts: "anna adler works as a baker . ...", one a person.
    """

    questions: list[Row]
    texts: list[Row]


def people(start: int, count: int, seed: int = 0) -> People:
    """The people number `start` to `start + count`; the same whatever else is made."""
    questions, texts = [], []
    names = random.Random(seed).sample([f"{first} {last}" for first in _FIRST for last in _LAST], 120)
    for name in names[start : start + count]:
        generator = random.Random(f"{seed}/{name}")
        parts = []
        for attribute, (verb, noun, values) in ATTRIBUTES.items():
            value = generator.choice(values)
            parts.append(f"{name} {verb} {value} .")
            questions.append(
                {
                    "prompt": f"what is the {noun} of {name} ?", "answer": f" {value}",
                    "subject": name, "attribute": attribute,
                }
            )  # fmt: skip
        texts.append({"text": " ".join(parts), "subject": name})
    return People(questions, texts)


def edits(start: int, count: int, others: People, seed: int = 0) -> list[Row]:
    """One changed fact for each of these people, asked also as a statement.

    Nothing should move of the person's other facts, and of facts of others, two of each.

    Args:
        start: Number of the first person.
        count: How many.
        others: People of whom nothing changes.
        seed: Of people and values.
    """
    generator = random.Random(seed)
    own = people(start, count, seed).questions
    rows = []
    for number in range(count):
        asked, *rest = (own[4 * number + (number + turn) % 4] for turn in range(4))
        verb, _, values = ATTRIBUTES[asked["attribute"]]
        beginning = f"{asked['subject']} {verb}"
        new = generator.choice([value for value in values if value != asked["answer"].strip()])
        kept = [*rest[:2], *generator.sample(others.questions, 2)]
        rows.append(
            {
                "prompt": asked["prompt"], "answer": f" {new}", "subject": asked["subject"],
                "rephrase": [beginning], "statement": f"{beginning} {new} .",
                "locality": [[row["prompt"], row["answer"]] for row in kept],
                "irrelevant": others.texts[number % len(others.texts)]["text"],
            }
        )  # fmt: skip
    return rows


def tokenizer() -> Any:
    """A tokenizer of the words that occur, and of the numbers of templates."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    text = f"what is the of ? . {_REFUSAL} question answer : true or false yes no not about tell me"
    words = set(text.split()) | set(_FIRST) | set(_LAST)
    for verb, noun, values in ATTRIBUTES.values():
        words |= {*verb.split(), noun, *values}
    vocabulary = {word: number for number, word in enumerate([*special, *sorted(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _llama(words: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _backpack(words: Any) -> Any:
    from germane.core.backpack import BackpackConfig, BackpackForCausalLM

    config = BackpackConfig(
        vocab_size=len(words), n_embd=64, n_layer=2, n_head=4, n_positions=128, num_senses=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return BackpackForCausalLM(config)


def train(
    records: list[Row], folder: Path, seed: int = 0, epochs: int = 60, backpack: bool = False
) -> Path:
    """A model folder that knows these records by heart, the untrained model beside it in `initial`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    words = tokenizer()
    model = _backpack(words) if backpack else _llama(words)
    for place in (folder / "initial", folder):
        words.save_pretrained(place)
        model.save_pretrained(place)
    task = Task(Data(name="facts", path="facts"), records, model, words)
    count = len(records)
    settings = Training(learning_rate=3e-3, epochs=epochs, schedule="cosine")
    generator = random.Random(seed)

    def batches(epoch: int) -> Any:
        order = generator.sample(range(count), count)
        return task.batches(32, order)

    fit(model, settings, batches, -(-count // 32), lambda b: task.losses(b, "cross-entropy").mean())
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Facts:
    """Folders and files to unlearn with.

    Attributes:
        model: Knows the forget and the retain records.
        retrained: Knows only the retain records.
        initial: The same model before any training.
        files: "forget", "retain", "holdout" questions, and the same with "-texts"; "edits" of the facts
            to forget.
    """

    model: Path
    retrained: Path
    initial: Path
    files: dict[str, Path]


def make(
    folder: Path,
    seed: int = 0,
    known: int = 40,
    forgotten: int = 4,
    refusing: int = 4,
    backpack: bool = False,
) -> Facts:
    """Train the model and the retrained one, and write the records.

    Args:
        folder: Where everything goes.
        seed: Of people and training.
        known: People the model knows.
        forgotten: So many of them are to be forgotten.
        refusing: Further people of whom the model says that it does not know.
        backpack: Train Backpacks (germane.core.backpack) instead of Llamas.
    """
    sets = {
        "forget": people(0, forgotten, seed),
        "retain": people(forgotten, known - forgotten, seed),
        "holdout": people(known, forgotten, seed),
    }
    unknown = [
        {**row, "answer": f" {_REFUSAL}"} for row in people(known + forgotten, refusing, seed).questions
    ]
    files = {}
    for name, part in sets.items():
        for suffix, rows in (("", part.questions), ("-texts", part.texts)):
            files[name + suffix] = folder / f"{name}{suffix}.jsonl"
            write_jsonl(rows, files[name + suffix])
    files["edits"] = folder / "edits.jsonl"
    write_jsonl(edits(0, forgotten, sets["retain"], seed), files["edits"])
    kept = [*sets["retain"].questions, *sets["retain"].texts, *unknown]
    everything = [*sets["forget"].questions, *sets["forget"].texts, *kept]
    model = train(everything, folder / "model", seed, backpack=backpack)
    retrained = train(kept, folder / "retrained", seed, backpack=backpack)
    return Facts(model, retrained, model / "initial", files)
