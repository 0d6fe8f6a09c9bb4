"""What distracting sentences cost, and which part of it is due to order or to any text."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from germane.core.choices import Choice
from germane.core.errors import RecordsError
from germane.core.records import Data, read_rows, write_jsonl
from germane.method import build
from germane.recipe import run_task
from germane.tasks.evaluate.contextual_distraction import (
    DISTRACTION,
    ORIGINAL,
    REORDERED,
    UNRELATED,
    WARNED,
    WARNED_ORIGINAL,
    all_scores,
    by_order,
    read_items,
    with_others,
)

JOBS = ("baker", "pilot", "nurse")


def row(number: int, **changes):
    return {
        "id": f"q{number}", "source": "people", "question": f"before {number} what is {number} ? after {number}",
        "options": ["b", "a"], "answer": "a", "original": f"what is {number} ?", "original options": ["a", "b"],
        **changes,
    }  # fmt: skip


def read(folder, rows, name="distracted.jsonl"):
    file = folder / name
    write_jsonl(rows, file)
    return read_items(Data(name="distracted", path=str(file)))


def test_the_first_distraction_of_each_question_is_read(tmp_path):
    rows = [row(1), row(1, question="what is 1 ? second"), row(2), row(1, source="others")]
    items = read(tmp_path, rows)
    assert [(item.source, item.id) for item in items] == [
        ("people", "q1"),
        ("people", "q2"),
        ("others", "q1"),
    ]
    assert items[0].distracted.text == "before 1 what is 1 ? after 1"
    assert items[0].original.options == ("a", "b")
    assert items[0].distracted.options == ("b", "a")
    assert items[0].added == ("before 1 ", " after 1")


def test_the_official_files_are_read_without_what_was_never_answered(tmp_path):
    base = {"question": "q ?", "choices": ["a", "b"], "answer": "a", "source": "MMLU"}
    good = {"ori_question": "q ?", "choices": ["b", "a"], "ground_truth": "a", "rate": 0.0}
    rows = [
        {**base, "good_questions": [{**good, "question": "q ? s"}, {**good, "question": "t q ?"}]},
        {**base, "good_questions": [{**good, "question": "q ?"}]},
        {**base, "good_questions": []},
    ]
    (item,) = read(tmp_path, rows)
    assert (item.source, item.id, item.distracted.text) == ("MMLU", "1", "q ? s")
    assert (item.original.options, item.distracted.options) == (("a", "b"), ("b", "a"))


def test_the_sentences_of_the_next_other_question_are_the_control(tmp_path):
    items = read(tmp_path, [row(1), row(2), row(3, question="what was 3 ? changed")])
    texts = [question.text for question in with_others(items)]
    assert texts[0] == "before 2 what is 1 ? after 2"
    assert texts[1] == "before 1 what is 2 ? after 1"
    assert texts[2] == "before 1 what is 3 ? after 1"
    assert with_others(items[:1]) == [None]
    assert all(question.options == ("b", "a") for question in with_others(items))


def answered(items, **ways):
    """Items answered rightly, or not, in ways given as strings of 1 and 0."""
    names = {
        "original": ORIGINAL, "reordered": REORDERED, "unrelated": UNRELATED, "distracted": DISTRACTION,
        "warned_original": WARNED_ORIGINAL, "warned": WARNED,
    }  # fmt: skip
    for way, marks in ways.items():
        for item, mark in zip(items, marks, strict=True):
            item.choices[names[way]] = Choice({}, ("a" if mark == "1" else "b",), ("",))
    return {score.metric: score for score in all_scores("result", "distracted", items)}


def test_accuracies_and_drops_by_hand(tmp_path):
    """Originals 3 of 4, distracted 1 of 4: a drop of 0.5; with a warning 4 and 2 of 4."""
    rows = [row(1), row(2), row(3, source="others"), row(4, source="others")]
    scores = answered(
        read(tmp_path, rows), original="1110", reordered="1100", unrelated="1110", distracted="0001",
        warned_original="1111", warned="0011",
    )  # fmt: skip
    assert scores["accuracy, original"].value == 0.75
    assert scores["accuracy, distracted"].value == 0.25
    assert scores["drop"].value == 0.5
    assert scores["drop by order alone"].value == 0.25
    assert scores["drop by another question's sentences"].value == 0.0
    assert scores["drop, warned"].value == 0.5
    assert scores["drop, people"].value == 1.0
    assert scores["drop, others"].value == 0.0
    assert scores["drop"].low <= 0.5 <= scores["drop"].high
    assert not scores["drop"].higher_is_better


@pytest.mark.parametrize(
    ("reordered", "unrelated", "findings"), [("11", "11", 0), ("01", "11", 1), ("01", "10", 2)]
)
def test_a_drop_that_is_not_by_content_is_said(tmp_path, reordered, unrelated, findings):
    items = read(tmp_path, [row(1), row(2)])
    scores = answered(items, original="11", reordered=reordered, unrelated=unrelated, distracted="00")
    assert len(by_order("result", list(scores.values()))) == findings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"original": None}, "record 1: needs texts in fields 'question' and 'original'"),
        ({"options": ["b"]}, "needs a list 'options' of two or more texts that holds 'answer'"),
        ({"answer": "c"}, "that holds 'answer'"),
        ({"question": "what is 1 ?"}, "no record is a distraction"),
    ],
)
def test_bad_records_are_refused(tmp_path, changes, message):
    with pytest.raises(RecordsError, match=message):
        read(tmp_path, [row(1, **changes)])


def test_a_model_that_knows_is_measured_in_every_way(facts, tmp_path):
    """The choice is the option likeliest per token, worked out here with transformers alone."""
    known = [r for r in fact_rows(facts) if r["attribute"] == "job"][:3]
    rows = [
        {
            "id": r["subject"], "question": f"{r['prompt']} anna owns a cat", "original": r["prompt"],
            "options": list(JOBS), "answer": "baker",
        }
        for r in known
    ]  # fmt: skip
    write_jsonl(rows, tmp_path / "d.jsonl")
    arguments = {"model": str(facts.model), "data": [f"distracted={tmp_path / 'd.jsonl'}"]}
    result = run_task("evaluate", "contextual-distraction", arguments, {}, tmp_path / "out")
    items = [*map(json.loads, (tmp_path / "out" / "items-result.jsonl").read_text().splitlines())]
    suite = build("evaluate/contextual-distraction", {})
    (item, *_) = read_items(Data(name="d", path=str(tmp_path / "d.jsonl")))
    for way, question, note in (
        (ORIGINAL, item.original, ""), (DISTRACTION, item.distracted, ""), (WARNED, item.distracted, suite.warning),
    ):  # fmt: skip
        assert items[0]["picks"][way] == likeliest(facts.model, suite.prompt(question, note))
    assert {score.metric for score in result.scores} >= {"accuracy, original", "drop", "drop, warned"}
    without = run_task("evaluate", "contextual-distraction", arguments, {"warning": ""}, tmp_path / "again")
    assert not any("warned" in score.metric for score in without.scores)


def fact_rows(facts):
    return read_rows(Data(name="retain", path=str(facts.files["retain"])))


def likeliest(folder, prompt: str) -> str:
    """The option with the highest mean log-probability of a token after the prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = tokenizer(f"{prompt}\n")["input_ids"]
    found = {}
    for option in JOBS:
        tokens = tokenizer(option, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*start, *tokens]])).logits[0, len(start) - 1 : -1].log_softmax(-1)
        found[option] = float(logits.gather(1, torch.tensor(tokens)[:, None]).mean())
    assert all(map(math.isfinite, found.values()))
    return max(found, key=found.__getitem__)
