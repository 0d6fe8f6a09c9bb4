"""Questions, how their answers are judged, and how answers are read out of responses."""

from itertools import pairwise

import pytest

from germane.core.errors import RecordsError
from germane.core.records import Data, write_jsonl
from germane.solver import Question, chosen_option, is_right, read_answer, read_questions
from germane.tasks.ground._task import with_distractors

OPTIONS = ("Paris", "Rome", "Oslo")


@pytest.mark.parametrize(
    ("question", "text", "expected"),
    [
        (Question("1", "q", ("Paris",), OPTIONS), "paris", True),
        (Question("1", "q", ("Paris",), OPTIONS), "Rome", False),
        (Question("1", "q", ("1,200",)), "so 3 times 400 is $1200.", True),
        (Question("1", "q", ("12",)), "12 is wrong, it is 13", False),
        (Question("1", "q", ("12",)), "twelve", False),
        (Question("1", "q", ("the Beatles", "Fab Four")), "It was the fab four.", True),
        (Question("1", "q"), "anything", None),
    ],
)
def test_what_is_right(question, text, expected):
    assert is_right(question, text) is expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "Rome"),
        ("B. Rome", "Rome"),
        ("The answer is (C).", "Oslo"),
        ("A is wrong. The answer is B", "Rome"),
        ("I would say Oslo", "Oslo"),
        ("Paris or Rome", ""),
        ("A good question", ""),
        ("nothing", ""),
        ("", ""),
    ],
)
def test_which_option_is_chosen(response, expected):
    assert chosen_option(response, OPTIONS) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [("Paris", "Paris"), ("We think.\nThe answer is 42.\nBye", "42"), ('Answer: "Rome"', "Rome"), ("", "")],
)
def test_the_answer_in_a_response(response, expected):
    assert read_answer(response, Question("1", "q")) == expected


def read(rows, folder, **fields):
    write_jsonl(rows, folder / "q.jsonl")
    return read_questions(Data(name="q", path=str(folder / "q.jsonl"), **fields))


def test_questions_of_several_forms(tmp_path):
    rows = [
        {"question": "q1", "answer": ["a", "b"], "id": 7, "solution": "s"},
        {"input": "q2", "target": "B", "choices": ["x", "y"]},
        {
            "prompt": "q3",
            "answer": 1,
            "options": ["x", "y"],
            "passages": ["t", {"text": "u", "title": "v"}],
        },
        {"query": "q4"},
    ]
    one, two, three, four = read(rows, tmp_path)
    assert (one.id, one.answers, one.more["solution"]) == ("7", ("a", "b"), "s")
    assert two.answers == three.answers == ("y",)
    assert [(p.id, p.text, p.title) for p in three.passages] == [("1", "t", ""), ("2", "u", "v")]
    assert four.answers == ()
    assert two.lettered == "q2\nA. x\nB. y"


def test_distractors_grow_and_the_right_passages_stay(tmp_path):
    kinds = ["irrelevant", "right", "misleading", "irrelevant"]
    rows = [
        {
            "question": "q",
            "answer": "a",
            "passages": [{"text": str(n), "kind": k} for n, k in enumerate(kinds)],
        }
    ]
    (question,) = read(rows, tmp_path)
    for count in range(4):
        found = with_distractors(question, count, seed=1)
        assert sum(p.kind == "right" for p in found.passages) == 1
        assert sum(p.kind != "right" for p in found.passages) == count
        assert with_distractors(question, count, seed=1) == found
    texts = [{p.text for p in with_distractors(question, n, 1).passages} for n in range(4)]
    assert all(small < big for small, big in pairwise(texts))


def test_a_record_without_a_question_is_refused(tmp_path):
    with pytest.raises(RecordsError, match="record 1: has no text in field 'question'"):
        read([{"questio": "q"}], tmp_path)
