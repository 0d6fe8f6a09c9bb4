"""Pruning and ranking in one pass: beside the official model, by hand, trained, saved and answered with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import save_file
from scripted import kept as kept_ids
from scripted import replying, solve_one
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, DebertaV2Config
from transformers import DebertaV2TokenizerFast as DebertaTokenizer

from germane.core.errors import CheckpointError, RecordsError
from germane.core.records import write_jsonl
from germane.core.training import Training
from germane.embedded import facts as fact_parts
from germane.method import build
from germane.recipe import run_task
from germane.solver import Passage, Question, Solving
from germane.tasks.ground._pruner import (
    Labelled,
    Pruner,
    Read,
    Text,
    _fill,
    compression,
    kept,
    read_labelled_passages,
)
from germane.tasks.ground._two_heads import IGNORED, load, losses

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "provence.json").read_text())


def tensors() -> dict[str, torch.Tensor]:
    """The fixture's weights."""
    found = {}
    for number, (name, shape) in enumerate(sorted(FIXTURE["tensors"].items())):
        place = torch.arange(math.prod(shape), dtype=torch.float64)
        wave = 0.8 * torch.sin(0.37 * place * (number % 7 + 1) + 1.7 * number)
        found[name] = wave.view(shape).float()
    return found


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as the published checkpoint's: an architecture that transformers does not know."""
    folder = tmp_path_factory.mktemp("published")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"▁w{n}" for n in range(20))]
    DebertaTokenizer(vocab=[(word, -1.0) for word in words]).save_pretrained(folder)
    config = DebertaV2Config(**FIXTURE["configuration"]).to_dict()
    config |= {"model_type": "Provence", "architectures": ["Provence"], "auto_map": {"AutoModel": "a.B"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_logits_scores_and_losses_are_the_official_models(published):
    model = load(published).eval()
    labels, targets = torch.tensor(FIXTURE["labels"]), torch.tensor(FIXTURE["targets"])
    with torch.no_grad():
        scores, logits = model(
            input_ids=torch.tensor(FIXTURE["input_ids"]),
            attention_mask=torch.tensor(FIXTURE["attention_mask"]),
        )
        pruning, ranking = losses(scores, logits, labels, targets)
    assert torch.allclose(logits, torch.tensor(FIXTURE["token logits"]), atol=1e-5)
    assert scores.tolist() == pytest.approx(FIXTURE["ranking scores"], abs=1e-5)
    assert float(pruning) == pytest.approx(FIXTURE["compression loss"], abs=1e-5)
    assert float(ranking) == pytest.approx(FIXTURE["ranking loss"], abs=1e-5)
    for case in FIXTURE["losses"]:
        weight = 1.0 if case["weight"] is None else case["weight"]
        assert float(pruning + weight * ranking) == pytest.approx(case["loss"], abs=1e-4)


@pytest.mark.parametrize("case", FIXTURE["compression"], ids=str)
def test_compression_is_the_official_codes(case):
    assert compression(case["original"], case["left"]) == pytest.approx(case["out"], abs=1e-9)
    assert compression([], []) == 0


def test_a_published_pruner_reads_questions_in_small_letters_without_punctuation(published):
    pruner = Pruner(str(published))
    text = Text(("w3 w4", "w5"))
    assert pruner([("W1, w2?", text)]) == pruner([("w1 w2", text)])
    assert pruner([("???", text)])[0].score != pruner([("w1", text)])[0].score


# --- Rules and windows, by hand


@pytest.mark.parametrize(
    ("rule", "threshold", "expected"),
    [
        ("majority", 0.1, [True, False, True]),  # 2 of 3, 1 of 2 (not more than half), 1 of 1
        ("mean", 0.1, [True, True, True]),  # .4, .45, .2
        ("mean", 0.4, [False, True, False]),  # .4 is not above .4
        ("majority", 0.5, [True, False, False]),
    ],
)
def test_sentences_are_kept_by_their_tokens(rule, threshold, expected):
    read = Read(0.0, ((0.6, 0.6, 0.0), (0.9, 0.0), (0.2,)))
    assert kept(read, threshold, rule, titled=False) == expected


def test_a_title_is_kept_if_and_only_if_a_sentence_is():
    assert kept(Read(0.0, ((0.0,), (0.9,))), 0.5, "mean", titled=True) == [True, True]
    assert kept(Read(0.0, ((0.9,), (0.0,))), 0.5, "mean", titled=True) == [False, False]
    assert kept(Read(0.0, ((0.9,),)), 0.5, "mean", titled=True) == [False]
    assert kept(Read(0.0, ((), ())), 0.0, "mean", titled=False) == [False, False]


def test_windows_end_with_sentences_and_lose_nothing():
    parts = _fill([[1, 2], [3, 4], [5], [6, 7, 8, 9, 10], [11]], 4)
    assert parts == [
        ([1, 2, 3, 4], [0, 0, 1, 1]),
        ([5], [2]),
        ([6, 7, 8, 9], [3, 3, 3, 3]),
        ([10, 11], [3, 4]),
    ]
    assert _fill([], 4) == [([], [])]


def test_the_loss_by_hand():
    """One token of p(kept) = 1/4 to be kept, one to be dropped, one left out; one score of two known."""
    logits = torch.tensor([[[math.log(3.0), 0.0]] * 3] * 2)
    labels = torch.tensor([[1, 0, IGNORED], [IGNORED] * 3])
    pruning, ranking = losses(torch.tensor([1.0, 5.0]), logits, labels, torch.tensor([3.0, math.nan]))
    assert float(pruning) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    assert float(ranking) == 4.0
    empty = losses(torch.ones(2), logits, torch.full((2, 3), IGNORED), torch.full((2,), math.nan))
    assert [float(value) for value in empty] == [0.0, 0.0]


# --- A pruner that keeps sentences with w1, trained in a second


def sentence(generator: torch.Generator, keep: bool) -> str:
    words = torch.randint(2, 20, (4,), generator=generator).tolist()
    place = int(torch.randint(0, 4, (1,), generator=generator))
    return " ".join("w1" if keep and n == place else f"w{word}" for n, word in enumerate(words)) + " ."


def labelled_rows(count: int, seed: int = 0) -> list[dict]:
    """Passages of up to four sentences; those with w1 are to be kept, and are counted by the score."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        keeps = [bool(torch.rand(1, generator=generator) < 0.4) for _ in range(number % 4 + 1)]
        rows.append(
            {
                "question": "w40 ?", "sentences": [sentence(generator, keep) for keep in keeps],
                "cited": [n for n, keep in enumerate(keeps) if keep], "score": float(sum(keeps)) - 1,
            }
        )  # fmt: skip
    return rows


def base(folder: Path) -> Path:
    config = zoo.bert_config(num_labels=1, hidden_size=32, intermediate_size=64)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return zoo.save(zoo.make(BertForSequenceClassification, config), folder)


LEARNING = Training(learning_rate=5e-3, epochs=25, batch_size=16)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folder that training begins with, labelled records, and a trained pruner's folder."""
    folder = tmp_path_factory.mktemp("pruner")
    base(folder / "base")
    write_jsonl(labelled_rows(160), folder / "labelled.jsonl")
    pruner = Pruner(str(folder / "base"), trained=True)
    rows = read_labelled_passages(str(folder / "labelled.jsonl"), scored=True)
    pruner.train(rows, LEARNING, 1.0, False, seed=0)
    pruner.save(folder / "trained")
    return folder


def test_a_trained_pruner_keeps_the_right_sentences_and_ranks(parts):
    rows = labelled_rows(40, seed=1)
    pruner = Pruner(str(parts / "trained"))
    reads = pruner([(row["question"], Text(tuple(row["sentences"]))) for row in rows])
    right = [
        [n for n, keep in enumerate(kept(read, 0.5, "majority", False)) if keep] == row["cited"]
        for read, row in zip(reads, rows, strict=True)
    ]
    assert sum(right) >= 38
    none, many = (
        [read.score for read, row in zip(reads, rows, strict=True) if row["score"] in wanted]
        for wanted in ((-1.0,), (1.0, 2.0, 3.0))
    )
    assert max(none) < min(many)


def test_a_trained_folder_is_a_cross_encoder_too(parts):
    model = AutoModelForSequenceClassification.from_pretrained(parts / "trained").eval()
    given = zoo.tokenizer()("w40 ?", "w1 w2 . w3 .", return_tensors="pt")
    given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    with torch.no_grad():
        expected = float(model(**given).logits[0, 0])
    found = Pruner(str(parts / "trained"))([("w40 ?", Text(("w1 w2 .", "w3 .")))])[0]
    assert found.score == pytest.approx(expected, abs=1e-5)


def test_a_pair_reads_the_same_alone_and_beside_others(parts):
    pruner = Pruner(str(parts / "trained"))
    pairs = [("w40", Text(("w1 w2 .",) * n)) for n in (1, 5, 3)]
    for pair, read in zip(pairs, pruner(pairs), strict=True):
        (alone,) = pruner([pair])
        assert read.score == pytest.approx(alone.score, abs=1e-5)
        for one, other in zip(read.probabilities, alone.probabilities, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("best", [0, 1])
def test_what_is_longer_than_a_window_is_read_in_several(parts, best):
    """Of 32 tokens 29 are the passage's, beside [CLS] w40 [SEP]: four sentences of seven words."""
    pruner = Pruner(str(parts / "trained"), window=32)
    none, some = "w2 w3 w4 w5 w6 w7 .", "w2 w1 w4 w5 w6 w7 ."
    sentences = (some, some, some, some, none, none) if best == 0 else (none, none, none, none, some, some)
    (read,) = pruner([("w40", Text(sentences))])
    halves = pruner([("w40", Text(sentences[:4])), ("w40", Text(sentences[4:]))])
    assert halves[best].score > halves[1 - best].score + 0.1
    assert read.score == pytest.approx(halves[best].score, abs=1e-5)
    assert [len(each) for each in read.probabilities] == [7] * 6
    expected = [p for half in halves for each in half.probabilities for p in each]
    assert [p for each in read.probabilities for p in each] == pytest.approx(expected, abs=1e-5)


def test_a_sentence_longer_than_a_window_is_read_to_its_end(parts):
    (read,) = Pruner(str(parts / "trained"), window=32)([("w40", Text((" ".join(["w2"] * 70),)))])
    assert len(read.probabilities[0]) == 70


def test_special_tokens_in_a_passage_are_text(parts):
    (read,) = Pruner(str(parts / "trained"))([("w40", Text(("w2 [SEP] [CLS] w3 .",)))])
    assert len(read.probabilities[0]) == 9  # "[", "SEP", "]", ... as words, none of them known


def test_a_question_without_room_for_a_passage_is_refused(parts):
    with pytest.raises(RecordsError, match="has 60 tokens; the pruner reads 64 at a time"):
        Pruner(str(parts / "trained"))([("w2 " * 60, Text(("w1 .",)))])


def test_the_same_seed_trains_the_same_pruner_and_padding_counts_only_when_asked(parts):
    rows = [
        Labelled(row["question"], Text(tuple(row["sentences"])), frozenset(row["cited"]), row["score"])
        for row in labelled_rows(8)
    ]

    def trained(seed: int, every_token: bool, window: int) -> float:
        pruner = Pruner(str(parts / "base"), window=window, trained=True)
        return pruner.train(rows, Training(epochs=1, batch_size=8), 0.05, every_token, seed).losses[0]

    assert trained(1, False, 64) == trained(1, False, 64) == pytest.approx(trained(1, False, 48), abs=1e-6)
    assert trained(1, True, 64) != pytest.approx(trained(1, True, 48), abs=1e-6)


# --- The method


def ask(*passages: Passage) -> Question:
    return Question("q", "w40 ?", ("w9",), passages=passages)


PASSAGES = (
    Passage("none", "w5 w6 w7 w8 ."),
    Passage("one", "w2 w1 w4 w5 . w6 w7 w8 w9 ."),
    Passage("all", "w3 w1 w4 w7 . w1 w8 w9 w2 . w1 w4 w5 w6 .", title="w15"),
)


def provence(parts, **settings):
    return build("ground/provence", {"pruner": str(parts / "trained"), "threshold": 0.5, **settings})


def test_what_is_left_is_shown_in_the_order_of_the_scores(parts):
    chat = replying("The answer is w9.")
    solving = Solving(chat)
    (answer,) = provence(parts).solve(solving, [ask(*PASSAGES)])
    assert answer.text == "w9"
    assert '[1] "w15: w3 w1 w4 w7 . w1 w8 w9 w2 . w1 w4 w5 w6 ."\n[2] "w2 w1 w4 w5 ."\n\n' in chat.asked[0]
    assert "w6 w7" not in chat.asked[0]
    assert {use.passage: (use.kept, use.text) for use in answer.uses} == {
        "none": (False, ""),
        "one": (True, "w2 w1 w4 w5 ."),
        "all": (True, "w3 w1 w4 w7 . w1 w8 w9 w2 . w1 w4 w5 w6 ."),
    }
    assert answer.uses[0].reason.endswith("; 0 of 1 sentences kept, so it is left out")
    assert answer.uses[1].reason.endswith("; 1 of 2 sentences kept")
    assert answer.details["shown"] == ["all", "one"]
    assert answer.details["dropped"] == {"none": ["w5 w6 w7 w8 ."], "one": ["w6 w7 w8 w9 ."]}
    assert answer.details["scores"]["all"] > answer.details["scores"]["one"]
    gone, whole = 13 + 14, 13 + 27 + 45  # characters, blanks between sentences among them
    assert answer.details["compression"] == pytest.approx(100 * gone / whole)
    assert solving.step.facts["compression of the passages, percent"] == [round(100 * gone / whole, 1)]
    rows = {row[0]: row[1:] for row in solving.step.tables[0].rows}
    assert rows[0.5] == [
        pytest.approx(71.4, abs=0.05),
        round(100 * gone / whole, 1),
    ]  # 5 of 7, with the title
    assert [rows[t][0] for t in sorted(rows)] == sorted((row[0] for row in rows.values()), reverse=True)


def test_only_the_best_are_shown_and_the_others_say_so(parts):
    chat = replying("w9")
    answer = solve_one(provence(parts, most=1), chat, ask(*PASSAGES))
    assert kept_ids(answer) == ["all"]
    assert answer.uses[1].reason.endswith("; other passages score better")
    assert (
        answer.details["compression"]
        == solve_one(provence(parts), chat, ask(*PASSAGES)).details["compression"]
    )


def test_where_nothing_is_left_the_question_is_asked_alone(parts):
    chat = replying("w9")
    answer = solve_one(provence(parts), chat, ask(PASSAGES[0], Passage("empty", " ")))
    assert "w5" not in chat.asked[0]
    assert chat.asked[0].startswith("w40 ?")
    assert answer.details["shown"] == []
    assert len(answer.uses) == 2
    assert answer.details["compression"] == 100


def test_a_trained_pruner_is_left_in_the_result_and_opens_again(parts, tmp_path):
    made = fact_parts.make(tmp_path / "facts", known=3, forgotten=1, refusing=0)
    passages = [{"text": PASSAGES[n].text, "kind": kind} for n, kind in ((1, "right"), (0, "irrelevant"))]
    row = {"question": "w40 ?", "answer": "w9", "passages": passages}
    write_jsonl([row], tmp_path / "questions.jsonl")
    arguments = {"model": str(made.model), "questions": str(tmp_path / "questions.jsonl"), "cache": False}
    learned = {
        "pruner": str(parts / "base"), "labelled": str(parts / "labelled.jsonl"), "threshold": 0.5,
        "learning_rate": 1e-2, "epochs": 6, "batch_size": 16,
    }  # fmt: skip
    first = run_task("ground", "provence", {**arguments, "distractors": [0, 1]}, learned, tmp_path / "a")
    again = {"pruner": str(first.folder / "pruner"), "threshold": 0.5}
    second = run_task("ground", "provence", {**arguments, "distractors": [0, 1]}, again, tmp_path / "b")
    texts = [(result.folder / "answers.jsonl").read_text() for result in (first, second)]
    assert texts[0] == texts[1]
    assert len(first.evidence.steps[0].facts["compression of the passages, percent"]) == 2
    assert json.loads(texts[0].splitlines()[0])["uses"][0]["text"] == "w2 w1 w4 w5 ."


# --- What is refused


def test_a_model_without_a_token_head_is_refused_unless_it_is_trained(parts):
    with pytest.raises(CheckpointError, match="has no token_classifier, so it cannot prune"):
        provence(parts, pruner=str(parts / "base")).check_questions([ask(*PASSAGES)], [])
    labelled = str(parts / "labelled.jsonl")
    provence(parts, pruner=str(parts / "base"), labelled=labelled).check_questions([ask(*PASSAGES)], [])


def test_a_pruner_of_an_unknown_kind_and_a_damaged_one_are_refused(published, tmp_path):
    config = json.loads((published / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"other.w": torch.zeros(1), **head()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a pruner of an unknown kind, Provence"):
        load(tmp_path)
    left = {name: value for name, value in tensors().items() if name != "pooler.dense.bias"}
    save_file(left, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 'pooler.dense.bias'"):
        load(tmp_path)


def head() -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors().items() if name.startswith("token_classifier")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "has no text in field 'question'"),
        ({"sentences": "w1 ."}, "'sentences' must be a list of texts"),
        ({"sentences": []}, "'sentences' must be a list of texts"),
        ({"cited": [2]}, "'cited' must be a list of numbers from 0 to 1"),
        ({"cited": [True]}, "'cited' must be a list"),
        ({"cited": None}, "'cited' must be a list"),
        ({"score": None}, "set rank_weight to 0"),
        ({"score": math.inf}, "'score' must be a number"),
    ],
)
def test_bad_labelled_records_are_refused_before_work(parts, change, message, tmp_path):
    row = {"question": "w40", "sentences": ["w1 .", "w2 ."], "cited": [1], "score": 0.5, **change}
    write_jsonl([row], tmp_path / "rows.jsonl")
    method = provence(parts, labelled=str(tmp_path / "rows.jsonl"))
    with pytest.raises(RecordsError, match=message):
        method.check_questions([ask(*PASSAGES)], [])


def test_scores_are_not_needed_where_they_are_not_learned(tmp_path):
    write_jsonl(
        [{"question": "a", "title": "T", "sentences": ["b"], "cited": [1]}], tmp_path / "rows.jsonl"
    )
    (row,) = read_labelled_passages(str(tmp_path / "rows.jsonl"), scored=False)
    assert math.isnan(row.score)
    assert row.text == Text(("T", "b"), titled=True)
