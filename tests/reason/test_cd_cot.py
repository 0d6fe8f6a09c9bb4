"""Which rewritings survive, how contexts are composed and counted, with a scripted model."""

from __future__ import annotations

import pytest
from scripted_reader import Scripted

from germane.core.errors import RecordsError, SettingError
from germane.method import build
from germane.solver import Question, Solving
from germane.tasks.reason.cd_cot import apart, contrast, survivors, without_answer

CLEAN = Question("clean", "1 + 1?", ("2",), more={"solution": "One more than one is two."})
NOISY = [
    Question(f"n{n}", f"{n} + 1?", (str(n + 1),), more={"solution": f"{n} is odd. The sky is blue."})
    for n in (3, 5, 7)
]
ASKED = Question("q", "9 + 1?", ("10",))


def test_the_clean_one_is_the_marked_one_else_the_first():
    marked = Question("m", "2 + 2?", ("4",), more={"solution": "Four.", "clean": True})
    also = Question("a", "3 + 3?", ("6",), more={"solution": "Six.", "clean": True})
    assert apart([CLEAN, *NOISY]) == (CLEAN, NOISY)
    assert apart([NOISY[0], marked, also, CLEAN]) == (marked, [NOISY[0], CLEAN])


def test_rewritings_survive_that_reach_the_given_answer():
    replies = [
        "Corrected reasoning: Three and one are four.\nThe answer is 4.",
        "Corrected reasoning: Three and one are five.\nThe answer is 5.",
        "Three, then four. The answer is 4.",
        "Corrected reasoning: It is clear.",
    ]
    kept = survivors(NOISY[0], replies)
    assert [each.more["solution"] for each in kept] == [
        "Three and one are four.", "Three, then four. The answer is 4.",
    ]  # fmt: skip
    assert all(each.answers == ("4",) and each.id == "n3" for each in kept)


def test_the_last_line_goes_only_if_it_states_the_answer():
    assert without_answer("a\nThe answer is 4.") == "a"
    assert without_answer("a\nb") == "a\nb"
    assert without_answer("The answer is 4.") == "The answer is 4."


def test_the_clean_example_comes_first_when_noise_is_contrasted():
    said = contrast(CLEAN, NOISY[0])[0]["content"]
    places = [said.index(part) for part in ("One more than one", "Answer: 2", "3 is odd", "Answer: 4")]
    assert places == sorted(places)


def rule(text, settings):
    """Rewritings right in even rounds, but never for n7; the answer by the seed."""
    if "Second example" in text:
        number = next(n for n in (3, 5, 7) if f"Question: {n} + 1?" in text)
        right = settings.seed % 2 == 0 and number != 7
        return f"Corrected reasoning: round {settings.seed}.\nThe answer is {number + 1 if right else 0}."
    return f"The answer is {[10, 9, 10, 9, 10][settings.seed - 5]}."


def test_each_noisy_demonstration_is_rewritten_once_for_all_questions_and_the_votes_are_pooled():
    chat = Scripted(rule)
    solving = Solving(chat, [CLEAN, *NOISY])
    answers = build("reason/cd-cot", {}).solve(solving, [ASKED, ASKED])
    assert chat.batches == [3] * 5 + [2] * 5  # 5 rewritings of 3; 3 and 2 samples for both questions
    assert solving.step.tables[0].rows == [["n3", 5, 3], ["n5", 5, 3], ["n7", 5, 0]]
    assert answers[0].text == "10"
    assert answers[0].details == {"confidence": 0.6, "counts": {"10": 3, "9": 2}}
    first, second = chat.asked[15], chat.asked[-1]
    for shown in (first, second):
        said = [message["content"] for message in shown if message["role"] == "assistant"]
        assert said[0].startswith("One more than one")
        assert all(text.startswith("round ") for text in said[1:3])
        assert said[3].startswith("7 is odd.")  # no rewriting survived: as it was
    assert [message["role"] for message in first] == ["user", "assistant"] * 4 + ["user"]


def test_contexts_are_drawn_from_the_seed():
    kept = [[Question(str(n), "", more={}) for n in range(20)] for _ in range(3)]
    method = build("reason/cd-cot", {"split": [1] * 4})

    def drawn(seed):
        shown = method.contexts(Solving(Scripted(rule), seed=seed), ASKED, CLEAN, kept)
        return [[each.id for each in context] for context in shown]

    assert drawn(1) == drawn(1) != drawn(2)
    assert all(context[0] == "clean" and len(context) == 4 for context in drawn(1))


def test_bad_demonstrations_and_settings_are_refused():
    method = build("reason/cd-cot", {})
    with pytest.raises(RecordsError, match="a clean demonstration and a noisy one"):
        method.check_questions([ASKED], [CLEAN])
    with pytest.raises(RecordsError, match="'b' needs a text in field 'solution'"):
        method.check_questions([ASKED], [CLEAN, Question("b", "?", ("1",))])
    with pytest.raises(SettingError, match="one sample at least"):
        build("reason/cd-cot", {"split": [3, 0]})
