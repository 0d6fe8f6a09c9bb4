"""Confidence, filtering, earlier reasoning and costs, worked out by hand."""

from __future__ import annotations

import re

import pytest
from scripted_reader import Scripted

from germane.method import build
from germane.solver import Question, Solving
from germane.tasks.reason._chains import vote
from germane.tasks.reason.divide_and_conquer import Round, filtered, prior

COLOURS = ("red", "green", "blue", "grey")
SURE = Question("sure", "Which colour has grass?", ("green",), COLOURS)
TORN = Question("torn", "Which colour has the sea?", ("blue",), COLOURS)
# What is chosen in five rounds at first: one colour four times; or two and two, and once nothing.
FIRST = {"grass": "BBABB", "sea": "DC?CD"}


def rule(text, settings):
    """The first five by the table; then, with two options left, the last of them."""
    if settings.seed < 5:
        letter = FIRST["grass" if "grass" in text else "sea"][settings.seed]
        return f"I think so {settings.seed}.\nThe answer is {letter}." if letter != "?" else "Hard to say."
    return f"The answer is {re.findall(r'^([A-D])[.] ', text, flags=re.M)[-1]}."


def asked_again(ways):
    chat = Scripted(rule)
    solving = Solving(chat)
    answers = build("reason/divide-and-conquer", {"ways": ways}).solve(solving, [SURE, TORN])
    return chat, solving, answers


def of(question, *chosen):
    answers = list(chosen)
    replies = [f"chain {place}: {answer}" for place, answer in enumerate(answers)]
    return Round(question, replies, answers, vote(answers, question))


def test_only_what_is_unsure_is_asked_again_and_without_what_was_never_chosen():
    chat, solving, (sure, torn) = asked_again(["filter-choices"])
    assert chat.batches == [2] * 5 + [1] * 5
    assert (sure.text, sure.details["subset"], sure.details["confidence"]) == ("green", "sure", 0.8)
    assert torn.details["confidence"] == 0.4  # two of five: the reply without an answer counts
    assert torn.details["before"] == "grey"
    assert torn.details["options left"] == ["blue", "grey"]
    assert "A. blue\nB. grey\n" in chat.asked[-1][0]["content"]
    assert "red" not in chat.asked[-1][0]["content"]
    assert torn.text == "grey"  # what the rule says of B, mapped back
    table = solving.step.tables[0]
    assert table.rows == [["sure", 1, 1.0, 1.0, 1.0, 5], ["asked again", 1, 0.0, 0.0, 1.0, 10]]


def test_a_lost_option_cannot_come_back_and_the_table_says_so():
    chat = Scripted(lambda text, settings: f"The answer is {'AB'[settings.seed % 2]}.")
    solving = Solving(chat)
    method = build("reason/divide-and-conquer", {"samples": 2, "threshold": 0.5})
    answer = method.solve(solving, [TORN])[0]
    assert answer.details["options left"] == ["red", "green"]
    assert solving.step.tables[0].rows[1][4] == 0.0


def test_earlier_reasoning_holds_a_chain_of_the_majority_and_of_the_runner_up():
    text = prior(of(TORN, "grey", "", "blue", "blue", "red"))
    assert re.findall(r"chain \d", text) == ["chain 2", "chain 0"]
    assert prior(of(TORN, "", "")) == ""
    chat, _, _ = asked_again(["prior-knowledge"])
    said = chat.asked[-1][0]["content"]
    assert said.index("I think so 0.") < said.index("I think so 1.")
    assert "D. grey" in said


def test_both_at_once_and_one_after_the_other():
    chat, _, (_, torn) = asked_again(["both"])
    assert "I think so 1." in chat.asked[-1][0]["content"]
    assert torn.details["options left"] == ["blue", "grey"]
    chat, solving, (_, torn) = asked_again(["prior-knowledge", "filter-choices"])
    # The first way made it sure, all five said the last option, so the second is not taken.
    assert torn.details["ways"] == ["prior-knowledge"]
    assert solving.step.tables[0].rows[1][5] == 10


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        (("grey", "red", "red"), ("red", "grey")),
        (("grey", "grey", ""), COLOURS),  # one is no choice
        (("", "", ""), COLOURS),
    ],
)
def test_options_that_came_stay_in_their_order(chosen, left):
    assert filtered(of(TORN, *chosen)).options == left


def test_answers_to_an_open_question_become_its_options():
    asked = of(Question("o", "How many?", ("3",)), "3 eggs", "4", "3", "", "5")
    assert filtered(asked).options == ("3 eggs", "4", "5")
    assert filtered(of(Question("o", "How many?"), "3", "3")).options == ()


def test_the_threshold_itself_is_asked_again():
    method = build("reason/divide-and-conquer", {"threshold": 0.5})
    assert method.unsure(of(TORN, "red", "red", "blue", "grey"))
    assert not method.unsure(of(TORN, "red", "red", "red", "grey"))
