from __future__ import annotations

import pytest

from germane.core.sentences import split_sentences


def parts(text: str) -> list[str]:
    return [text[start:end] for start, end in split_sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("  One.\n Two.  ", ["One.", "Two."]),
        ("It cost 3.5 kg. Then 4.", ["It cost 3.5 kg.", "Then 4."]),
        ("Dr. Ada and Mr. Ben met. They left.", ["Dr. Ada and Mr. Ben met.", "They left."]),
        ("J. R. Smith came. He left.", ["J. R. Smith came.", "He left."]),
        ("The U.S. Army came. So did I. Then rain.", ["The U.S. Army came.", "So did I.", "Then rain."]),
        ("Fruit, e.g. apples, is good. Eat.", ["Fruit, e.g. apples, is good.", "Eat."]),
        ("See no. 5. I said no. Then I left.", ["See no. 5.", "I said no.", "Then I left."]),
        ('"Really?" he said. "Yes." She left.', ['"Really?" he said.', '"Yes."', "She left."]),
        ("(It rained.) It stopped.", ["(It rained.)", "It stopped."]),
        ("anna is a baker . boris owns a cat .", ["anna is a baker .", "boris owns a cat ."]),
        ("A title\n\nA text without end\n \nMore", ["A title", "A text without end", "More"]),
        ("A line\nof one sentence. Two.", ["A line\nof one sentence.", "Two."]),
        ("它在罗马。它很老！真的？", ["它在罗马。", "它很老！", "真的？"]),
        ("Wait... What? ... And more.", ["Wait...", "What?", "...", "And more."]),
        ("", []),
        (" \n ", []),
        ("...", ["..."]),
    ],
)
def test_sentences(text, expected):
    assert parts(text) == expected


def test_nothing_but_blanks_lies_outside():
    text = 'A b. "C?" d! Dr. E (f.) G\n\nH. I i。J k… L\n\n\n. m'
    spans = split_sentences(text)
    assert spans == sorted(spans)
    outside = text
    for start, end in reversed(spans):
        assert text[start:end].strip() == text[start:end] != ""
        outside = outside[:start] + outside[end:]
    assert not outside.strip()


def test_a_sentence_alone_is_one_sentence_again():
    """What was split before is split the same way when its sentences are put together by a blank."""
    text = "It was J. S. Bach. He came from Eisenach, no. 12. Really? Yes!"
    assert parts(" ".join(parts(text))) == parts(text)
