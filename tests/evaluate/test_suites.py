"""The suites on numbers worked out by hand, on the official code's, and on models known to differ."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo  # noqa: F401 - sets threads and quiet
from transformers import AutoModelForCausalLM

from germane.core.errors import RecordsError, SettingError
from germane.core.evidence import Score, Step
from germane.core.generation import continue_texts
from germane.core.membership import area, min_k
from germane.core.models import Loaded, load_model
from germane.core.objective import token_losses
from germane.core.records import Data, write_jsonl
from germane.core.rows import RowClassifier, RowConfig
from germane.embedded import digits as digit_parts
from germane.method import build
from germane.recipe import run_task
from germane.tasks.evaluate.muse import Item, cut, leak, leak_scores, rouge_l, shorten
from germane.tasks.evaluate.unlearned_classifier import average_gap, non_members

FIXTURES = Path(__file__).parent.parent / "fixtures"
OFFICIAL = json.loads((FIXTURES / "muse.json").read_text())
ATTACK = json.loads((FIXTURES / "svc_mia.json").read_text())
# The tiny model reads words, and never saw examples in its context.
PLAIN = {"examples": 0, "question": "{question}", "verbatim_tokens": 32}


def values(result) -> dict[tuple[str, str], float]:
    return {(score.subject, score.metric): score.value for score in result.scores}


def step() -> Step:
    return Step(task="evaluate", method="a suite")


# --- MUSE, by hand and beside the official code


def test_rouge_l_is_the_longest_common_subsequence():
    # "the cat on mat" of 6 and 6 words: precision = recall = 4/6; "the" once more would break the order.
    assert rouge_l("the cat sat on the mat", "the cat lay on a mat") == pytest.approx(4 / 6)
    # 2 of 3 words asked for, 2 of 5 written.
    assert rouge_l("red green blue", "Red, x y green z") == pytest.approx(
        2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5)
    )
    assert rouge_l("running", "runs") == 0.0  # no stemming
    assert rouge_l("something", "") == 0.0


def test_rouge_l_equals_the_official():
    ours = [rouge_l(reference, written) for reference, written in OFFICIAL["rouge"]["pairs"]]
    assert ours == pytest.approx(OFFICIAL["rouge"]["rouge_l"], abs=1e-5)
    assert np.mean(ours) == pytest.approx(OFFICIAL["rouge"]["mean"], abs=1e-5)


def test_min_k_is_the_mean_of_the_lowest():
    assert min_k(torch.tensor([-1.0, -5.0, -2.0, -4.0, -3.0])) == pytest.approx(-4.5)
    assert min_k(torch.tensor([-1.0, -3.0])) == pytest.approx(-3.0)  # 0.8 tokens are one


def test_min_k_and_the_area_equal_the_official():
    official = OFFICIAL["privleak"]
    table = torch.tensor(official["table"], dtype=torch.float64)
    found = {}
    for side, texts in official["texts"].items():
        found[side] = []
        for text in texts:
            tokens = torch.tensor([["abcdefg".index(letter) for letter in text]])
            losses, counted = token_losses(table[tokens], tokens)
            found[side].append(min_k(-losses[counted]))
        assert found[side] == pytest.approx([-value for value in official["min_40"][side]], abs=1e-5)
    assert area(found["forget"], found["holdout"]) == pytest.approx(official["auc"], abs=1e-5)


def test_the_area_equals_the_official_with_ties():
    pairs = list(zip(OFFICIAL["sweep"]["ppl"], OFFICIAL["sweep"]["labels"], strict=True))
    sides = [[-value for value, label in pairs if label == wanted] for wanted in (0, 1)]
    assert area(*sides) == pytest.approx(OFFICIAL["sweep"]["auc"], abs=1e-5)


def test_the_leak_by_hand():
    assert leak(0.0, 0.5) == -100
    assert leak(0.75, 0.5) == 50
    assert leak(0.4772, 0.4772) == 0
    signed, distance = leak_scores("result", "forget", (-20.0, -50.0, 10.0), 8)
    assert (signed.value, signed.low, signed.high) == (-20, -50, 10)
    assert (distance.value, distance.low, distance.high) == (20, 0, 50)
    assert not distance.higher_is_better
    assert leak_scores("result", "forget", (-90.0, -95.0, -80.0), 8)[1].low == 80


def test_a_text_is_cut_between_words():
    assert cut("one two  three four", 0.5) == ("one two", "  three four")
    assert cut("one two three", 0.1) == ("one", " two three")


# --- MUSE, questions and continuations


def test_examples_are_taken_from_the_end_and_not_asked(tmp_path):
    rows = [{"prompt": f"q{n}", "answer": f" a{n}"} for n in range(5)]
    write_jsonl(rows, tmp_path / "questions.jsonl")
    data = Data(name="forget-questions", path=str(tmp_path / "questions.jsonl"))
    items, count = build("evaluate/muse", {"examples": 2}).question_items(data)
    before = "Question: q3\nAnswer: a3\n\nQuestion: q4\nAnswer: a4\n\n"
    assert count == 2
    assert items == [Item(f"{before}Question: q{n}\nAnswer: ", f" a{n}") for n in range(3)]
    items, count = build("evaluate/muse", {"examples": 3, "items": 4}).question_items(data)
    assert (count, len(items)) == (0, 4)


def test_a_question_needs_its_place():
    with pytest.raises(SettingError, match=r"\{question\}"):
        build("evaluate/muse", {"question": "Question:"})


def test_texts_are_continued_the_same_alone_and_in_a_batch(facts):
    loaded = load_model(str(facts.model))
    prompts = ["what is the job of", "anna", "what is the pet of karla garcia ? cat dog", ""]
    together = continue_texts(loaded.model, loaded.processor, prompts, 12)
    alone = [continue_texts(loaded.model, loaded.processor, [prompt], 12)[0] for prompt in prompts]
    assert together == alone
    assert "<eos>" not in "".join(together)


def test_a_continuation_ends_before_a_stop_and_within_the_length(facts):
    loaded = load_model(str(facts.model))
    name = json.loads(facts.files["retain-texts"].read_text().split("\n")[0])["subject"]
    whole = continue_texts(loaded.model, loaded.processor, [name], 30)[0]
    assert whole.count(" .") > 1
    assert continue_texts(loaded.model, loaded.processor, [name], 30, [" ."])[0] == whole.split(" .")[0]
    assert len(continue_texts(loaded.model, loaded.processor, [name], 3)[0].split()) == 3


def test_a_long_prompt_loses_its_beginning_and_no_room_is_refused(facts):
    loaded = load_model(str(facts.model))
    question = json.loads(facts.files["retain"].read_text().split("\n")[0])
    long = "cat " * 100 + question["prompt"]
    kept = (long.split())[-118:]
    asked = [long, " ".join(kept)]
    first, second = continue_texts(loaded.model, loaded.processor, asked, 10)
    assert first == second
    with pytest.raises(SettingError, match="no room"):
        continue_texts(loaded.model, loaded.processor, ["cat"], 128)


def test_a_text_is_shortened_to_tokens(facts):
    tokenizer = load_model(str(facts.model)).processor
    assert shorten(tokenizer, "the cat likes soup", 2) == "the cat"


# --- MUSE, on models that differ


def muse(facts, out, kind="", settings=None, **changes):
    roles = {
        "forget": f"forget{kind}", "holdout": f"holdout{kind}",
        "forget-questions": "forget", "retain-questions": "retain",
    }  # fmt: skip
    arguments = {
        "model": str(facts.model), "retrained": str(facts.retrained), "base": str(facts.initial),
        "data": [f"{role}={facts.files[name]}" for role, name in roles.items()], **changes,
    }  # fmt: skip
    return run_task("evaluate", "muse", arguments, {**PLAIN, **(settings or {})}, out)


@pytest.mark.parametrize("kind", ["", "-texts"])
def test_muse_tells_the_model_that_knows_from_the_retrained_one(facts, tmp_path, kind):
    result = muse(facts, tmp_path / "out", kind)
    found = values(result)
    assert found["result", "VerbMem"] > 0.85
    assert found["retrained", "VerbMem"] < 0.4
    assert found["result", "KnowMem"] > 0.9
    assert found["retrained", "KnowMem"] < 0.4
    assert found["result", "KnowMem utility"] > 0.9
    assert found["retrained", "KnowMem utility"] > 0.9
    assert found["result", "PrivLeak (0 is ideal)"] < -80
    assert found["result", "PrivLeak distance from 0"] > 80
    assert found["retrained", "PrivLeak (0 is ideal)"] == pytest.approx(0)
    # Here the base is the model before any training: it has no utility, and nothing to forget.
    assert found["base", "KnowMem utility"] < 0.1
    assert found["base", "KnowMem"] < 0.1


def test_a_published_reference_goes_before_the_retrained_model(facts, tmp_path):
    result = muse(facts, tmp_path / "out", settings={"reference_auc": 0.4772}, base="")
    assert result.evidence.steps[0].facts["AUC of PrivLeak's reference"] == 0.4772
    assert values(result)["retrained", "PrivLeak (0 is ideal)"] != 0


def test_a_text_in_pieces_counts_once(facts, tmp_path):
    data = [
        {"name": name, "path": str(facts.files[f"{name}-texts"]), "max_tokens": 8}
        for name in ("forget", "holdout")
    ] + [f"forget-questions={facts.files['forget']}", f"retain-questions={facts.files['retain']}"]
    result = muse(facts, tmp_path / "out", data=data, base="")
    leaks = [score for score in result.scores if score.metric == "PrivLeak (0 is ideal)"]
    assert {score.n for score in leaks} == {8}


def test_questions_need_answers_and_both_sides_one_form(facts, tmp_path):
    texts = facts.files["forget-texts"]
    data = {
        role: f"{role}={facts.files['forget']}"
        for role in ("forget", "forget-questions", "retain-questions")
    }
    with pytest.raises(RecordsError, match="must be texts if the forget records are"):
        muse(facts, tmp_path / "out", data=[*data.values(), f"holdout={facts.files['holdout-texts']}"])
    data["forget-questions"] = f"forget-questions={texts}"
    with pytest.raises(RecordsError, match="record 1: forget-questions needs"):
        muse(facts, tmp_path / "out", data=[*data.values(), f"holdout={facts.files['holdout']}"])


def test_a_text_of_one_word_cannot_be_continued(facts, tmp_path):
    write_jsonl([{"text": "word"}], tmp_path / "short.jsonl")
    data = [f"{role}={facts.files['forget']}" for role in ("forget-questions", "retain-questions")]
    data += [f"{role}={tmp_path / 'short.jsonl'}" for role in ("forget", "holdout")]
    with pytest.raises(RecordsError, match="record 1: is too short to be continued"):
        muse(facts, tmp_path / "out", data=data)


def test_muse_refuses_a_classifier(facts, digits, tmp_path):
    with pytest.raises(Exception, match="measures language models"):
        muse(facts, tmp_path / "out", model=str(digits.model))


# --- Unlearned classifiers


@pytest.fixture
def sign(tmp_path):
    """A classifier that says 1 where x is positive, with probability sigmoid(|2 x|)."""
    model = RowClassifier(RowConfig(features=["x"], num_labels=2))
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model.classifier.bias.zero_()
    rows = {
        "forget": [(1.0, 1), (2.0, 0), (-1.0, 1), (-2.0, 1)],  # 1 of 4 is right
        "retain": [(2.0, 1), (3.0, 1), (-2.0, 0), (-3.0, 0), (2.5, 1)],  # all
        "test": [(0.1, 1), (-0.2, 0), (0.1, 0)],  # 2 of 3
    }
    records = {}
    for role, pairs in rows.items():
        write_jsonl([{"x": x, "label": label} for x, label in pairs], tmp_path / f"{role}.jsonl")
        records[role] = Data(name=role, path=str(tmp_path / f"{role}.jsonl"))
    return Loaded(model.eval(), None, tmp_path), records


def test_the_four_numbers_by_hand(sign):
    loaded, records = sign
    suite = build("evaluate/unlearned-classifier", {})
    measured = suite.score("result", loaded, records, None, step())
    found = {score.metric: score.value for score in measured.scores}
    assert found["unlearning accuracy"] == 3 / 4
    assert found["retain accuracy"] == 1
    assert found["test accuracy"] == pytest.approx(2 / 3)
    # Members have a confidence above 0.98, the others one of about a half; three forget records have
    # one of less than 0.13, the first one of 0.88, which is nearer to the members'.
    assert found["MIA efficacy"] == 3 / 4
    first = measured.items[0]
    assert first["confidence"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert (first["answer"], first["response"], first["score"], first["non_member"]) == (1, 1, 1.0, False)
    assert suite.score("again", loaded, records, found, step()).scores[-1].value == 0


def test_few_members_are_said_once(sign):
    loaded, records = sign
    swapped = {**records, "retain": records["test"], "test": records["retain"]}
    suite, seen = build("evaluate/unlearned-classifier", {}), step()
    for subject in ("result", "base"):
        suite.score(subject, loaded, swapped, None, seen)
    assert [finding.code for finding in seen.findings] == ["few-members"]


def test_separable_confidences_are_told_apart_and_equal_ones_are_not():
    generator = np.random.default_rng(0)
    members, others = (generator.uniform(*ends, 80).astype(np.float32) for ends in ((0.9, 1), (0, 0.5)))
    assert not non_members(members, others, members).any()
    assert non_members(members, others, others).all()
    same = [generator.uniform(0, 1, 400).astype(np.float32) for _ in range(3)]
    assert 0.2 < non_members(*same).mean() < 0.8


@pytest.mark.parametrize("case", ATTACK["cases"])
def test_the_attack_equals_the_official(case):
    sides = [np.array(case[name], dtype=np.float32) for name in ("members", "others", "forget")]
    assert non_members(*sides).mean() == pytest.approx(case["efficacy"], abs=1e-5)


def test_the_average_gap_by_hand():
    scores = [
        Score(
            subject="result", task="t", metric=metric, value=value, n=10, low=value - 0.1, high=value + 0.1
        )
        for metric, value in (("a", 0.5), ("b", 0.9))
    ]
    gap = average_gap("result", scores, {"a": 0.8, "b": 0.85})
    assert gap.value == pytest.approx((0.3 + 0.05) / 2)
    assert gap.low == pytest.approx((0.2 + 0) / 2)
    assert gap.high == pytest.approx((0.4 + 0.15) / 2)
    assert not gap.higher_is_better


def test_the_suite_tells_the_untouched_classifier_from_the_retrained_one(digits, tmp_path):
    from germane.core.records import read_rows

    kept = read_rows(Data(name="retain", path=str(digits.files["retain"])))
    retrained = digit_parts.train(kept, tmp_path / "retrained")
    arguments = {
        "model": str(digits.model), "retrained": str(retrained),
        "data": [f"{role}={digits.files[role]}" for role in ("forget", "retain", "test")],
    }  # fmt: skip
    found = values(run_task("evaluate", "unlearned-classifier", arguments, {}, tmp_path / "out"))
    assert found["result", "unlearning accuracy"] < 0.05
    assert found["retrained", "unlearning accuracy"] == 1
    assert found["retrained", "MIA efficacy"] > 0.9
    assert found["retrained", "average gap"] == 0
    assert found["result", "average gap"] > 0.2


def test_random_weights_are_no_language_model(facts, tmp_path):
    """Random weights forget everything; the utility shows at which cost."""
    torch.manual_seed(3)
    loaded = load_model(str(facts.model))
    random = AutoModelForCausalLM.from_config(loaded.model.config)
    Loaded(random, loaded.processor, loaded.folder).save(tmp_path / "random")
    found = values(muse(facts, tmp_path / "out", model=str(tmp_path / "random"), base=str(facts.model)))
    assert found["result", "KnowMem utility"] < 0.1
    assert found["result", "VerbMem"] < 0.1
    assert found["base", "KnowMem utility"] > 0.9
