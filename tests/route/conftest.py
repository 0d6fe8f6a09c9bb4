"""A tiny language model that reads bytes, a tiny encoder, a graph and queries for the route task."""

from __future__ import annotations

import zoo  # first: sets the environment before transformers is imported

# isort: split
from collections.abc import Iterator

import pytest
import transformers
import yaml
from parts import TOPICS, Places, query_rows, save_language_model
from servers import ChatServer


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    place = tmp_path_factory.mktemp("route")
    workers = {name: {"description": " ".join(words)} for name, words in TOPICS.items()}
    graph = place / "graph.yaml"
    graph.write_text(yaml.safe_dump({"workers": workers}, sort_keys=False))
    return Places(
        base=save_language_model(place / "base"),
        untied=save_language_model(place / "untied", tie_word_embeddings=False),
        encoder=zoo.save(zoo.make(transformers.BertModel, zoo.bert_config()), place / "encoder"),
        graph=graph,
        learn=zoo.write_rows(place / "learn.jsonl", query_rows(6, 0)),
        rewrite=zoo.write_rows(place / "rewrite.jsonl", query_rows(2, 0, rewritten=True)),
        score=zoo.write_rows(place / "score.jsonl", query_rows(3, 6)),
    )


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running
