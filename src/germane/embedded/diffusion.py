"""A tiny pipeline that draws scikit-learn's digits by class, and a judge that reads them.

It shows what a method of erasing does, in a minute on one core; it says nothing about what large
pipelines know.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from germane.core.errors import MissingExtra
from germane.core.records import Row, write_jsonl
from germane.core.training import Training, fit
from germane.embedded import digits

CLASSES = 10
NO_CLASS = 10  # the class number that stands for none, for guidance
_SIDE = 8
_LARGEST = 16  # of the data set's pixels
_UNNAMED = 0.1  # share of training images whose class is not told


@dataclass(frozen=True)
class Drawings:
    """Folders and files to erase a digit with.

    Attributes:
        pipeline: Draws each of the ten digits.
        judge: A classifier of rows of pixels from 0 to 255.
        files: Training images: "forget" of the digit to erase, "keep" of the others; "test": images of
            all that neither has seen.
    """

    pipeline: Path
    judge: Path
    files: dict[str, Path]


def make(folder: Path, seed: int = 0, forget_class: int = 3, steps: int = 800) -> Drawings:
    """Train the pipeline and the judge, and write the records.

    Args:
        folder: Where everything goes.
        seed: Of the split and of the training.
        forget_class: The digit to erase.
        steps: Batches to train the pipeline for.
    """
    training, test = digits.records(seed)
    parts = {
        "forget": [row for row in training if row["label"] == forget_class],
        "keep": [row for row in training if row["label"] != forget_class],
        "test": test,
    }
    files = {name: folder / f"{name}.jsonl" for name in parts}
    for name, rows in parts.items():
        write_jsonl([picture(row) for row in rows], files[name])
    return Drawings(
        train(training, folder / "pipeline", seed, steps), _judge(training, folder / "judge", seed), files
    )


def picture(row: Row) -> Row:
    """A digit as an image record: eight rows of pixels from 0 to 255, and the label."""
    values = [round(row[name] * 255 / _LARGEST) for name in digits.FEATURES]
    rows = [values[start : start + _SIDE] for start in range(0, len(values), _SIDE)]
    return {"image": rows, "label": row["label"]}


def train(rows: list[Row], folder: Path, seed: int, steps: int) -> Path:
    """A pipeline folder of diffusers, trained on these digits: a network with classes, and its schedule."""
    try:
        from diffusers import DDPMPipeline, DDPMScheduler
    except ImportError:
        raise MissingExtra("diffusers", "diffusion", "a pipeline") from None
    torch.manual_seed(seed)
    network, schedule = _network(), DDPMScheduler()
    images = torch.tensor([[row[name] for name in digits.FEATURES] for row in rows])
    images = images.float().view(-1, 1, _SIDE, _SIDE) / (_LARGEST / 2) - 1
    labels = torch.tensor([row["label"] for row in rows])

    def loss(chosen: list[int]) -> Tensor:
        noise = torch.randn(len(chosen), 1, _SIDE, _SIDE)
        times = torch.randint(0, schedule.config.num_train_timesteps, (len(chosen),))
        named = torch.rand(len(chosen)) >= _UNNAMED
        classes = labels[chosen].where(named, torch.tensor(NO_CLASS))
        noisy = schedule.add_noise(images[chosen], noise, times)
        return (network(noisy, times, class_labels=classes).sample - noise).square().mean()

    settings = Training(learning_rate=3e-3, batch_size=64, epochs=1, schedule="cosine")
    fit(network, settings, lambda epoch: _batches(len(rows), steps, seed), steps, loss, label="digits")
    DDPMPipeline(network, schedule).save_pretrained(folder)
    return folder


def _network() -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=_SIDE, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=CLASSES + 1,
    )  # fmt: skip


def _batches(count: int, steps: int, seed: int, size: int = 64) -> Iterator[list[int]]:
    generator = random.Random(seed)
    for _ in range(steps):
        yield generator.sample(range(count), size)


def _judge(rows: list[Row], folder: Path, seed: int) -> Path:
    """The classifier of `digits`, made to read pixels from 0 to 255."""
    from germane.core.rows import RowClassifier

    digits.train(rows, folder, seed)
    model = RowClassifier.from_pretrained(folder)
    model.config.scales = [255.0] * len(digits.FEATURES)
    model.config.save_pretrained(folder)
    return folder
