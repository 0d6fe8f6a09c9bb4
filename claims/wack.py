"""WACK (arXiv:2410.22071): a model errs on what it knows, and its states tell that from not knowing.

SmolLM2-135M-Instruct is asked 48 easy questions under both triggers, each beside its control with as many
right shots. Probes need more items than such a model knows, so they are measured on planted clusters.
Baselines that must fail: the control, which must make fewer errors than a trigger; shuffled labels;
generic labels.

    python claims/wack.py

Takes about two minutes on one core.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from germane.claims import write_section
from germane.core.evidence import Score
from germane.core.records import write_jsonl
from germane.core.statistics import student_t
from germane.embedded import smollm2
from germane.recipe import run_task
from germane.tasks.evaluate.wack import probe_accuracies, split

SEEDS = 10
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon",
    "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Sweden": "Stockholm",
    "Norway": "Oslo", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin",
    "Belgium": "Brussels", "Canada": "Ottawa", "Australia": "Canberra", "India": "New Delhi",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago",
    "Kenya": "Nairobi", "Nigeria": "Abuja", "Morocco": "Rabat", "Turkey": "Ankara", "Iran": "Tehran",
    "Iraq": "Baghdad", "Lebanon": "Beirut", "Jordan": "Amman", "Nepal": "Kathmandu",
}  # fmt: skip
OTHERS = {
    "What is the largest planet of the solar system?": "Jupiter",
    "Which planet is closest to the sun?": "Mercury",
    "What is the chemical symbol of gold?": "Au",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Who painted the Mona Lisa?": "Leonardo",
    "What is the largest ocean on Earth?": "Pacific",
    "How many days are in a week?": "7",
    "What gas do plants take in?": "Carbon dioxide",
    "Which animal is the largest on land?": "Elephant",
    "What is frozen water called?": "Ice",
    "On which continent is Egypt?": "Africa",
    "Which language is spoken in Brazil?": "Portuguese",
}
# Of the same kind as most questions, with the wrong answers another city of the country.
SHOTS = {
    "Scotland": ("Edinburgh", "Glasgow"), "Switzerland": ("Bern", "Geneva"), "Romania": ("Bucharest", "Cluj"),
    "Ukraine": ("Kyiv", "Odesa"), "Argentina": ("Buenos Aires", "Rosario"), "Croatia": ("Zagreb", "Split"),
}  # fmt: skip


def capital(country: str) -> str:
    return f"What is the capital of {country}?"


def main() -> None:
    lines = []
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for trigger in ("bad-shots", "story"):
            found[trigger] = measure(trigger, Path(folder))
            lines.append(row(trigger, found[trigger]))
    probes = np.array([planted(seed) for seed in range(SEEDS)])
    names = ("HK+ / factual / HK-", "the same, shuffled labels", "HK+ / factual, specific", "generic")
    means = ", ".join(f"{name} {interval(probes[:, index])}" for index, name in enumerate(names))
    body = f"{INTRODUCTION}\n\n{HEAD}\n" + "\n".join(lines) + f"\n\nPlanted clusters, accuracy: {means}."
    write_section("wack", "WACK: errors on what is known, and probes of them", body, verdict(found, probes))


def measure(trigger: str, folder: Path) -> dict[str, Score]:
    """The suite's scores of SmolLM2 under one trigger, by metric, and how many labels the reading flips."""
    questions = [(capital(country), city) for country, city in CAPITALS.items()] + list(OTHERS.items())
    files = {
        "questions": [{"prompt": question, "answer": answer} for question, answer in questions],
        "shots": [{"prompt": capital(country), "answer": right} for country, (right, _) in SHOTS.items()],
        "wrong-shots": [
            {"prompt": capital(country), "answer": wrong} for country, (_, wrong) in SHOTS.items()
        ],
    }
    for name, rows in files.items():
        write_jsonl(rows, folder / f"{name}.jsonl")
    arguments = {
        "model": str(smollm2()), "data": [f"{name}={folder / name}.jsonl" for name in files],
    }  # fmt: skip
    result = run_task("evaluate", "wack", arguments, {"trigger": trigger}, folder / trigger)
    return {score.metric: score for score in result.scores}


def row(trigger: str, scores: dict[str, Score]) -> str:
    cells = [str(count(scores[name])) for name in ("high knowledge", "unclear", "HK-")]
    cells += [
        f"{count(scores[name])} of {scores[name].n} ({scores[name].low:.2f} to {scores[name].high:.2f})"
        for name in ("HK+ among high knowledge", "wrong under the control")
    ]
    return f"| {trigger} | {' | '.join(cells)} |"


def count(score: Score) -> int:
    return round(score.value * score.n)


def planted(seed: int) -> list[float]:
    """Accuracies on three Gaussian clusters: three classes, shuffled, specific, generic."""
    generator = np.random.default_rng(seed)
    classes = []
    for _ in range(3):
        rows = generator.normal(size=(200, 1, 64)) + 0.35 * generator.normal(size=64)
        classes.append((rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32))
    erring, factual, ignorant = classes
    train, test = split(200, 42)
    sides = [
        {1: erring[part], 0: factual[part], 2: ignorant[part]} for part in (np.array(train), np.array(test))
    ]
    pair = {code: sides[1][code] for code in (1, 0)}
    wrong = np.concatenate([ignorant[train][:126], erring[train][:14]])
    return [
        probe_accuracies(sides[0], sides[1], 0)[0],
        probe_accuracies(sides[0], sides[1], 0, shuffled=True)[0],
        probe_accuracies({code: sides[0][code] for code in (1, 0)}, pair, 0)[0],
        probe_accuracies({1: wrong, 0: factual[train]}, pair, 0)[0],
    ]


def interval(values: np.ndarray) -> str:
    """Mean and 95 % t interval over seeds."""
    half = student_t(len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.2f} ± {half:.2f}"


def verdict(found: dict[str, dict[str, Score]], probes: np.ndarray) -> str:
    """Each trigger against its control, and the probes against shuffled and generic labels."""
    parts = []
    for trigger, scores in found.items():
        rate, control = scores["HK+ among high knowledge"], scores["wrong under the control"]
        more = rate.value > control.high
        parts.append(
            f"{trigger} {'adds' if more else 'is not shown to add'} errors ({count(rate)} of {rate.n} against "
            f"{count(control)} under the control)"
        )
    real, shuffled, specific, generic = probes.mean(axis=0)
    gain = f"specific labels {specific - generic:+.2f} over generic ones"
    held = real >= 0.85 and shuffled <= 0.42 and specific - generic >= 0.05
    errs = all("is not shown" not in part for part in parts)
    state = "Holds" if held and errs else "Does not hold on this model"
    return (
        f"{state}: {'; '.join(parts)}. Probes, on planted clusters only: {real:.2f}, shuffled labels "
        f"{shuffled:.2f}, {gain}."
    )


HEAD = "| trigger | high knowledge | unclear | HK- | HK+ | wrong under the control |\n" + "|---" * 6 + "|"
INTRODUCTION = """\
SmolLM2-135M-Instruct (a file quantised to 4 bits), 48 easy questions, 36 of them capitals: one greedy and five
sampled answers after three right shots; hits by whole words. Bad shots are three other capitals with another city of
the country; the story stands before one right shot; each control has the same shots, right and without a story.
With 95 % Wilson intervals; one run of the samples. The triggers of such a small model say nothing of large ones.
The probes are of three Gaussian clusters in 64 dimensions, 200 each, means of 0.35 N(0, I); the generic wrong class
is nine parts HK-, one part HK+; mean and 95 % t interval over ten seeds."""


if __name__ == "__main__":
    main()
