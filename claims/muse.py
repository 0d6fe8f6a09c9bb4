"""MUSE (arXiv:2407.06460): what unlearning takes from memory it takes from utility or gives away as privacy.

SmolLM2-135M-Instruct that was told of invented people, of whom eight are to be forgotten, and the same model
never told of them. One comparison of nine methods, measured by all six criteria. Baselines that must fail:
the untouched model on memory and privacy, and gradient ascent without records to keep on utility.

    python claims/muse.py

Takes about an hour on one core; models and rows are kept in the cache, so that a run that was stopped goes on.
The comparison's own report, with its plot of memory against utility, stays there too.
"""

from __future__ import annotations

from typing import Any

from germane.claims import write_section
from germane.comparison import compare
from germane.core.evidence import Row
from germane.embedded import cache_folder, people

OUT = cache_folder() / "claims" / "muse"
SUITE = {
    "name": "muse",
    "settings": {
        "question": "Question: {question}\\nAnswer:", "examples": 2, "items": 16, "verbatim_tokens": 24,
        "answer_tokens": 8,
    },
}  # fmt: skip
SHARED: dict[str, Any] = {"learning_rate": 5e-5, "epochs": 5, "batch_size": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "gradient-ascent": SHARED, "npo": SHARED, "refusal": SHARED,
    "flat": {**SHARED, "accumulate": 1, "warmup": 0},
    "task-vector": SHARED, "whp": {**SHARED, "reinforcement_rate": 5e-5, "reinforcement_epochs": 5},
}  # fmt: skip
VARY = {"gradient-ascent": {"regulariser": ["none", "gdr"]}, "npo": {"regulariser": ["none", "gdr", "klr"]}}
VERBATIM, KNOWLEDGE, LEAK, KEPT = "VerbMem", "KnowMem", "PrivLeak (0 is ideal)", "KnowMem utility"
SCALED, SUSTAINED = f"scalability (least {KEPT})", f"sustainability (least {KEPT})"
METRICS = (VERBATIM, KNOWLEDGE, LEAK, KEPT, SCALED, SUSTAINED)
SHARES = {VERBATIM, KNOWLEDGE, KEPT, SCALED, SUSTAINED}


def main() -> None:
    made = people.make()
    files = made.files
    result = compare(
        "unlearn",
        methods=list(SETTINGS),
        out=OUT,
        arguments={
            "model": str(made.model), "initial": str(made.initial), "retrained": str(made.retrained),
            "forget": str(files["forget"]), "retain": str(files["retain"]), "holdout": str(files["holdout"]),
            "data": [f"{name}={files[name]}" for name in ("forget-questions", "retain-questions")],
            "suites": [SUITE], "trials": 2, "requests": 2,
        },
        settings=SETTINGS,
        vary=VARY,
        resume=True,
    )  # fmt: skip
    rows = sorted(result.evidence.rows, key=lambda row: row.status != "reference")
    write_section(
        "muse",
        "MUSE: six criteria of unlearning",
        f"{INTRODUCTION}\n\n{table(rows)}\n\n{REMARKS}",
        verdict(rows),
    )


def value(row: Row, metric: str) -> float | None:
    """A number of a row as the paper prints it."""
    found = row.mean(metric)
    return None if found is None else found * (100 if metric in SHARES else 1)


def table(rows: list[Row]) -> str:
    lines = [f"| | {' | '.join(METRICS)} | seconds |", "|---" * (len(METRICS) + 2) + "|"]
    for row in rows:
        found = [value(row, metric) for metric in METRICS]
        cells = ["" if number is None else f"{number:.1f}" for number in found]
        seconds = f"{row.seconds:.0f}" if row.seconds else ""
        lines.append(f"| {row.label} | {' | '.join(cells)} | {row.error or seconds} |")
    return "\n".join(lines)


def verdict(rows: list[Row]) -> str:
    """Holds if the metrics tell the untouched from the retrained model, and no method meets all criteria."""
    by = {row.label: {metric: value(row, metric) for metric in METRICS} for row in rows}
    base, retrained = by["base"], by["retrained"]
    told = base[VERBATIM] - retrained[VERBATIM] >= 20 and base[KNOWLEDGE] - retrained[KNOWLEDGE] >= 20
    told = told and base[LEAK] <= -50
    all_met = [
        label
        for label, found in by.items()
        if label not in ("base", "retrained") and meets(found, retrained)
    ]
    said = (
        f"VerbMem {base[VERBATIM]:.0f} of the untouched and {retrained[VERBATIM]:.0f} of the retrained model, "
        f"KnowMem {base[KNOWLEDGE]:.0f} and {retrained[KNOWLEDGE]:.0f}, PrivLeak {base[LEAK]:.0f} and 0; "
        f"{', '.join(all_met) or 'no method'} meets all of memory, privacy and utility"
    )
    return f"{'Holds' if told and not all_met else 'Does not hold as stated'}: {said}."


def meets(found: dict[str, float | None], retrained: dict[str, float | None]) -> bool:
    """Whether a model remembers as little as the retrained one, leaks nothing, and keeps its utility."""
    if any(found[metric] is None for metric in METRICS[:4]):
        return False
    return (
        found[VERBATIM] <= retrained[VERBATIM] + 5
        and found[KNOWLEDGE] <= retrained[KNOWLEDGE] + 5
        and abs(found[LEAK]) <= 5
        and found[KEPT] >= 0.9 * retrained[KEPT]
    )


INTRODUCTION = """\
SmolLM2-135M-Instruct, fine-tuned on a text and two questions about each of 24 invented people; the texts of 8 are
to be forgotten, and 8 more people were never told of. The retrained model was told of the other 16 only. The
criteria are those of the paper, numbers times 100 as it prints them, PrivLeak in percent of the retrained model's
AUC. For scalability half of the texts and all of them are forgotten at once, for sustainability one half
after the other; the number is the least utility seen. Each method is tried at two strengths, and its best
epoch within 5 % of the utility is kept, on a fifth of the kept texts, which no method trains on.

It counts as holding if the metrics tell the untouched model from the retrained one (by 20 points of memory, and
PrivLeak below -50) and, as in the paper, no method meets memory, privacy and utility together."""

REMARKS = """\
Read it with this in mind: one seed, 8 people, 16 questions, a model of 135M; the intervals are in the comparison's
report. A budget of utility is not part of the paper, whose gradient ascent runs until the utility is gone: here
methods stop before."""


if __name__ == "__main__":
    main()
