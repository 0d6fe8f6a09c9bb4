"""FLAT (arXiv:2410.11143): forgetting with forget data only costs less than gradient ascent and NPO.

A tiny language model that knows invented people forgets four of them, without records to keep, until hardly
one of their facts is answered. Baselines that must fail: gradient ascent and NPO. Beside them: training on
the template replies alone, without the divergence.

    python claims/flat.py

Takes about two minutes on one core.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from germane.claims import interval, write_section
from germane.core.evidence import Step
from germane.core.models import load_model
from germane.core.objective import IGNORED, Task, next_tokens
from germane.core.records import Data, read_rows
from germane.embedded import facts
from germane.method import build
from germane.tasks.unlearn._unlearner import Unlearner, Work

SEEDS = (1, 2, 3)
FORGOTTEN = 0.12  # share of the forget records' answers that may be right in the end
TEMPLATE = [" i do not know"]
SHARED: dict[str, Any] = {"learning_rate": 3e-5, "epochs": 300, "batch_size": 16}
ONE_STEP = {**SHARED, "accumulate": 1, "warmup": 0, "weight_decay": 0.0, "templates": TEMPLATE}
DIVERGENCES = (
    "total-variation", "kl", "jensen-shannon", "pearson", "jeffrey", "reverse-kl", "squared-hellinger", "neyman",
)  # fmt: skip
ASCENT, NPO, TEMPLATES = "gradient ascent", "NPO", "templates alone"
FLAT = {f"FLAT, {name}": ("flat", {**ONE_STEP, "divergence": name}) for name in DIVERGENCES}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **FLAT,
    TEMPLATES: ("refusal", {**SHARED, "templates": TEMPLATE}),
    ASCENT: ("gradient-ascent", SHARED),
    NPO: ("npo", SHARED),
}


def main() -> None:
    found: dict[str, list[tuple[float, float, int]]] = {label: [] for label in VARIANTS}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as place:
            made = facts.make(Path(place), seed)
            for label, (name, settings) in VARIANTS.items():
                found[label].append(forget(made, name, settings, seed))
    lines = ["| | forget answers right, % | kept answers right, % | epochs |", "|---|---|---|---|"]
    for label, values in found.items():
        forgot, kept, epochs = zip(*values, strict=True)
        cells = [interval([100 * value for value in forgot]), interval([100 * value for value in kept])]
        lines.append(f"| {label} | {' | '.join(cells)} | {interval(epochs, 0)} |")
    write_section(
        "flat",
        "FLAT: forgetting with forget data only",
        f"{INTRODUCTION}\n\n" + "\n".join(lines),
        verdict(found),
    )


def forget(made: facts.Facts, name: str, settings: dict[str, Any], seed: int) -> tuple[float, float, int]:
    """Shares of right answers on forget and retain records when enough is forgotten, and the epoch."""
    loaded = load_model(str(made.model))
    tasks = {part: task_of(made, part, loaded) for part in ("forget", "retain")}
    reached = [0]

    def enough(epoch: int) -> bool:
        reached[0] = epoch
        return accuracy(tasks["forget"]) <= FORGOTTEN

    work = Work(
        loaded, tasks["forget"], None, lambda: load_model(str(made.model)), "", seed,
        Step(task="unlearn", method=name), made.model, after_epoch=enough,
    )  # fmt: skip
    method = build(f"unlearn/{name}", settings)
    assert isinstance(method, Unlearner)
    method.unlearn(work)
    return accuracy(tasks["forget"]), accuracy(tasks["retain"]), reached[0]


def task_of(made: facts.Facts, part: str, loaded: Any) -> Task:
    data = Data(name=part, path=str(made.files[part]))
    return Task(data, read_rows(data), loaded.model, loaded.processor)


@torch.no_grad()
def accuracy(task: Task) -> float:
    """Share of records of which every token of the answer is the likeliest."""
    was_training = task.model.training
    task.model.eval()
    right: list[bool] = []
    for batch in task.batches(64):
        wanted = next_tokens(batch["labels"])
        same = task.logits(batch).argmax(dim=-1) == wanted
        right += (same | (wanted == IGNORED)).all(dim=1).tolist()
    task.model.train(was_training)
    return float(np.mean(right))


def verdict(found: dict[str, list[tuple[float, float, int]]]) -> str:
    """Holds if FLAT by total variation forgets and keeps 10 points more than both baselines."""
    mean = {
        label: 100 * np.mean([value[:2] for value in values], axis=0) for label, values in found.items()
    }
    ours = mean["FLAT, total-variation"]
    best = max(mean[ASCENT][1], mean[NPO][1])
    holds = ours[0] <= 100 * FORGOTTEN and ours[1] >= best + 10
    return (
        f"{'Holds against both' if holds else 'Does not hold as stated'}: FLAT by total variation keeps "
        f"{ours[1]:.0f} % of the other answers, gradient ascent {mean[ASCENT][1]:.0f} %, NPO {mean[NPO][1]:.0f} %; "
        f"training on the templates alone keeps {mean[TEMPLATES][1]:.0f} %."
    )


INTRODUCTION = f"""\
A word-level Llama of two layers knows 40 invented people, and answers "{TEMPLATE[0].strip()}" about four more. The 16
questions about four of the 40 are to be forgotten, without any record to keep: AdamW at 3e-5, one batch an
epoch, until at most {FORGOTTEN:.0%} of their answers are right, at most 300 epochs. What is right is then asked
about the other 36. Mean and 95 % t interval over 3 seeds. The corrected forms of reverse KL, Hellinger and Neyman
are used; it counts as holding if total variation keeps 10 points more than both baselines."""


if __name__ == "__main__":
    main()
