"""Whether what a model wrote is, or holds, an answer."""

from __future__ import annotations

import re
from collections import Counter

_ARTICLES = ("a", "an", "the")


def words(text: str) -> list[str]:
    """The runs of letters and digits of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


def contains(written: str, answer: str) -> bool:
    """Whether the answer's words occur in what was written, one right after the other."""
    said, wanted = words(written), words(answer)
    width = len(wanted)
    return width > 0 and any(said[start : start + width] == wanted for start in range(len(said)))


def normalise(text: str) -> str:
    """Words without articles, up to the sentence's end.

    As answers to questions are compared since Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine
    Comprehension of Text", 2016.
    """
    first = re.split(r"\.(?:\s|$)|\n", text.strip(), maxsplit=1)[0]
    return " ".join(word for word in words(first) if word not in _ARTICLES)


def says(written: str, answer: str) -> bool:
    """Whether what was written is the answer, or begins with it."""
    found, wanted = normalise(written).split(), normalise(answer).split()
    return bool(wanted) and found[: len(wanted)] == wanted


def numbers(text: str) -> list[float]:
    """The numbers in a text, in their order; commas within them are left out."""
    return [float(found.replace(",", "")) for found in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]


def overlap(written: str, answer: str) -> float:
    """F1 of the words that two texts share, as in SQuAD."""
    said, wanted = normalise(written).split(), normalise(answer).split()
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0
