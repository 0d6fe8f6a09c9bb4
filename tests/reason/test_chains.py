"""Votes, answers and prompts of chains of thought, by hand; and the three methods that only use these."""

from __future__ import annotations

import pytest
from scripted_reader import Scripted

from germane.core.chat import ChatSettings
from germane.core.errors import RecordsError
from germane.method import build
from germane.solver import Question, Solving
from germane.tasks.reason._chains import Vote, conversation, sampled, stated, vote

OPEN = Question("q", "How many?", ("5",))
CHOICE = Question("c", "Which?", ("red",), ("red", "green", "10 cm", "10 m"))
SOLVED = Question("s", "One and one?", ("2",), more={"solution": "One and one make two."})


def test_numbers_agree_however_they_are_written():
    found = vote(["5 apples", "$5.00", "5.", "six", "1,005", ""], OPEN)
    assert found.answer == "5 apples"
    assert found.confidence == pytest.approx(3 / 6)  # the reply without an answer counts in the six
    assert found.counts == {"5 apples": 3, "six": 1, "1,005": 1}


@pytest.mark.parametrize(("one", "other"), [("1/2", "1/3"), ("10:30", "10:45"), ("8A", "8"), ("−5", "5")])
def test_what_only_begins_with_a_number_is_not_that_number(one, other):
    assert vote([one, other, other], OPEN).counts == {one: 1, other: 2}


def test_of_equally_frequent_answers_the_first_one_counts():
    assert vote(["b", "c", "c", "b"], OPEN).answer == "b"
    assert vote(["", ""], OPEN) == Vote("", 0.0, {})


def test_words_agree_but_for_articles_and_options_only_with_themselves():
    assert vote(["The cat", "cat.", "a dog"], OPEN).counts == {"The cat": 2, "a dog": 1}
    assert vote(["10 cm", "10 m", "10 m"], CHOICE).counts == {"10 cm": 1, "10 m": 2}


def test_a_chain_without_an_answer_states_none():
    assert stated("Two and three make five.\nThe answer is 5.", OPEN) == "5"
    assert stated("Two and three, then.", OPEN) == ""
    assert stated("So the answer is (B).", CHOICE) == "green"


def test_every_round_has_a_seed_of_its_own():
    chat = Scripted(lambda text, settings: f"The answer is {settings.seed}.")
    solving = Solving(chat, seed=3)
    prompts = [conversation(OPEN), conversation(OPEN)]
    found = sampled(solving, [OPEN, OPEN], prompts, "reason", ChatSettings(temperature=1.0), 2, first=5)
    assert [settings.seed for settings in chat.settings] == [3005, 3006]
    assert found == [["The answer is 3005.", "The answer is 3006."]] * 2
    assert chat.batches == [2, 2]


def test_few_shot_shows_answers_and_chain_of_thought_their_reasoning():
    chat = Scripted(lambda text, settings: "The answer is 5.")
    solved = Question("s", "Which?", ("green",), ("red", "green"))
    build("reason/few-shot", {}).solve(Solving(chat, [solved]), [OPEN])
    assert [message["role"] for message in chat.asked[0]] == ["user", "assistant", "user"]
    assert chat.asked[0][1]["content"] == "B"
    answers = build("reason/chain-of-thought", {}).solve(Solving(chat, [SOLVED]), [OPEN])
    assert chat.asked[1][1]["content"] == "One and one make two.\nThe answer is 2."
    assert answers[0].text == "5"


def test_only_a_chain_without_an_answer_is_asked_for_one():
    def rule(text, settings):
        if "final answer" in text:
            return "The answer is 7."
        return "The answer is 5." if "many" in text else "I wonder."

    chat = Scripted(rule)
    solving = Solving(chat)
    answers = build("reason/chain-of-thought", {}).solve(solving, [OPEN, Question("r", "How far?", ("7",))])
    assert [answer.text for answer in answers] == ["5", "7"]
    assert [(call["question"], call["purpose"]) for call in solving.calls] == [
        ("q", "reason"), ("r", "reason"), ("r", "extract"),
    ]  # fmt: skip
    assert [message["role"] for message in chat.asked[-1]] == ["user", "assistant", "user"]


def test_the_majority_of_the_samples_is_the_answer():
    said = [
        "The answer is 4.",
        "Hm.",
        "It is so.\nThe answer is 5 apples.",
        "The answer is 5.",
        "The answer is 4",
    ]
    chat = Scripted(lambda text, settings: said[settings.seed])
    answer = build("reason/self-consistency", {"samples": 4}).solve(Solving(chat), [OPEN])[0]
    assert answer.text == "5 apples"
    assert answer.response == said[2]
    assert answer.details == {"confidence": 0.5, "counts": {"4": 1, "5 apples": 2}}
    assert all(settings.temperature == 0.7 for settings in chat.settings)


def test_demonstrations_need_what_is_shown_of_them():
    bare = Question("d", "What?", ("x",), more={"note": "y"})
    build("reason/few-shot", {}).check_questions([OPEN], [bare])
    with pytest.raises(RecordsError, match="demonstration 'd' has no answer to show"):
        build("reason/few-shot", {}).check_questions([OPEN], [Question("d", "What?")])
    for name in ("chain-of-thought", "self-consistency"):
        with pytest.raises(
            RecordsError, match="'d' needs a text in field 'solution'. Other fields it has: note"
        ):
            build(f"reason/{name}", {}).check_questions([OPEN], [bare])
