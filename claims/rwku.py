"""RWKU (arXiv:2406.10890): training to refuse questions hides what cloze still brings out.

A tiny language model that knows invented people is trained to refuse questions about four of them, or
made to forget with NPO and gradient ascent. Baseline that must fail: looking at questions alone, by
which refusal training forgets as well as any.

    python claims/rwku.py

Takes about two minutes on one core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from germane.claims import interval, write_section
from germane.core.records import Data, Row, read_rows, write_jsonl
from germane.embedded import facts
from germane.embedded.facts import ATTRIBUTES
from germane.recipe import run_task

SEEDS = (1, 2, 3)
METRICS = ("FB recall", "QA recall", "neighbour QA recall", "utility recall")
HEADS = ("cloze", "questions", "neighbours", "far facts")
PLAIN = {"cloze": "{question}", "question": "{question}", "opening": "", "answer_tokens": 8}
TRAINING = {"batch_size": 8, "epochs": 10}
REFUSAL, NPO, ASCENT = "refusal training on questions", "NPO", "gradient ascent"
# Label -> method, the records it forgets, settings.
VARIANTS: dict[str, tuple[str, str, dict[str, object]]] = {
    REFUSAL: ("refusal", "questions", {"learning_rate": 1.5e-4, "templates": [" i do not know"]}),
    "NPO on questions": ("npo", "questions", {"learning_rate": 3e-4}),
    NPO: ("npo", "everything", {"learning_rate": 1.5e-4}),
    ASCENT: ("gradient-ascent", "everything", {"learning_rate": 1.5e-4}),
}


def main(seeds: tuple[int, ...] = SEEDS) -> None:
    found: dict[str, list[list[float]]] = {"before": [], **{label: [] for label in VARIANTS}}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            made = facts.make(folder, seed)
            files = write_records(made, folder)
            for label, (method, records, settings) in VARIANTS.items():
                before, after = measure(made, files, method, records, settings, folder / label, seed)
                found[label].append(after)
            found["before"].append(before)
    lines = [f"| | {' | '.join(HEADS)} |", "|---" * (len(HEADS) + 1) + "|"]
    for label, values in found.items():
        cells = [interval([100 * seed[index] for seed in values]) for index in range(len(HEADS))]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    if seeds != SEEDS:
        print("\n".join(lines), verdict(found), sep="\n")
        return
    title = "RWKU: training to refuse questions hides what cloze still brings out"
    write_section("rwku", title, f"{INTRODUCTION}\n\n" + "\n".join(lines), verdict(found))


def write_records(made: facts.Facts, folder: Path) -> dict[str, Path]:
    """What is to be forgotten, and the suite's records by role."""
    questions, kept = (rows_of(made, name) for name in ("forget", "retain"))
    shared = {(row["attribute"], row["answer"]) for row in questions}
    near = [row for row in kept if (row["attribute"], row["answer"]) in shared]
    statements = [row for text in rows_of(made, "forget-texts") for row in blanks(text)]
    found = {
        "questions": questions, "everything": [*questions, *statements], "level1": statements,
        "level2": questions, "neighbor2": near, "utility": [row for row in kept if row not in near],
    }  # fmt: skip
    files = {}
    for name, rows in found.items():
        files[name] = folder / f"probes-{name}.jsonl"
        write_jsonl(rows, files[name])
    return files


def rows_of(made: facts.Facts, name: str) -> list[Row]:
    return read_rows(Data(name=name, path=str(made.files[name])))


def blanks(row: Row) -> list[Row]:
    """The statements of a text, each with its last word left out, after those before it."""
    statements = row["text"].split(" . ")
    assert len(statements) == len(ATTRIBUTES)
    found = []
    for number, statement in enumerate(statements):
        opening, value = statement.removesuffix(" .").rsplit(" ", 1)
        before = "".join(f"{earlier} . " for earlier in statements[:number])
        found.append({"prompt": before + opening, "answer": f" {value}"})
    return found


def measure(
    made: facts.Facts, files: dict[str, Path], method: str, records: str,
    settings: dict[str, object], out: Path, seed: int,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """The four metrics before and after, as shares."""
    roles = ("level1", "level2", "neighbor2", "utility")
    arguments = {
        "model": str(made.model), "forget": str(files[records]), "trials": 0,
        "suites": [{"name": "rwku", "settings": PLAIN}], "data": [f"{role}={files[role]}" for role in roles],
    }  # fmt: skip
    result = run_task("unlearn", method, arguments, {**TRAINING, **settings}, out, seed=seed)
    scores = {(score.subject, score.metric): score.value for score in result.scores}
    before, after = ([scores[subject, metric] for metric in METRICS] for subject in ("base", "result"))
    return before, after


def verdict(found: dict[str, list[list[float]]]) -> str:
    """Holds if refusals hide answers from questions only, and NPO takes them away from both."""
    mean = {label: 100 * np.mean(values, axis=0) for label, values in found.items()}
    fell = {label: mean["before"] - values for label, values in mean.items()}
    parts = {
        f"refusal training lowers recall on questions by {fell[REFUSAL][1]:.0f} points (at least 50)":
            fell[REFUSAL][1] >= 50,
        f"on cloze by {fell[REFUSAL][0]:.0f} (at most 20)": fell[REFUSAL][0] <= 20,
        f"NPO lowers both, by {fell[NPO][1]:.0f} and {fell[NPO][0]:.0f} (at least 50)":
            min(fell[NPO][:2]) >= 50,
        "questions alone rank refusal training first": mean[REFUSAL][1] <= min(m[1] for m in mean.values()),
        f"gradient ascent costs neighbours {fell[ASCENT][2]:.0f} points and far facts "
        f"{fell[ASCENT][3]:.0f} (5 more)": fell[ASCENT][2] >= fell[ASCENT][3] + 5,
    }  # fmt: skip
    said = "; ".join(f"{'yes' if holds else 'no'}: {text}" for text, holds in parts.items())
    return f"{'Holds' if all(parts.values()) else 'Does not hold as stated'}. {said}."


INTRODUCTION = """\
A word-level Llama of two layers knows 40 invented people, four facts each, from statements and from
questions. Four of them are to be forgotten: by training to refuse the 16 questions about them, by NPO and by
gradient ascent on the questions and the statements, and by NPO on the questions alone. AdamW, 10 epochs of
batches of 8, no records to keep. ROUGE-L recall in percent, mean and 95 % t interval over 3 seeds. Cloze is
the statements, the value left out; neighbours are questions about others whose answer one of the forgotten
people shares, and far facts all other questions.

Read it with this in mind: the learning rate of each method is the lowest of 1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4
and 1e-3 at which recall on questions fell by 50 points on seed 0, which is not among the three; so the
methods are compared at the same loss on questions, not each at its best. All four columns were in view when the
rates were chosen, after first rates had destroyed the model. Refusal training depends on it: on
seed 0, at twice that rate, the model refuses everything, and cloze falls to 6."""


if __name__ == "__main__":
    main(tuple(int(word) for word in sys.argv[1:]) or SEEDS)
