"""What a model is asked on a set of records: its loss, its entropy, its score.

One definition each, for language models and for classifiers of texts, images and rows of numbers, used
by everything that trains, chooses or evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from germane.core.errors import CheckpointError, RecordsError, nearest
from germane.core.evidence import Score
from germane.core.models import is_language_model
from germane.core.records import Data, Row
from germane.core.statistics import bootstrap_mean, wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loss = Literal["cross-entropy", "entropy"]
Batch = dict[str, Tensor]
IGNORED = -100  # the label of what is not to be predicted


class Task:
    """Records together with the model that reads them.

    Args:
        data: Name and fields of the records.
        rows: The records.
        model: A causal language model, or a classifier (or regressor) of texts, images or rows of
            numbers.
        processor: The model's tokenizer or image processor; None for rows of numbers.
        split: Cut a text that is too long into several records; otherwise its end is left out.

    Raises:
        CheckpointError: Another kind of model.
        RecordsError: A label the classifier does not know, or a record it cannot read.
    """

    def __init__(
        self,
        data: Data,
        rows: Sequence[Row],
        model: PreTrainedModel,
        processor: Any,
        split: bool = False,
    ) -> None:
        self.data = data
        self.model = model
        self.processor = processor
        self.generative = is_language_model(model)
        self.origin: list[int] = []  # of each encoded record, the number of its row
        encode = self._encoder()
        self.rows = []
        for number, row in enumerate(rows, 1):
            parts = [encode(row, number)]
            if split and self.generative and data.prompt not in row:
                parts = list(self._split_text(row, number))
            self.rows += parts
            self.origin += [number - 1] * len(parts)

    def _encoder(self) -> Callable[[Row, int], Row]:
        if self.generative:
            return self._encode_language
        kind = type(self.model).__name__
        if "ImageClassification" in kind:
            return self._encode_image
        if kind == "RowClassifier":
            return self._encode_numbers
        if "SequenceClassification" in kind:
            return self._encode_text
        raise CheckpointError(
            f"{self.model.config.name_or_path}: a {kind} cannot be scored on {self.data.name!r}: germane "
            "reads records with causal language models and classifiers of texts, images and rows."
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor of a model that reads text."""
        return self.processor

    @property
    def name(self) -> str:
        """The data's name."""
        return self.data.name

    @property
    def labelled(self) -> bool:
        """Whether every record says what is right."""
        return all("labels" in row for row in self.rows)

    def _encode_text(self, row: Row, number: int) -> Row:
        pair = row[self.data.pair] if self.data.pair else None
        encoded = dict(self.tokenizer(row[self.data.text], pair, truncation=True, max_length=self.longest))
        return encoded | self._labels(row, number)

    def _encode_image(self, row: Row, number: int) -> Row:
        from germane.core.images import read_image

        value = row.get(self.data.image)
        if value is None:
            raise RecordsError(
                f"{self.data.path}, record {number}: has no image in field {self.data.image!r}"
                f"{nearest(self.data.image, row)} Fields: {', '.join(row)}."
            )
        place = Path(self.data.path).expanduser().parent
        image = read_image(value, place, f"{self.data.path}, record {number}")
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels} | self._labels(row, number)

    def _encode_numbers(self, row: Row, number: int) -> Row:
        try:
            values = [float(row[name]) for name in self.model.config.features]
        except KeyError as error:
            raise RecordsError(
                f"{self.data.path}, record {number}: has no field {error.args[0]!r}, which the model reads."
            ) from None
        except (TypeError, ValueError):
            raise RecordsError(f"{self.data.path}, record {number}: a field is no number.") from None
        if not np.isfinite(values).all():
            raise RecordsError(f"{self.data.path}, record {number}: a field is NaN or infinite.")
        return {"values": torch.tensor(values)} | self._labels(row, number)

    def _labels(self, row: Row, number: int) -> Row:
        if row.get(self.data.label) in (None, ""):
            return {}
        return {"labels": self._class(row[self.data.label], number)}

    @property
    def longest(self) -> int:
        """Tokens of a record that are read."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or self.data.max_tokens
        return min(self.data.max_tokens, limit)

    def _encode_language(self, row: Row, number: int) -> Row:
        """Tokens and targets; of a prompt and an answer only the answer's tokens are targets."""
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        if self.data.prompt in row:
            prompt = self.tokenizer(row[self.data.prompt])["input_ids"]
            answer = self.tokenizer(row[self.data.answer], add_special_tokens=False)["input_ids"]
        else:
            prompt, answer = [], self.tokenizer(row[self.data.text])["input_ids"]
        tokens = (prompt + answer + end)[: self.longest]
        labels = ([IGNORED] * len(prompt) + answer + end)[: self.longest]
        if all(label == IGNORED for label in labels[1:]):
            raise RecordsError(
                f"{self.data.path}, record {number}: nothing is left to predict in its first "
                f"{self.longest} tokens; raise max_tokens, or leave the record out."
            )
        return language_row(tokens, labels)

    def _split_text(self, row: Row, number: int) -> Iterator[Row]:
        """A text as pieces of at most `max_tokens`, each read on its own."""
        self._encode_language(row, number)  # refuses what cannot be predicted at all
        tokens = self.tokenizer(row[self.data.text])["input_ids"]
        for start in range(0, len(tokens), self.longest):
            piece = tokens[start : start + self.longest]
            if len(piece) > 1:
                yield language_row(piece, piece)

    def _class(self, label: Any, number: int) -> int | float:
        config = self.model.config
        if config.num_labels == 1:
            try:
                return float(label)
            except ValueError:
                raise RecordsError(
                    f"{self.data.path}, record {number}: label {label!r} is no number, and the model "
                    "predicts one."
                ) from None
        names = {str(name): index for name, index in (config.label2id or {}).items()}
        if str(label) in names:
            return names[str(label)]
        if str(label).isdigit() and int(label) < config.num_labels:
            return int(label)
        raise RecordsError(
            f"{self.data.path}, record {number}: label {label!r} is none of the model's "
            f"{config.num_labels}: {', '.join(list(names)[:12])}."
        )

    def batches(self, size: int, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """The records in padded batches on the model's device."""
        picked = list(range(len(self.rows))) if order is None else list(order)
        for start in range(0, len(picked), size):
            yield self._pad([self.rows[index] for index in picked[start : start + size]])

    def sorted_order(self) -> list[int]:
        """Record numbers by length, so that batches need little padding."""
        return sorted(range(len(self.rows)), key=lambda index: len(self.rows[index].get("input_ids", ())))

    def _pad(self, rows: list[Row]) -> Batch:
        width = max((len(row["input_ids"]) for row in rows if "input_ids" in row), default=0)
        fill = {"labels": IGNORED}
        if width:
            fill["input_ids"] = self.tokenizer.pad_token_id or 0
        batch = {}
        for name in [name for name in rows[0] if all(name in row for row in rows)]:
            values = [row[name] for row in rows]
            if isinstance(values[0], Tensor):
                batch[name] = torch.stack(values).to(self.model.device)
                continue
            if isinstance(values[0], list):
                values = [value + [fill.get(name, 0)] * (width - len(value)) for value in values]
            batch[name] = torch.tensor(values, device=self.model.device)
        return batch

    def logits(self, batch: Batch) -> Tensor:
        """The model's logits: (records, classes), or (records, tokens, vocabulary)."""
        return self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits

    def losses(self, batch: Batch, loss: Loss) -> Tensor:
        """(records,) cross-entropy or entropy in nats; of language, the mean over target tokens."""
        labels = batch.get("labels")
        if loss == "cross-entropy" and labels is None:
            raise RecordsError(f"{self.data.path}: has no field {self.data.label!r}, so no loss.")
        return self.losses_of(self.logits(batch), labels, loss)

    def losses_of(self, logits: Tensor, labels: Tensor | None, loss: Loss) -> Tensor:
        """The same from logits that are there already."""
        if self.generative:
            return _language_losses(logits, labels, loss)
        if self.model.config.num_labels == 1 and labels is not None:
            return functional.mse_loss(logits[:, 0], labels.float(), reduction="none")
        if loss == "entropy" or labels is None:
            return entropy(logits)
        return functional.cross_entropy(logits, labels, reduction="none")

    @torch.no_grad()
    def score(self, subject: str, batch_size: int = 32) -> Score:
        """Accuracy of a classifier; perplexity of a language model; error of a regressor."""
        if not self.labelled:
            raise RecordsError(f"{self.data.path}: records without {self.data.label!r} have no score.")
        self.model.eval()
        if self.generative or self.model.config.num_labels == 1:
            return self._score_loss(subject, batch_size)
        right = 0
        for batch in self.batches(batch_size, self.sorted_order()):
            labels = batch.pop("labels")
            right += int((self.model(**batch).logits.argmax(dim=1) == labels).sum())
        n = len(self.rows)
        low, high = wilson(right, n)
        return Score(
            subject=subject,
            task=self.name,
            metric="accuracy",
            value=right / n,
            n=n,
            low=low,
            high=high,
        )

    def _score_loss(self, subject: str, batch_size: int) -> Score:
        losses: list[float] = []
        for batch in self.batches(batch_size, self.sorted_order()):
            losses += self.losses(batch, "cross-entropy").tolist()
        values = np.array(losses)
        low, high = bootstrap_mean(values)
        mean = float(values.mean())
        metric = "squared error"
        if self.generative:
            metric, mean, low, high = "perplexity", *(float(np.exp(v)) for v in (mean, low, high))
        return Score(
            subject=subject, task=self.name, metric=metric, value=mean, n=len(values),
            low=low, high=high, higher_is_better=False,
        )  # fmt: skip


def language_row(tokens: list[int], labels: list[int]) -> Row:
    """A record of language: tokens, and the label of each, `IGNORED` where it is not to be predicted."""
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def next_tokens(labels: Tensor) -> Tensor:
    """(records, tokens) what each position predicts: the label after it, or ignored at the end."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats at every position, 0 where nothing is predicted; and where something is.

    Args:
        logits: (records, tokens, vocabulary).
        labels: (records, tokens), -100 where a token is not to be predicted.

    Returns:
        (records, tokens) losses, and (records, tokens) whether the position counts.
    """
    targets = next_tokens(labels)
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.view_as(targets), targets != IGNORED


def _language_losses(logits: Tensor, labels: Tensor | None, loss: Loss) -> Tensor:
    """(records,) mean over the target tokens, each predicted from the tokens before it."""
    assert labels is not None  # of language, every token is a label
    if loss == "entropy":
        counted = next_tokens(labels) != IGNORED
        values = entropy(logits)
    else:
        values, counted = token_losses(logits, labels)
    return (values * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the distribution over the last dimension."""
    log_probabilities = logits.log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
