"""A tiny language model that reads bytes, queries, and what the tests of routing do again and again."""

from __future__ import annotations

import zoo  # first: sets the environment before transformers is imported

# isort: split
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from germane.recipe import Result, run_task
from germane.tasks.route._tokens import embedding_weights

TOPICS = {"red": ("w1", "w2", "w3"), "green": ("w11", "w12", "w13"), "blue": ("w21", "w22", "w23")}


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Every byte a token, so that any text comes back as it was."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<end>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", clean_up_tokenization_spaces=False
    )


def save_language_model(folder: Path, **changes: Any) -> Path:
    tokenizer = byte_tokenizer()
    config = zoo.llama_config(
        vocab_size=len(tokenizer), max_position_embeddings=512, hidden_size=32, intermediate_size=64,
        bos_token_id=None, eos_token_id=1, **changes,
    )  # fmt: skip
    model = zoo.make(transformers.LlamaForCausalLM, config)
    for weight in embedding_weights(model):
        weight.data *= 10  # rows of random models are too short for any token to be likely
    zoo.save(model, folder, words=None)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Places:
    """Where the parts of the tests lie."""

    base: Path
    untied: Path
    encoder: Path
    graph: Path
    learn: Path
    rewrite: Path
    score: Path

    def settings(self, method: str) -> dict[str, Any]:
        """Settings that make a method small."""
        small = {
            "functional-token": {
                "base": str(self.base), "epochs": 2, "rank": 2, "system": "r", "learning_rate": 5e-3,
                "row_learning_rate": 2e-2, "max_new_tokens": 24,
            },
            "embedding": {"encoder": str(self.encoder)},
        }  # fmt: skip
        return small.get(method.removeprefix("route/"), {})


def query_rows(count: int, start: int, rewritten: bool = False) -> list[dict[str, Any]]:
    rows = []
    for name, words in TOPICS.items():
        for number in range(start, start + count):
            first, second = words[number % 3], words[(number // 3) % 3]
            row = {"text": f"{first} {second} w{40 + number % 7}", "label": name}
            rows.append({**row, "answer": f"it's {name}"} if rewritten else row)
    return rows


def train(
    places: Places, method: str, out: Path, seed: int = 0, data: Path | None = None, **changes: Any
) -> Result:
    """`germane route`, made small."""
    name = method.removeprefix("route/")
    arguments = {
        "graph": str(places.graph),
        "data": [f"learn={data or places.learn}"],
        "evaluate": [f"test={places.score}"],
    }
    return run_task("route", name, arguments, {**places.settings(name), **changes}, out, seed=seed)


def written(folder: Path, graph: dict[str, Any]) -> Path:
    """A graph as a JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.json").write_text(json.dumps(graph))
    return folder / "graph.json"
