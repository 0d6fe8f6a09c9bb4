"""scikit-learn's handwritten digits as rows of 64 numbers, and a small network that knows them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from germane.core.errors import MissingExtra
from germane.core.objective import Task
from germane.core.records import Data, Row, write_jsonl
from germane.core.rows import RowClassifier, RowConfig
from germane.core.training import Training, fit

FEATURES = [f"pixel{number}" for number in range(64)]
_TRAINING, _TEST = 900, 400


@dataclass(frozen=True)
class Digits:
    """Folders and files to unlearn a class, or some records, with.

    Attributes:
        model: Was trained on the forget and the retain records.
        initial: The same network before any training.
        files: "forget" and "retain" records, "holdout" (like the forget records, never seen), and
            "test" (like the retain records).
    """

    model: Path
    initial: Path
    files: dict[str, Path]


def records(seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Training and test records, shuffled."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("scikit-learn", "demo", "the digits") from None
    pixels, labels = load_digits(return_X_y=True)
    order = random.Random(seed).sample(range(len(labels)), _TRAINING + _TEST)
    rows = [
        {**dict(zip(FEATURES, pixels[index].tolist(), strict=True)), "label": int(labels[index])}
        for index in order
    ]
    return rows[:_TRAINING], rows[_TRAINING:]


def train(rows: list[Row], folder: Path, seed: int = 0, epochs: int = 30) -> Path:
    """A model folder trained on these records, the untrained network beside it in `initial`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    scales = [16.0] * len(FEATURES)
    model = RowClassifier(RowConfig(features=FEATURES, hidden=[256, 256], scales=scales, num_labels=10))
    model.save_pretrained(folder / "initial")
    task = Task(Data(name="digits", path="digits"), rows, model, None)
    settings = Training(learning_rate=0.1, optimiser="sgd", epochs=epochs)
    generator = random.Random(seed)
    fit(
        model, settings, lambda epoch: task.batches(64, generator.sample(range(len(rows)), len(rows))),
        -(-len(rows) // 64), lambda batch: task.losses(batch, "cross-entropy").mean(),
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def make(folder: Path, seed: int = 0, forget_class: int | None = 3, forget_count: int = 90) -> Digits:
    """Train the network and write the records.

    Args:
        folder: Where everything goes.
        seed: Of the split and of the training.
        forget_class: The digit to forget; None for records of all classes.
        forget_count: How many records to forget then.
    """
    training, test = records(seed)
    if forget_class is None:
        parts = {
            "forget": training[:forget_count], "retain": training[forget_count:],
            "holdout": test[:forget_count], "test": test[forget_count:],
        }  # fmt: skip
    else:
        parts = {
            name: [row for row in rows if (row["label"] == forget_class) is inside]
            for name, rows, inside in (
                ("forget", training, True), ("retain", training, False),
                ("holdout", test, True), ("test", test, False),
            )
        }  # fmt: skip
    files = {name: folder / f"{name}.jsonl" for name in parts}
    for name, rows in parts.items():
        write_jsonl(rows, files[name])
    model = train(training, folder / "model", seed)
    return Digits(model, model / "initial", files)
