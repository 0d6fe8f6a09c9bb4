"""Sums in other bases, where noise is put, and what it says; beside the official builder."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from germane.core.errors import RecordsError
from germane.core.evidence import Step
from germane.core.records import Data, write_jsonl
from germane.method import build
from germane.tasks.synthesize.nora import facts, noise, places, sentences, thoughts, written

OFFICIAL = json.loads((Path(__file__).parents[1] / "fixtures" / "cd_cot.json").read_text())


def test_the_sums_that_mislead_are_the_official_ones():
    for case in OFFICIAL["inaccurate"]:
        generator = random.Random(case["seed"])
        steps = thoughts(*case["expression"].split("+"), case["base"])
        wanted = places(8, case["ratio"], "fixed", generator)
        assert wanted == case["places"]
        put = noise(steps, wanted, "inaccurate", case["base"], generator)
        assert [[int(n) for n in re.findall(r"\d+", text)] for text in put.values()] == case["sums"]
        assert steps[-1].text == f"So the sum is {case['answer']}."


def test_sums_in_base_eleven_have_the_official_answers():
    for expression, answer in OFFICIAL["labels of base 11"]:
        assert thoughts(*expression.split("+"), 11)[-1].text == f"So the sum is {answer}."


def test_a_sum_by_hand():
    """47 + 58 in base 9: 7 + 8 = 15 = 1 * 9 + 6; 4 + 5 + 1 = 10 = 1 * 9 + 1; so 116."""
    steps = thoughts("47", "58", 9)
    assert [step.number for step in steps] == [9, 15, 8, 6, 10, 1, 1, 6]
    assert "more than 8" in steps[2].text
    assert "not more than 8" in thoughts("13", "24", 9)[2].text
    assert [written(n, 11) for n in (0, 10, 11, 131)] == ["0", "A", "10", "10A"]


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.3, 2), (0.5, 4), (0.8, 6), (1.0, 8)])
def test_a_share_of_the_eight_thoughts_is_followed_by_noise(ratio, count):
    assert len(places(8, ratio, "fixed", random.Random(0))) == count


def test_short_reasoning_gets_noise_too_and_random_placement_is_a_share_on_average():
    assert len(places(1, 0.3, "fixed", random.Random(0))) == 1
    generator = random.Random(0)
    counts = [len(places(8, 0.5, "random", generator)) for _ in range(500)]
    assert 3.8 < sum(counts) / 500 < 4.2
    assert len(set(counts)) > 4


def test_facts_about_numbers_are_true_and_not_repeated():
    assert "The square of 9 is 81." in facts(9)
    assert {"9 is a square number.", "9 is no prime number."} <= set(facts(9))
    assert "A polygon with 5 corners has 5 diagonals." in facts(2)
    assert "2 is a prime number." in facts(2)
    assert "0 is no prime number." in facts(0)
    steps = thoughts("44", "44", 9)  # eight, over and over
    for seed in range(20):
        put = noise(steps, range(8), "irrelevant", 9, random.Random(seed))
        assert len(set(put.values())) == 8


def make(records=None, chat=None, seed=0, **settings):
    step = Step(task="synthesize", method="nora")
    return build("synthesize/nora", settings).make(chat, records or {}, seed, step), step


@pytest.mark.parametrize("kind", ["irrelevant", "inaccurate"])
def test_the_files_hold_a_clean_demonstration_noisy_ones_and_other_questions(kind):
    made, step = make(base=11, noise=kind, ratio=0.8, shots=4, questions=30)
    shown, asked = made["demonstrations"], made["questions"]
    assert [row["clean"] for row in shown] == [True, False, False, False, False]
    assert [row["noisy thoughts"] for row in shown] == [0, 6, 6, 6, 6]
    assert step.tables[0].rows[1][1:] == [8, 6]
    for row in shown:
        assert row["solution"].endswith(f"So the sum is {row['answer']}.") or row["noisy thoughts"]
        left, right = row["id"].split("+")
        assert int(row["answer"], 11) == int(left, 11) + int(right, 11)
        assert len(sentences(row["solution"])) == 8 + row["noisy thoughts"]
    assert len(asked) == 30
    assert not {row["id"] for row in asked} & {row["id"] for row in shown}
    assert make(base=11, noise=kind, ratio=0.8, shots=4, questions=30)[0] == made
    assert make(base=11, noise=kind, ratio=0.8, shots=4, questions=30, seed=1)[0] != made


class Writer:
    """Writes one sentence, over two lines."""

    def answer(self, conversations, settings=None):
        from germane.core.chat import Reply

        return [Reply("Cats\nsleep.", "stop", 1, 1, 0.0) for _ in conversations]


def test_noise_in_given_demonstrations_is_written_by_the_model(tmp_path):
    rows = [
        {"question": "a?", "answer": "1", "solution": "One. Two.", "id": "a"},
        {"question": "b?", "options": ["x", "y"], "answer": "y", "solution": "B is 2.5. So y.", "id": "b"},
    ]
    write_jsonl(rows, tmp_path / "shown.jsonl")
    records = {"demonstrations": Data(name="demonstrations", path=str(tmp_path / "shown.jsonl"))}
    made, _ = make(records, Writer(), ratio=1.0)
    first, second = made["demonstrations"]
    assert (first["solution"], first["clean"], first["origin"]) == ("One. Two.", True, "given")
    assert second["solution"] == "B is 2.5. Cats sleep. So y. Cats sleep."
    assert (second["answer"], second["options"]) == (["y"], ["x", "y"])
    assert second["origin"] == "given, with thoughts written by the model"
    assert set(made) == {"demonstrations"}


def test_demonstrations_without_reasoning_are_refused(tmp_path):
    write_jsonl([{"question": "a?", "answer": "1"}], tmp_path / "shown.jsonl")
    records = {"demonstrations": Data(name="demonstrations", path=str(tmp_path / "shown.jsonl"))}
    with pytest.raises(RecordsError, match="record 1: needs an answer, and its reasoning"):
        build("synthesize/nora", {}).check_records(records)
