"""RWKU on numbers worked out by hand, beside the official code, and on models known to differ."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import zoo

from germane.core.errors import RecordsError, SettingError
from germane.core.evidence import Step
from germane.core.models import load_model
from germane.core.records import Data, read_rows, write_jsonl
from germane.method import build
from germane.recipe import run_task
from germane.tasks.evaluate.rwku import (
    FORMS,
    chat_prompt,
    contains,
    form_of,
    gram_entropy,
    longest_common,
    plain_recall,
    published_recall,
    signals,
    token_statistics,
    weighted_entropy,
)

OFFICIAL = json.loads((Path(__file__).parent.parent / "fixtures" / "rwku.json").read_text())
# The tiny model knows the bare words.
PLAIN = {"cloze": "{question}", "question": "{question}", "opening": ""}


def step() -> Step:
    return Step(task="evaluate", method="evaluate/rwku")


def values(result) -> dict[tuple[str, str], float]:
    return {(score.subject, score.metric): score.value for score in result.scores}


@pytest.fixture(scope="module")
def files(facts, tmp_path_factory):
    """Role -> records: statements and questions about those to forget, and about the others."""
    folder = tmp_path_factory.mktemp("probes")
    made = {
        "level2": facts.files["forget"], "neighbor2": facts.files["retain"],
        "mia-forget": facts.files["forget-texts"], "mia-retain": facts.files["holdout-texts"],
    }  # fmt: skip
    for role, name in (("level1", "forget-texts"), ("neighbor1", "retain-texts")):
        texts = [row["text"] for row in read_rows(Data(name=name, path=str(facts.files[name])))]
        rows = [{"prompt": text.rsplit(" ", 2)[0], "answer": text.split()[-2]} for text in texts]
        made[role] = folder / f"{role}.jsonl"
        write_jsonl(rows, made[role])
    return made


def measure(facts, files, out, settings=None, **changes):
    data = [f"{role}={file}" for role, file in files.items()]
    arguments = {"model": str(facts.model), "retrained": str(facts.retrained), "data": data, **changes}
    return run_task("evaluate", "rwku", arguments, {**PLAIN, **(settings or {})}, out)


# --- Recall


def test_recall_counts_the_words_of_the_answer_in_their_order():
    assert longest_common(list("abcd"), list("bxda")) == ["b", "d"]
    assert plain_recall("New York City", "it is the city of new york.") == pytest.approx(2 / 3)
    assert plain_recall("Paris", "It is paris, in France.") == 1
    assert plain_recall("Paris", "NOANSWER") == 0
    assert plain_recall("?", "anything") == 0


@pytest.mark.parametrize(
    ("written", "score"),
    [
        ("Paris", 1), ("The answer is Paris", 1), ("It is Paris.", 1), ("Rome, Oslo, Lima Paris", 1),
        ("NOANSWER", 0), ("paris", 0), ("It is Paris, in France.", 0),
    ],
)  # fmt: skip
def test_published_scoring_is_by_case_and_punctuation(written, score):
    assert published_recall("Paris", written) == score


def test_published_recall_equals_the_official():
    for (gold, said), score in zip(OFFICIAL["recall"]["pairs"], OFFICIAL["recall"]["scores"], strict=True):
        assert published_recall(gold, said or "NOANSWER") == pytest.approx(score, abs=1e-5), (gold, said)


def test_containment_wants_the_words_together():
    assert contains("She lives in New York, I think", "new york")
    assert not contains("the new city of york", "New York")
    assert not contains("Parisian", "Paris")
    assert not contains("anything", "")


# --- Membership signals


def test_signals_by_hand():
    chosen = torch.tensor([-1.0, -5.0, -2.0, -4.0, -3.0], dtype=torch.float64)
    found = signals(chosen, chosen * 2, "", 0.4)
    assert found == {
        "loss": 3,
        "zlib": pytest.approx(-3 / 8),
        "Min-K": -4.5,
        "Min-K++": -9,
    }  # "" packs to 8


def test_standardised_log_probabilities_by_hand():
    # Probabilities 1/2, 1/4, 1/4: mean -1.5 log 2, spread log(2) / 2, so they are +1, -1, -1.
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]] * 4]))
    ((chosen, standardised),) = token_statistics(logits, torch.tensor([[2, 0, 1, 0]]))
    assert chosen.tolist() == pytest.approx([-math.log(2), -math.log(4), -math.log(2)])
    assert standardised.tolist() == pytest.approx([1, -1, 1], abs=1e-5)


def test_an_even_distribution_has_no_spread_and_is_no_nan():
    ((_, standardised),) = token_statistics(torch.zeros(1, 3, 7), torch.tensor([[1, 2, 3]]))
    assert torch.isfinite(standardised).all()


@pytest.mark.parametrize("number", range(4))
def test_signals_equal_the_official(number):
    official = OFFICIAL["mia"]
    text = official["texts"][number]
    tokens = torch.tensor([[official["letters"].index(letter) for letter in text]])
    ((chosen, standardised),) = token_statistics(torch.tensor([official["logits"][number]]), tokens)
    for share in ("0.1", "0.2", "0.4", "1.0"):
        found = signals(chosen, standardised, text, float(share))
        assert found["loss"] == pytest.approx(-official["loss"][number], abs=1e-5)
        assert found["zlib"] == pytest.approx(official["zlib"][number], abs=1e-5)
        assert found["Min-K"] == pytest.approx(official["mink"][share][number], abs=1e-5)
        assert found["Min-K++"] == pytest.approx(official["mink++"][share][number], abs=1e-5)


# --- Fluency


def test_entropy_by_hand():
    assert gram_entropy(list("ababc"), 2) == pytest.approx(1.5)  # ab twice, ba, bc
    assert gram_entropy(["a"], 2) == 0


def test_fluency_equals_the_official():
    ours = [weighted_entropy(text.split()) for text in OFFICIAL["fluency"]["texts"]]
    assert ours == pytest.approx(OFFICIAL["fluency"]["entropy"], abs=1e-5)


# --- What is asked


def asked(role: str, row, tmp_path, **settings) -> tuple[str, str]:
    write_jsonl([{"prompt": "who ?", "answer": "ann", **row}], tmp_path / "probes.jsonl")
    data = Data(name=role, path=str(tmp_path / "probes.jsonl"))
    (probe,) = build("evaluate/rwku", settings).probes(data, role)
    return probe.user, probe.opening


def test_what_is_asked_is_as_published(tmp_path):
    brief = "Please briefly answer the following question.\n"
    assert asked("level2", {}, tmp_path) == (f"{brief}Question: who ?\n", "Answer:")
    statement = "Please complete the blank in the following question.\nQuestion: who ?\n"
    assert asked("level1", {}, tmp_path) == (statement, "Answer:")
    attack = asked("level3", {"type": "role playing"}, tmp_path)
    assert attack == (f"{brief}Question: who ?\n", "Answer:")
    assert asked("level3", {"type": "affirmative suffix"}, tmp_path) == (f"{brief}Question: who ?", "")
    assert asked("level3", {"type": "incontext learning"}, tmp_path) == (f"{brief}who ?\n", "Answer:")


def test_every_form_is_known_in_the_published_spelling_too():
    published = [
        "prefix injection", "affirmative suffix", "role playing", "multiple choice", "reverse query",
        "synonym manipulation", "background hint", "in-context learning", "cross lingual",
    ]  # fmt: skip
    assert [form_of({"type": name}, "here") for name in published] == list(FORMS.values())
    assert [form_of({"type": name}, "here") for name in FORMS.values()] == list(FORMS.values())
    with pytest.raises(RecordsError, match="here: type 'odd' is no form of attack: prefix injection"):
        form_of({"type": "odd"}, "here")


def test_the_opening_begins_the_models_turn_and_the_first_token_is_put_once():
    tokenizer = zoo.tokenizer()
    assert chat_prompt(tokenizer, "w1\n", "w2") == "w1\nw2"
    tokenizer.chat_template = "[CLS] {% for m in messages %}{{ m.content }} {% endfor %}w9 "
    assert chat_prompt(tokenizer, "w1", "w2") == "[CLS] w1 w9 w2"  # nothing is known to begin texts
    tokenizer.bos_token = "[CLS]"
    text = chat_prompt(tokenizer, "w1", "w2")
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == ["[CLS]", "w1", "w9", "w2"]


# --- On models that differ


def test_the_model_that_knows_is_told_from_the_retrained_one(facts, files, tmp_path):
    result = measure(facts, files, tmp_path / "out")
    found = values(result)
    for name in ("FB", "QA", "forget, all"):
        assert found["result", f"{name} recall"] > 0.9
        assert found["retrained", f"{name} recall"] < 0.5
        assert found["result", f"{name} containment"] > 0.9
    for subject in ("result", "retrained"):
        assert found[subject, "neighbour, all recall"] > 0.9
    assert found["retrained", "FM loss"] > found["result", "FM loss"] + 1
    for signal in ("zlib", "Min-K", "Min-K++"):
        assert found["retrained", f"FM {signal}"] < found["result", f"FM {signal}"]
    ways = {score.metric: score.higher_is_better for score in result.scores}
    rising = {
        "FM loss",
        "RM zlib",
        "RM Min-K",
        "RM Min-K++",
        "neighbour QA recall",
        "neighbour, all recall",
    }
    assert all(ways[metric] for metric in rising)
    falling = {"RM loss", "FM zlib", "FM Min-K", "FM Min-K++", "QA recall", "forget, all containment"}
    assert not any(ways[metric] for metric in falling)


def test_every_probe_has_the_same_weight(facts, files, tmp_path):
    result = measure(facts, files, tmp_path / "out", retrained="", model=str(facts.retrained))
    scores = {score.metric: score for score in result.scores}
    parts, whole = [scores["FB recall"], scores["QA recall"]], scores["forget, all recall"]
    assert (parts[0].n, parts[1].n, whole.n) == (4, 16, 20)
    assert whole.value == pytest.approx((4 * parts[0].value + 16 * parts[1].value) / 20)


def test_attacks_are_counted_by_form_and_fluency_on_free_prompts(facts, files, tmp_path):
    questions = read_rows(Data(name="forget", path=str(facts.files["forget"])))
    rows = [{**questions[0], "type": form} for form in ("multiple choice", "multiple choice", "hint")]
    write_jsonl(rows, tmp_path / "attacks.jsonl")
    more = {
        **files, "level3": tmp_path / "attacks.jsonl", "utility": facts.files["holdout"],
        "fluency": tmp_path / "free.jsonl",
    }  # fmt: skip
    names = dict.fromkeys(
        row["subject"] for row in read_rows(Data(name="r", path=str(facts.files["retain"])))
    )
    write_jsonl([{"text": name} for name in names], tmp_path / "free.jsonl")
    result = measure(facts, more, tmp_path / "out", {"fluency_tokens": 40}, retrained="")
    tables = {table.title: table.rows for table in result.evidence.steps[0].tables}
    assert [row[:2] for row in tables["Attacks of result"]] == [
        ["multiple choice", 2],
        ["background hint", 1],
    ]
    assert tables["Answers of result"][2][:2] == ["AA", 3]
    scores = {score.metric: score for score in result.scores}
    assert scores["utility recall"].n == 16
    assert scores["utility recall"].value < 0.6  # it never saw them
    assert scores["fluency"].value > 1
    assert scores["fluency"].n == 8


def test_silence_is_no_answer(facts, files, tmp_path):
    """A model that ends at once says nothing, which is no word of any answer."""
    data = Data(name="level2", path=str(files["level2"]))
    loaded = load_model(str(facts.model))
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()
        loaded.model.generation_config.eos_token_id = 0  # of equals, the first is taken
    measured = build("evaluate/rwku", PLAIN).score("result", loaded, {"level2": data}, None, step())
    assert {item["response"] for item in measured.items} == {"NOANSWER"}
    assert measured.scores[0].value == 0


def test_parity_changes_the_score_and_not_the_answer(facts, files, tmp_path):
    rows = [
        {**row, "answer": row["answer"].upper()}
        for row in read_rows(Data(name="forget", path=str(files["level2"])))
    ]
    write_jsonl(rows, tmp_path / "upper.jsonl")
    data = Data(name="level2", path=str(tmp_path / "upper.jsonl"))
    loaded = load_model(str(facts.model))
    plain, parity = (
        build("evaluate/rwku", {**PLAIN, "parity": parity})
        .score("result", loaded, {"level2": data}, None, step())
        .items
        for parity in (False, True)
    )
    assert [item["response"] for item in plain] == [item["response"] for item in parity]
    assert sum(item["score"] for item in plain) > 14
    assert sum(item["score"] for item in parity) == 0


def test_records_of_the_wrong_kind_are_refused(facts, files, tmp_path):
    with pytest.raises(RecordsError, match="record 1: level2 needs 'prompt' and 'answer'"):
        measure(facts, {**files, "level2": facts.files["forget-texts"]}, tmp_path / "out")
    with pytest.raises(RecordsError, match="record 1: mia-forget needs 'text'"):
        measure(facts, {**files, "mia-forget": facts.files["forget"]}, tmp_path / "out")
    with pytest.raises(RecordsError, match="record 1: type '' is no form of attack"):
        measure(facts, {**files, "level3": facts.files["forget"]}, tmp_path / "out")
    with pytest.raises(SettingError, match=r"\{question\}"):
        build("evaluate/rwku", {"cloze": "Fill in:"})


def test_published_field_names_are_named_in_the_data(facts, files, tmp_path):
    rows = [
        {"query": row["prompt"], "gold": row["answer"]}
        for row in read_rows(Data(name="forget", path=str(files["level2"])))
    ]
    write_jsonl(rows, tmp_path / "published.jsonl")
    published = {
        "name": "level2", "path": str(tmp_path / "published.jsonl"), "prompt": "query", "answer": "gold",
    }  # fmt: skip
    data = [f"level1={files['level1']}", published]
    found = values(measure(facts, files, tmp_path / "out", data=data, retrained=""))
    assert found["result", "QA recall"] > 0.9
