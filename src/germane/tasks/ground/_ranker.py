"""A small model that scores pairs of texts: a question and a context, or a state and a plan."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from germane.core.checkpoint import Checkpoint
from germane.core.device import device
from germane.core.embedding import Encoder
from germane.core.errors import CheckpointError, RecordsError
from germane.core.records import Data, Row, open_rows
from germane.core.training import Training, fit
from germane.embedded import model_folder

Pair = tuple[str, str]
QUESTION, CONTEXT, LABEL = "question", "context", "label"
_FIRST_TOKENS, _TOKENS = 70, 512


class Ranker:
    """Pairs of texts to scores between 0 and 1.

    A sequence classifier reads both texts at once, as [CLS] first [SEP] second [SEP], and gives the
    sigmoid of its one number, or the probability of the second of its two classes. An encoder without a
    classifier's head that was not trained either gives the cosine of both texts, 0 where it is negative:
    it sees what a text is about, and not whether it is true.

    Args:
        name: smollm2 or minilm, a folder, or a hub id.
        trained: Whether `train` comes next: the classifier's head is then made new where there is none.
    """

    def __init__(self, name: str, trained: bool = False) -> None:
        folder = model_folder(name)
        self._encoder: Encoder | None = None
        self._model: Any = None
        self._tokenizer: Any = None
        if trained or is_classifier(folder):
            self._load(folder)
        else:
            self._encoder = Encoder(folder)

    def _load(self, folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        outputs: dict[str, Any] = {} if is_classifier(folder) else {"num_labels": 1}
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of a new head
            self._model = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, **outputs
            ).to(device())
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        classes = self._model.config.num_labels
        if classes > 2:
            raise CheckpointError(f"{folder}: has {classes} classes; what scores pairs has 1 or 2.")
        self._model.eval()

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """A score for each pair, in their order."""
        if not pairs:
            return []
        if self._encoder is not None:
            firsts, seconds = (self._encoder([pair[side] for pair in pairs]) for side in (0, 1))
            return [float(value) for value in (firsts * seconds).sum(dim=1).clamp(0, 1)]
        with torch.no_grad():
            parts = [self._logits(pairs[start : start + 16]) for start in range(0, len(pairs), 16)]
        return [float(value) for value in torch.cat(parts).sigmoid()]

    def _logits(self, pairs: Sequence[Pair]) -> Tensor:
        """(pairs,) log-odds of the pair being good."""
        firsts = [self._cut(first) for first, _ in pairs]
        longest = min(_TOKENS, getattr(self._model.config, "max_position_embeddings", None) or _TOKENS)
        batch = self._tokenizer(
            firsts, [second for _, second in pairs], padding=True, truncation="only_second",
            max_length=longest, split_special_tokens=True, return_tensors="pt",
        ).to(self._model.device)  # fmt: skip
        logits: Tensor = self._model(**batch).logits
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    def _cut(self, text: str) -> str:
        """The text without its question mark, cut so that the second text has room."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        text = text[: ends[_FIRST_TOKENS - 1]] if len(ends) > _FIRST_TOKENS else text
        return text.strip().removesuffix("?")

    def train(self, rows: Sequence[Row], settings: Training, seed: int) -> None:
        """Learn to tell good pairs from bad ones, by binary cross-entropy.

        A good and a bad pair of the same question are in the same batch, good ones drawn once each an
        epoch, the bad one beside each drawn at random.

        Args:
            rows: Records with `question`, `context` and `label`, 1 for good and 0 for bad.
            settings: Of the training.
            seed: Of the order and of what is drawn.
        """
        good, bad = (_by_question(rows, label) for label in (1, 0))
        couples = [(question, text) for question, texts in good.items() for text in texts if bad[question]]

        def batches(epoch: int) -> Iterator[list[tuple[Pair, int]]]:
            generator = random.Random(f"{seed}/{epoch}")
            order = generator.sample(couples, len(couples))
            for start in range(0, len(order), settings.batch_size):
                batch = []
                for question, text in order[start : start + settings.batch_size]:
                    batch.append(((question, text), 1))
                    batch.append(((question, generator.choice(bad[question])), 0))
                yield batch

        def loss(batch: list[tuple[Pair, int]]) -> Tensor:
            labels = torch.tensor([float(label) for _, label in batch], device=self._model.device)
            return functional.binary_cross_entropy_with_logits(
                self._logits([pair for pair, _ in batch]), labels
            )

        self._model.requires_grad_(True).train()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            steps = -(-len(couples) // settings.batch_size)
            fit(self._model, settings, batches, steps, loss, label="training the scorer")
        self._model.eval()


def is_classifier(folder: Path) -> bool:
    """Whether a model folder holds a sequence classifier."""
    return "SequenceClassification" in str(Checkpoint(folder).config.get("architectures"))


def read_labelled(path: str) -> list[Row]:
    """Records to train a scorer on.

    Raises:
        RecordsError: A field is missing, a label is neither 0 nor 1, or no question has both.
    """
    rows = open_rows(Data(name="labelled", path=path))
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(name), str) and row[name].strip() for name in (QUESTION, CONTEXT)):
            raise RecordsError(f"{path}, record {number}: needs texts in {QUESTION!r} and {CONTEXT!r}.")
        if row.get(LABEL) not in (0, 1):
            raise RecordsError(f"{path}, record {number}: {LABEL!r} must be 1 (good) or 0 (bad).")
    good, bad = (_by_question(rows, label) for label in (1, 0))
    if not good.keys() & bad.keys():
        raise RecordsError(f"{path}: no question has both a good context and a bad one to learn from.")
    return rows


def _by_question(rows: Sequence[Row], label: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row[LABEL] == label:
            found[row[QUESTION]].append(row[CONTEXT])
    return found
