"""Whether what a model wrote is an answer."""

import pytest

from germane.core.answers import contains, normalise, numbers, overlap, says


@pytest.mark.parametrize(
    ("written", "answer", "expected"),
    [
        ("It is Paris, in France.", "paris", True),
        ("Parisian", "Paris", False),
        ("new or york", "New York", False),
        ("anything", "", False),
    ],
)
def test_an_answer_is_held_as_whole_words(written, answer, expected):
    assert contains(written, answer) is expected


def test_articles_case_and_what_follows_the_sentence_do_not_count():
    assert normalise("The Beatles. Or not.") == "beatles"
    assert says("the Beatles of course", "Beatles")
    assert not says("not the Beatles", "Beatles")
    assert not says("anything", "")


def test_numbers_in_their_order():
    assert numbers("of 1,200 apples -3.5 are left: 7") == [1200.0, -3.5, 7.0]
    assert numbers("none") == []


def test_overlap_by_hand():
    # "big red" against "red car": one shared word, 2 * 1 / (2 + 2)
    assert overlap("big red", "the red car") == pytest.approx(0.5)
    assert overlap("blue", "red") == 0.0
    assert overlap("red red", "red") == pytest.approx(2 / 3)
