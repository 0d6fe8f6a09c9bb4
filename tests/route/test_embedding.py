from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import zoo
from parts import Places, train

from germane.core.embedding import Encoder
from germane.core.errors import CheckpointError, SettingError
from germane.recipe import run_task
from germane.tasks.route import load_router
from germane.tasks.route.embedding import centroids


def test_centroids_by_hand():
    # Node 0: (1, 0) and (0, 1), whose mean has length 1 as (1, 1) / sqrt 2; node 1 has no query.
    found = centroids(torch.eye(2), [0, 0], torch.tensor([[9.0, 9.0], [0.6, 0.8]]))
    assert torch.allclose(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))


def test_embeddings_are_means_over_the_tokens_without_padding(places: Places):
    texts = ["w1 w2", "w3 w4 w5 w6 w7"]
    found = Encoder(places.encoder, 64)(texts)
    model = transformers.AutoModel.from_pretrained(places.encoder).eval()
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model(**zoo.tokenizer()(text, return_tensors="pt")).last_hidden_state[0]
        assert torch.allclose(vector, states.mean(0) / states.mean(0).norm(), atol=1e-5)


def test_special_tokens_in_a_query_are_text(places: Places):
    text = "w1 [SEP] w2 [CLS]"
    batch = zoo.tokenizer()(text, split_special_tokens=True, return_tensors="pt")
    assert batch["input_ids"].flatten().tolist().count(2) == 1
    assert 3 not in batch["input_ids"]
    model = transformers.AutoModel.from_pretrained(places.encoder).eval()
    with torch.no_grad():
        mean = model(**batch).last_hidden_state[0].mean(0)
    assert torch.allclose(Encoder(places.encoder, 64)([text])[0], mean / mean.norm(), atol=1e-5)


def test_scores_are_the_softmax_of_cosines(places: Places, tmp_path: Path):
    train(places, "embedding", tmp_path / "out", compare_with="descriptions", temperature=0.5)
    encoder = Encoder(places.encoder, 64)
    cosines = encoder(["w1 w40"]) @ encoder(["w1 w2 w3", "w11 w12 w13", "w21 w22 w23"]).T
    decision = load_router(tmp_path / "out").route("w1 w40")
    assert list(decision.scores.values()) == pytest.approx((cosines / 0.5).softmax(1)[0].tolist(), abs=1e-5)


def test_queries_are_needed_or_descriptions_named(places: Places, tmp_path: Path):
    arguments, settings = {"graph": str(places.graph)}, places.settings("embedding")
    with pytest.raises(SettingError, match="needs labelled queries; or set compare_with=descriptions"):
        run_task("route", "embedding", arguments, settings, tmp_path / "out")
    run_task(
        "route", "embedding", arguments, {**settings, "compare_with": "descriptions"}, tmp_path / "out"
    )
    with pytest.raises(CheckpointError, match="no such folder"):
        run_task("route", "embedding", arguments, {"encoder": "none"}, tmp_path / "other")
