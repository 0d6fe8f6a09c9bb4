"""A small collection in BEIR's form, and tiny models with random weights that retrieve."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import zoo


@dataclass(frozen=True)
class Places:
    """Files of the collection, and folders of the models."""

    corpus: Path
    queries: Path
    qrels: Path
    encoder: Path
    splade: Path
    cross: Path

    def settings(self, name: str) -> dict[str, Any]:
        """What a method needs to run on the tiny models."""
        dense = {"name": "dense", "settings": {"model": str(self.encoder), "batch_size": 2}}
        return {
            "retrieve/bm25": {},
            "retrieve/dense": dense["settings"],
            "retrieve/sparse": {"model": str(self.splade), "batch_size": 2},
            "retrieve/hybrid": {"parts": ["bm25", dense]},
            "retrieve/rerank": {"model": str(self.cross), "candidates": 12},
        }[name]

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """The task's arguments."""
        given = {"corpus": str(self.corpus), "queries": str(self.queries), "qrels": str(self.qrels)}
        return {**given, "depth": 10, **changes}


def passage_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    generator = random.Random(seed)
    return [
        {
            "_id": f"d{number}",
            "title": generator.choice(zoo.WORDS),
            "text": " ".join(generator.choices(zoo.WORDS, k=generator.randint(4, 9))),
        }
        for number in range(count)
    ]


def make(place: Path) -> Places:
    place.mkdir(parents=True, exist_ok=True)
    rows = passage_rows(40)
    queries = [{"_id": f"q{n}", "text": " ".join(rows[3 * n]["text"].split()[:3])} for n in range(10)]
    qrels = place / "qrels.tsv"
    lines = [f"q{n}\td{3 * n}\t{1 + n % 2}\n" for n in range(8)]  # two queries are not judged
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    kinds = {
        "encoder": (transformers.BertModel, {}),
        "splade": (transformers.BertForMaskedLM, {}),
        "cross": (transformers.BertForSequenceClassification, {"num_labels": 1}),
    }
    models = {
        name: zoo.save(zoo.make(kind, zoo.bert_config(**changes)), place / name)
        for name, (kind, changes) in kinds.items()
    }
    return Places(
        corpus=zoo.write_rows(place / "corpus.jsonl", rows),
        queries=zoo.write_rows(place / "queries.jsonl", queries),
        qrels=qrels,
        **models,
    )
