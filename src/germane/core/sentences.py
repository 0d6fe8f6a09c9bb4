"""Texts as sentences, by rules of punctuation: the same wherever sentences are labelled, scored or kept."""

from __future__ import annotations

import re

# Where a sentence may end: marks with what closes after them, before a blank; the marks of Chinese and
# Japanese anywhere; an empty line.
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？]+[”’」』）]*|(?=\n[^\S\n]*\n)")
_NEXT = re.compile(r"\s*[\"'“‘«(\[]*(.?)", re.DOTALL)
_LAST_WORD = re.compile(r"[^\s\"'“‘«(\[]*\Z")
_LONGEST = 40  # letters that are looked back at
# After these and a period comes more of the same sentence.
_ABBREVIATIONS = re.compile(
    r"mrs?|ms|dr|prof|st|mt|ft|[sj]r|rev|hon|gov|sen|rep|gen|col|lt|sgt|capt|cf|vs|viz|al|approx|ca|mme|mlle",
    re.IGNORECASE,
)
_BEFORE_NUMBERS = re.compile(
    r"nos?|nr|pp?|vol|ch|sec|art|figs?|eq|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec", re.IGNORECASE
)


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Start and end of every sentence, in order, without the blanks around it.

    A sentence ends after ".", "!", "?" or "…" (and quotation marks or brackets that close there) before a
    blank, after "。", "！" or "？", and at an empty line; but not before a small letter, unless the mark
    stands apart, as in tokenised text, nor after initials and common abbreviations of English. Nothing but
    blanks lies outside the sentences.
    """
    ends = [match.end() for match in _END.finditer(text) if _is_end(text, match)]
    spans, start = [], 0
    for end in [*ends, len(text)]:
        part = text[start:end]
        if part.strip():
            left = start + len(part) - len(part.lstrip())
            spans.append((left, left + len(part.strip())))
            start = end
    return spans


def _is_end(text: str, match: re.Match[str]) -> bool:
    mark = match.group()
    if not mark or mark[0] in "。！？":
        return True
    word = _LAST_WORD.search(text, max(0, match.start() - _LONGEST), match.start())
    last = word.group() if word else ""
    following = _NEXT.match(text, match.end())
    after = following.group(1) if following else ""
    if not last:  # the mark stands apart
        return True
    if after.islower():
        return False
    return mark[0] != "." or not _goes_on(last, after)


def _goes_on(last: str, after: str) -> bool:
    """Whether a period after this word belongs to it."""
    if len(last) == 1 and last.isupper() and last != "I":
        return True
    if re.fullmatch(r"(?:[A-Za-z]\.)+[A-Za-z]", last):  # U.S, e.g
        return True
    return bool(_ABBREVIATIONS.fullmatch(last) or (after.isdigit() and _BEFORE_NUMBERS.fullmatch(last)))
