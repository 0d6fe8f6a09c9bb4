"""What each method scores, against sums by hand, bm25s, sentence-transformers and published code."""

from __future__ import annotations

import json
from math import log
from pathlib import Path

import numpy as np
import pytest
import retrievers
import transformers
import zoo

from germane.core.errors import CheckpointError, MissingExtra, RecordsError, SettingError, UnknownName
from germane.method import build
from germane.retrieval import Opened, Passage, Passages, Ranking, load_index, make_index
from germane.tasks.retrieve.hybrid import Hybrid
from germane.tasks.retrieve.hybrid import _Search as Fusion

ORACLE = json.loads((Path(__file__).parent.parent / "fixtures" / "beir_resources.json").read_text())[
    "fusion"
]
ROWS = retrievers.passage_rows(30, seed=5)
WHOLE = [f"{row['title']} {row['text']}" for row in ROWS]
QUERIES = ["w1 w2 w3", "w10 w20", "w5 w5 w40 w41"]


def index(method: str, folder: Path, rows=ROWS, **settings):
    folder.mkdir(exist_ok=True)
    passages = (Passage(row["_id"], row["title"], row["text"]) for row in rows)
    return make_index(build(f"retrieve/{method}", settings), passages, folder)


def scores(made, queries=QUERIES, depth=30) -> list[dict[str, float]]:
    return [{hit.id: hit.score for hit in hits} for hits in made.search(queries, depth)]


def test_bm25_is_the_formula_worked_out_by_hand(tmp_path):
    rows = [
        {"_id": "a", "title": "", "text": "cat dog"},
        {"_id": "b", "title": "", "text": "cat cat cat bird"},
        {"_id": "c", "title": "cat", "text": "fish"},
    ]
    found = scores(index("bm25", tmp_path, rows, k1=1.0, b=0.5), ["the cats"])[0]
    # Texts: 3 of them, "cat" in 2, lengths 2, 4 and 1; titles: "cat" in 1 of 3, lengths 0, 0 and 1.
    rarity, mean = log(1 + (3 - 2 + 0.5) / (2 + 0.5)), 7 / 3
    assert found["a"] == pytest.approx(rarity * 1 / (1 + 0.5 + 0.5 * 2 / mean), rel=1e-5)
    assert found["b"] == pytest.approx(rarity * 3 / (3 + 0.5 + 0.5 * 4 / mean), rel=1e-5)
    title = log(1 + (3 - 1 + 0.5) / (1 + 0.5)) * 1 / (1 + 0.5 + 0.5 * 1 / (1 / 3))
    assert found["c"] == pytest.approx(title, rel=1e-5)


def test_bm25_scores_as_bm25s_does_and_ranks_no_zeros(tmp_path):
    import bm25s

    theirs = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    tokens = bm25s.tokenize(WHOLE, stopwords="english", return_ids=False, show_progress=False)
    theirs.index(tokens, show_progress=False)
    for query, found in zip(
        QUERIES, scores(index("bm25", tmp_path, fields="flat", stem=False)), strict=True
    ):
        expected = theirs.get_scores(query.split())
        assert found == {
            row["_id"]: pytest.approx(score, abs=1e-5)
            for row, score in zip(ROWS, expected, strict=True)
            if score > 0
        }
        assert 0 < len(found) < len(ROWS)


def test_multifield_adds_what_titles_and_texts_score_alone(tmp_path):
    both = scores(index("bm25", tmp_path / "both"))
    texts = scores(index("bm25", tmp_path / "texts", [{**row, "title": ""} for row in ROWS]))
    titles = scores(index("bm25", tmp_path / "titles", [{**row, "text": ""} for row in ROWS]))
    for sums, one, other in zip(both, texts, titles, strict=True):
        assert sums == {
            name: pytest.approx(one.get(name, 0) + other.get(name, 0), abs=1e-5) for name in one | other
        }


def test_bm25_takes_inflected_words_as_one_and_leaves_stop_words_out(tmp_path):
    rows = [{"_id": "a", "title": "", "text": "Running dogs"}, {"_id": "b", "title": "", "text": "the end"}]
    assert set(scores(index("bm25", tmp_path / "one", rows), ["the dog runs"])[0]) == {"a"}
    plain = index("bm25", tmp_path / "two", rows, stem=False, stop_words=True)
    assert set(scores(plain, ["the dog runs"])[0]) == {"b"}


def test_bm25_refuses_a_corpus_without_words(tmp_path):
    with pytest.raises(RecordsError, match="no passage holds a word"):
        index("bm25", tmp_path, [{"_id": "a", "title": "", "text": "!"}])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_dense_scores_as_sentence_transformers_does(places, tmp_path, similarity):
    from sentence_transformers import SentenceTransformer, util

    model = SentenceTransformer(str(places.encoder), device="cpu")
    compare = util.cos_sim if similarity == "cosine" else util.dot_score
    expected = compare(model.encode_query(QUERIES), model.encode_document(WHOLE)).numpy()
    made = index("dense", tmp_path, model=str(places.encoder), similarity=similarity)
    for found, row in zip(scores(made), expected, strict=True):
        assert found == {f"d{n}": pytest.approx(float(value), abs=1e-4) for n, value in enumerate(row)}


def test_dense_search_in_blocks_finds_the_same(places, tmp_path, monkeypatch):
    made = index("dense", tmp_path, model=str(places.encoder))
    whole = made.search(QUERIES, 7)
    monkeypatch.setattr("germane.tasks.retrieve.dense._BLOCK", 4)
    assert [[hit.id for hit in hits] for hits in made.search(QUERIES, 7)] == [
        [hit.id for hit in hits] for hits in whole
    ]


def test_dense_puts_prompts_before_queries_and_passages(places, tmp_path):
    prompted = index(
        "dense", tmp_path / "one", model=str(places.encoder), query_prompt="w7 ", passage_prompt="w8 "
    )
    rows = [{**row, "title": f"w8 {row['title']}"} for row in ROWS]
    written = index("dense", tmp_path / "two", rows, model=str(places.encoder))
    asked = scores(written, [f"w7 {query}" for query in QUERIES])
    assert scores(prompted) == [
        {name: pytest.approx(score, abs=1e-5) for name, score in found.items()} for found in asked
    ]


def test_minilm_finds_what_is_said_in_other_words(tmp_path):
    rows = [
        {"_id": "car", "title": "", "text": "The automobile would not start in the cold."},
        {"_id": "pie", "title": "", "text": "Bake the apples with cinnamon and sugar."},
    ]
    made = index("dense", tmp_path, rows)
    assert [hits[0].id for hits in made.search(["my vehicle's engine is frozen", "fruit dessert"], 1)] == [
        "car", "pie",
    ]  # fmt: skip


def test_sparse_scores_as_sentence_transformers_does(places, tmp_path):
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(places.splade), device="cpu")
    expected = (
        model.similarity(model.encode_query(QUERIES), model.encode_document(WHOLE)).to_dense().numpy()
    )
    found = scores(index("sparse", tmp_path, model=str(places.splade), batch_size=4))
    for one, row in zip(found, expected, strict=True):
        assert one == {
            f"d{n}": pytest.approx(float(value), rel=1e-4) for n, value in enumerate(row) if value > 0
        }


def test_sparse_weights_are_the_formula_of_splade(places, tmp_path):
    import torch

    model = transformers.AutoModelForMaskedLM.from_pretrained(places.splade).eval()
    with torch.no_grad():
        logits = model(**zoo.tokenizer()(["w1 w2", WHOLE[0]][:1], return_tensors="pt")).logits[0]
        other = model(**zoo.tokenizer()([WHOLE[0]], return_tensors="pt")).logits[0]
    weights = [torch.log1p(torch.relu(each)).max(dim=0).values for each in (logits, other)]
    found = scores(index("sparse", tmp_path, model=str(places.splade)), ["w1 w2"])[0]
    assert found["d0"] == pytest.approx(float(weights[0] @ weights[1]), rel=1e-4)


def test_the_cross_encoder_orders_the_first_stages_results(places, tmp_path):
    from sentence_transformers import CrossEncoder

    first = index("bm25", tmp_path / "first")
    made = index("rerank", tmp_path / "again", model=str(places.cross), candidates=4)
    model = CrossEncoder(str(places.cross), device="cpu")
    for query, hits, found in zip(QUERIES, first.search(QUERIES, 4), scores(made), strict=True):
        expected = model.predict([(query, f"{hit.title} {hit.text}") for hit in hits])
        assert found == {
            hit.id: pytest.approx(float(score), abs=1e-5) for hit, score in zip(hits, expected, strict=True)
        }
        assert list(found.values()) == sorted(found.values(), reverse=True)


def fuse(folder: Path, runs, **settings):
    """The fusion of two given runs: query -> passage -> score."""
    names = [f"d{n:02d}" for n in range(12)]
    passages = Passages.write((Passage(name, "", "") for name in names), folder)

    def part(run):
        def search(queries, depth):
            found = [run[query] for query in queries]
            return [
                Ranking(
                    np.array([names.index(name) for name in row]), np.array(list(row.values()), np.float32)
                )
                for row in found
            ]

        return search

    search = Fusion(Hybrid(**settings), passages, [part(run) for run in runs])
    return {
        query: {names[p]: float(s) for p, s in zip(r.positions, r.scores, strict=True)}
        for query, r in zip(runs[0], search(list(runs[0]), 12), strict=True)
    }


@pytest.mark.parametrize(
    ("theirs", "settings", "parts"),
    [("rrf", {}, 2), ("normalize", {"fusion": "weighted-sum"}, 2)],
)
def test_fusion_is_pyserinis(tmp_path, theirs, settings, parts):
    found = fuse(tmp_path, [ORACLE["one"], ORACLE["two"]], **settings)
    for query, expected in ORACLE[theirs].items():
        # Ours are means, theirs sums.
        assert found[query] == {
            name: pytest.approx(score / parts, abs=1e-6) for name, score in expected.items()
        }


def test_fusion_by_hand_with_weights(tmp_path):
    one, two = {"q": {"d00": 4.0, "d01": 3.0, "d02": 2.0}}, {"q": {"d02": 9.0, "d00": 1.0}}
    ranks = fuse(tmp_path, [one, two], weights=[3, 1], k=2)["q"]
    assert ranks == pytest.approx(
        {"d00": 0.75 / 3 + 0.25 / 4, "d01": 0.75 / 4, "d02": 0.75 / 5 + 0.25 / 3}, abs=1e-6
    )
    sums = fuse(tmp_path, [one, two], weights=[3, 1], fusion="weighted-sum")["q"]
    assert sums == pytest.approx({"d00": 0.75, "d01": 0.375, "d02": 0.25}, abs=1e-6)


def test_the_best_of_equal_scores_come_by_id_whatever_the_depth(tmp_path):
    passages = Passages.write((Passage(name, "", "") for name in ("b", "d", "a", "c", "e")), tmp_path)
    scores = np.array([1, 1, 2, 1, 0], np.float32)
    for depth in range(1, 7):
        best = passages.best(scores, depth)
        assert [passage.id for passage in passages.read(best.positions)] == ["a", "d", "c", "b", "e"][
            :depth
        ]


def test_wrong_models_and_parts_are_refused_before_work(places):
    for settings, name, error, message in [
        ({"model": str(places.encoder)}, "sparse", CheckpointError, "needs a model with ...ForMaskedLM"),
        ({"model": str(places.encoder)}, "rerank", CheckpointError, "ForSequenceClassification"),
        ({"model": "nowhere"}, "dense", CheckpointError, "no such folder"),
        ({"parts": ["bm25", "dens"]}, "hybrid", UnknownName, "did you mean 'retrieve/dense'"),
        ({"model": str(places.cross), "first": "b25"}, "rerank", UnknownName, "retrieve/bm25"),
    ]:
        with pytest.raises(error, match=message):
            build(f"retrieve/{name}", settings).check()
    with pytest.raises(SettingError, match="one for each part"):
        build("retrieve/hybrid", {"weights": [1, 2, 3]})


def test_a_cross_encoder_with_several_scores_is_refused(tmp_path):
    config = zoo.bert_config(num_labels=3)
    folder = zoo.save(zoo.make(transformers.BertForSequenceClassification, config), tmp_path)
    with pytest.raises(CheckpointError, match="needs a model with one score"):
        build("retrieve/rerank", {"model": str(folder)}).check()


def test_a_broken_encoder_is_named(places, tmp_path):
    import shutil

    folder = shutil.copytree(places.encoder, tmp_path / "broken")
    zoo.rewrite(folder, lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match="numbers that are not finite"):
        index("dense", tmp_path / "index", model=str(folder))


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("germane.retrieval.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"retrieve/bm25 needs bm25s.*germane\[retrieve\]"):
        build("retrieve/bm25", {}).check()


def test_opened_says_what_a_method_is_made_of(places, tmp_path):
    dense = {"name": "dense", "settings": {"model": str(places.encoder)}}
    made = index("hybrid", tmp_path, parts=["bm25", dense, dense])
    assert isinstance(made.opened, Opened)
    assert list(made.opened.parts) == ["bm25", "dense", "dense 3"]


def test_an_index_knows_its_parts_models_by_their_whole_path(places, tmp_path, monkeypatch):
    monkeypatch.chdir(places.encoder.parent)
    part = {"name": "dense", "settings": {"model": "encoder"}}
    index("hybrid", tmp_path, parts=["bm25", part])
    monkeypatch.chdir("/")
    assert load_index(tmp_path).search(["w1"], 1)


def test_a_search_for_nothing_and_of_no_depth(tmp_path):
    made = index("bm25", tmp_path)
    assert made.search([]) == []
    with pytest.raises(SettingError, match="depth: must be at least 1"):
        made.search(["w1"], 0)
