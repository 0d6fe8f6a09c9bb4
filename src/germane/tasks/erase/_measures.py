"""What is measured of every erased pipeline: how far its images moved, and what a judge sees in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from germane.core.errors import RecordsError, SettingError
from germane.core.evidence import Finding, Score
from germane.core.models import Loaded
from germane.core.objective import Task
from germane.core.records import Data
from germane.core.statistics import bootstrap_mean, wilson
from germane.tasks.erase._pictures import Pictures
from germane.tasks.erase._pipeline import Condition, Pipeline

CONCEPT, OTHERS = "the concept", "other images"
SHIFT, RECOGNISED, ERROR = "shift", "recognised", "denoising error"
_MOST_OTHERS = 16  # other conditions that are drawn, the first of the records


@dataclass(frozen=True)
class Sitting:
    """What is drawn before and after, from the same noise.

    Attributes:
        task: `CONCEPT` or `OTHERS`.
        conditions: What each image is of.
        labels: What a judge should see in each; None where that is not known.
    """

    task: str
    conditions: Sequence[Condition]
    labels: Sequence[str | int | None]


def sittings(
    concept: Condition, forget: Pictures, keep: Pictures, samples: int, most: int = _MOST_OTHERS
) -> list[Sitting]:
    """`samples` images of each prompt or class of the records, the concept's and some others."""
    return [
        _sitting(CONCEPT, forget, samples, most, concept if isinstance(concept, str) else None),
        _sitting(OTHERS, keep, samples, most, None),
    ]


def _sitting(task: str, pictures: Pictures, samples: int, most: int, label: str | None) -> Sitting:
    """Labels are class numbers; of prompts, the concept, or what the records say."""
    seen: dict[Condition, str | int | None] = {}
    for condition, row in zip(pictures.conditions, pictures.rows, strict=True):
        named = condition if isinstance(condition, int) else label or row.get(pictures.data.label)
        seen.setdefault(condition, named)
    chosen = sorted(seen, key=str)[:most]
    return Sitting(
        task, [c for c in chosen for _ in range(samples)], [seen[c] for c in chosen for _ in range(samples)]
    )


def draw(pipeline: Pipeline, sitting: Sitting, seed: int, steps: int, guidance: float, size: int) -> Tensor:
    """The sitting's images, in batches; the same seed gives the same noise to every pipeline."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [
            pipeline.draw(sitting.conditions[start : start + size], generator, steps, guidance)
            for start in range(0, len(sitting.conditions), size)
        ]
    )


def shift(sitting: Sitting, before: Tensor, after: Tensor) -> Score:
    """Mean squared difference of the images from those of the untouched pipeline, an image an item."""
    values = (after - before).square().mean(dim=(1, 2, 3)).double().numpy()
    low, high = bootstrap_mean(values)
    return Score(
        subject="result", task=sitting.task, metric=SHIFT, value=float(values.mean()), n=len(values),
        low=low, high=high, higher_is_better=sitting.task == CONCEPT,
    )  # fmt: skip


def recognised(subject: str, sitting: Sitting, images: Tensor, judge: Loaded) -> Score | None:
    """Share of the images in which the judge sees what they should show; None if that is not known."""
    known = [number for number, label in enumerate(sitting.labels) if label is not None]
    if not known:
        return None
    data = Data(name=sitting.task, path=f"images of {sitting.task}")
    rows = [_judged(images[number], judge, data) | {"label": sitting.labels[number]} for number in known]
    task = Task(data, rows, judge.model, judge.processor)
    right = 0
    with torch.no_grad():
        for batch in task.batches(32):
            right += int((task.logits(batch).argmax(dim=1) == batch["labels"]).sum())
    low, high = wilson(right, len(known))
    return Score(
        subject=subject, task=sitting.task, metric=RECOGNISED, value=right / len(known), n=len(known),
        low=low, high=high, higher_is_better=sitting.task == OTHERS,
    )  # fmt: skip


def _judged(image: Tensor, judge: Loaded, data: Data) -> dict[str, Any]:
    """An image as a record that the judge reads: an image, or its pixels in order, from 0 to 255."""
    values = (image * 255).round().permute(1, 2, 0).numpy()
    if judge.processor is None:
        return dict(zip(judge.model.config.features, values.reshape(-1).tolist(), strict=True))
    return {data.image: (values[:, :, 0] if values.shape[2] == 1 else values).tolist()}


def check_judge(judge: Loaded, form: tuple[int, int, int], concept: Condition) -> None:
    """Refuse a judge that cannot see the images, or does not know the concept.

    Raises:
        SettingError: With what it knows.
    """
    config = judge.model.config
    pixels = int(np.prod(form))
    if judge.processor is None and len(config.features) != pixels:
        raise SettingError(
            f"judge: reads {len(config.features)} numbers, and an image of the pipeline has {pixels}."
        )
    try:
        Task(Data(name="judge", path="judge"), [_blank(form, judge) | {"label": concept}], judge.model,
             judge.processor)  # fmt: skip
    except RecordsError:
        names = ", ".join(list(config.label2id or {})[:12])
        raise SettingError(f"judge: has no class for the concept {concept!r}; it has {names}.") from None


def _blank(form: tuple[int, int, int], judge: Loaded) -> dict[str, Any]:
    return _judged(torch.zeros(form), judge, Data(name="judge", path="judge"))


@torch.no_grad()
def denoising_error(subject: str, pipeline: Pipeline, pictures: Pictures, seed: int, size: int) -> Score:
    """Mean squared error of what the unet predicts on these records, at random times from the seed."""
    generator, values = torch.Generator().manual_seed(seed), []
    for start in range(0, len(pictures), size):
        numbers = range(start, min(start + size, len(pictures)))
        latents = pipeline.encode(pictures.images(numbers, pipeline.image_form), generator)
        noise = pipeline.noise(len(numbers), generator)
        times = torch.randint(0, pipeline.times, (len(numbers),), generator=generator).to(latents.device)
        conditions = [pictures.conditions[number] for number in numbers]
        found = pipeline.predict(pipeline.schedule.add_noise(latents, noise, times), times, conditions)
        values += (found - pipeline.target(latents, noise, times)).square().mean(dim=(1, 2, 3)).tolist()
    low, high = bootstrap_mean(np.array(values))
    return Score(
        subject=subject, task=pictures.data.name, metric=ERROR, value=float(np.mean(values)), n=len(values),
        low=low, high=high, higher_is_better=False,
    )  # fmt: skip


def judge_scores(scores: Sequence[Score]) -> list[Finding]:
    """Findings on a pipeline that still draws the concept, or no longer draws the rest."""
    found = {(score.subject, score.task, score.metric): score for score in scores}
    findings = []
    concept, others = found["result", CONCEPT, SHIFT], found["result", OTHERS, SHIFT]
    if concept.value <= others.value:
        text = (
            f"images of the concept moved by {concept.value:.4f}, other images by {others.value:.4f}: the "
            "change does not single the concept out."
        )
        findings.append(Finding(code="not-specific", severity="warning", about="result", message=text))
    before, after = (found.get((subject, CONCEPT, RECOGNISED)) for subject in ("base", "result"))
    if before and after and after.high >= before.low:
        text = (
            f"the judge sees the concept in {after.value:.0%} of its images, before in {before.value:.0%}: "
            "it was not clearly erased."
        )
        findings.append(Finding(code="no-effect", severity="serious", about="result", message=text))
    before, after = (found.get((subject, OTHERS, RECOGNISED)) for subject in ("base", "result"))
    if before and after and after.value < 0.5 * before.value:
        text = (
            f"the judge recognises {after.value:.0%} of other images, before {before.value:.0%}: little is "
            "left of the pipeline."
        )
        findings.append(Finding(code="destroyed", severity="serious", about="result", message=text))
    return findings
