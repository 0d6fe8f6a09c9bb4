"""Grounding: what passages that are not right do to answers, and what each method of `ground` does about it.

SmolLM2-135M-Instruct answers 48 questions on made-up people. Beside the one right passage stand 0, 1, 3 or 5
others: of other people (irrelevant), or of the same person with a wrong value that the passage itself calls
denied, planned or past (misleading). The people are made up, so that the model can know nothing by itself:
no-retrieval must fail. The oracle, which is shown the right passage only, is the upper reference.

    python claims/grounding.py [METHOD ...]

Measures those methods that are named, all if none is, and reports the others from the cache, or as not run.
Takes about five minutes on one core for each of plain, no-retrieval and oracle; the others take longer.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from germane.claims import write_section
from germane.comparison import compare
from germane.core.evidence import FILE_NAME, Evidence, Plot, Score, Series
from germane.core.records import Row, write_jsonl
from germane.embedded import cache_folder, smollm2
from germane.solver import ACCURACY, IRRELEVANT, MISLEADING, RIGHT

OUT = cache_folder() / "claims" / "grounding"
COUNTS = (0, 1, 3, 5)
KINDS = (IRRELEVANT, MISLEADING)
PER_RELATION, SEED = 8, 0
FIRST = (
    "Marlo",
    "Tessa",
    "Ivo",
    "Ruta",
    "Bram",
    "Odile",
    "Kenzo",
    "Liv",
    "Pavel",
    "Suri",
    "Anselm",
    "Noor",
)
LAST = (
    "Venn",
    "Okafor",
    "Lindqvist",
    "Brandt",
    "Castell",
    "Hoshino",
    "Dube",
    "Ferrant",
    "Malik",
    "Zelenko",
)
# What is asked, what says it, what misleads, and values.
RELATIONS = (
    ("In which city does {name} live?", "{name} lives in {value}, close to the old market.",
     "A report that {name} lives in {value} was denied by the family.",
     ("Lisbon", "Oslo", "Kyoto", "Prague", "Toronto", "Nairobi", "Lima", "Dublin", "Athens", "Seoul")),
    ("What is the job of {name}?", "{name} works as a {value} and likes the early hours.",
     "{name} once wanted to become a {value}, but never did.",
     ("carpenter", "nurse", "pilot", "baker", "lawyer", "plumber", "teacher", "farmer", "tailor", "dentist")),
    ("Which instrument does {name} play?", "Every evening {name} plays the {value} at home.",
     "{name} sold a {value} years ago and has not touched one since.",
     ("violin", "piano", "flute", "trumpet", "cello", "guitar", "drums", "harp", "clarinet", "banjo")),
    ("Which animal does {name} keep?", "{name} keeps a {value}, which sleeps by the stove.",
     "{name} thought about getting a {value}, and decided against it.",
     ("cat", "dog", "parrot", "rabbit", "goat", "turtle", "horse", "hamster", "snake", "donkey")),
    ("Which language is {name} learning?", "This year {name} is learning {value} with a tutor.",
     "{name} gave up learning {value} after a week, long ago.",
     ("Spanish", "Arabic", "Finnish", "Korean", "Polish", "Swahili", "Greek", "Hindi", "Welsh", "Turkish")),
    ("What colour is the car of {name}?", "The car of {name} is {value} and rather old.",
     "{name} used to have a {value} car, which was scrapped.",
     ("red", "blue", "green", "yellow", "white", "black", "silver", "orange", "purple", "brown")),
)  # fmt: skip
# Methods that need nothing trained -> settings, fixed beforehand; replies are cut short, since the model does not end long ones.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"max_tokens": 24},
    "no-retrieval": {"max_tokens": 24},
    "oracle": {"max_tokens": 24},
    "chain-of-note": {"max_tokens": 160},
    "astute-rag": {"max_tokens": 128, "document_tokens": 48},
    "rationale-ranking": {"max_tokens": 24, "rationale_tokens": 48, "most": 2},
    "furepa": {"max_tokens": 64, "rounds": 2, "plans": 3},
}
Found = Mapping[tuple[str, str], Mapping[int, Score]]


def main() -> None:
    methods = list(SETTINGS)
    asked = sys.argv[1:] or methods
    model = str(smollm2())
    found: dict[tuple[str, str], dict[int, Score]] = {}
    for kind in KINDS:
        questions = OUT / f"{kind}.jsonl"
        write_jsonl(make_questions(kind), questions)
        for method in methods:
            out = OUT / kind / method
            if method in asked:
                arguments = {"model": model, "questions": str(questions), "distractors": list(COUNTS)}
                compare("ground", methods=[method], arguments=arguments, seeds=[SEED], out=out, resume=True,
                        settings={method: SETTINGS.get(method, {})})  # fmt: skip
            found[kind, method] = scores(out)
    draw(found, methods)
    body = "\n\n".join([INTRODUCTION, *(table(found, kind, methods) for kind in KINDS), REMARKS])
    title = "Grounding: accuracy by the number of irrelevant or misleading passages"
    write_section("grounding", title, body, verdict(found, methods))


def make_questions(kind: str) -> list[Row]:
    """Eight people for each relation, each asked about once, with the right passage and five others."""
    people = [f"{first} {last}" for first in FIRST for last in LAST]
    generator = random.Random(SEED)
    generator.shuffle(people)
    rows = []
    for number, (question, right, wrong, values) in enumerate(RELATIONS):
        for name in people[number * PER_RELATION : (number + 1) * PER_RELATION]:
            value, *others = generator.sample(values, 6)
            strangers = generator.sample([each for each in people if each != name], 5)
            passages = [{"text": right.format(name=name, value=value), "kind": RIGHT}]
            for other, stranger in zip(others, strangers, strict=True):
                form, about = (right, stranger) if kind == IRRELEVANT else (wrong, name)
                passages.append({"text": form.format(name=about, value=other), "kind": kind})
            rows.append({"question": question.format(name=name), "answer": value, "passages": passages})
    return rows


def scores(out: Path) -> dict[int, Score]:
    """Number of distractors -> accuracy, of a method that was measured; else nothing."""
    if not (out / FILE_NAME).is_file():
        return {}
    row = Evidence.read(out).rows[-1]
    named = {score.metric: score for score in row.scores}
    return {
        count: named[metric]
        for count in COUNTS
        if (metric := f"{ACCURACY}, {count} distractors") in named
    }  # fmt: skip


def draw(found: Found, methods: list[str]) -> None:
    """The curves, as the evidence of a comparison beside the rows."""
    evidence = Evidence.begin("Grounding", {}, "compare")
    for kind in KINDS:
        lines = [
            Series(
                name=method, steps=list(map(float, by_count)), values=[s.value for s in by_count.values()]
            )
            for method in methods
            if (by_count := found[kind, method])
        ]
        evidence.plots.append(
            Plot(title=f"Accuracy by the number of {kind} passages", x="passages", y=ACCURACY, series=lines)
        )
    evidence.write(OUT)


def table(found: Found, kind: str, methods: list[str]) -> str:
    """Accuracy in percent with its interval, a row for each method."""
    lines = [
        f"**With {kind} passages beside the right one**: accuracy in percent, 95 % Wilson interval.",
        f"| method | {' | '.join(map(str, COUNTS))} |\n|---|{'---|' * len(COUNTS)}",
    ]
    for method in methods:
        by_count = found[kind, method]
        cells = [cell(by_count[count]) for count in COUNTS] if by_count else ["not run"] * len(COUNTS)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def cell(score: Score) -> str:
    return f"{100 * score.value:.0f} [{100 * score.low:.0f}, {100 * score.high:.0f}]"


def verdict(found: Found, methods: list[str]) -> str:
    """A method holds for a kind if, among five others, its interval lies above plain's accuracy."""
    parts = []
    for kind in KINDS:
        plain = found[kind, "plain"]
        if not plain:
            return "Not settled: plain is not measured yet."
        last = COUNTS[-1]
        measured = [m for m in methods if found[kind, m] and m not in ("plain", "oracle", "no-retrieval")]
        better = [m for m in measured if found[kind, m][last].low > plain[last].value]
        lost = 100 * (plain[0].value - plain[last].value)
        parts.append(
            f"five {kind} passages cost plain {lost:.0f} points, and "
            f"{', '.join(better) or 'no method'} of {', '.join(measured) or 'none measured'} does better"
        )
    holds = all("and no method" not in part for part in parts)
    return f"{'Holds in part' if holds else 'Does not hold at this size'}: {'; '.join(parts)}."


INTRODUCTION = f"""\
{len(RELATIONS) * PER_RELATION} questions, each with one right passage; greedy. Replies are cut at 24 tokens,
of chain-of-note at 160, of astute-rag at 128, of furepa at 64, with two rounds of three plans.
rationale-ranking keeps the two passages that the untrained MiniLM finds closest. Every method has the same
questions and the same order of passages. A method does better where, among five others, its interval lies
above plain's accuracy."""

REMARKS = """\
The model has 135 million parameters. The papers' methods ask for notes, groups and plans in a form, and
where the model does not keep it, their fallback is measured. An answer is right if it holds the right value,
so one that lists several values can be. The papers' own numbers are
of models from 7 billion parameters on, on NQ, TriviaQA and the like, which this does not repeat."""


if __name__ == "__main__":
    main()
