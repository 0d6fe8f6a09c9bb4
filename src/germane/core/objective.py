"""What a model is asked on a set of records: its loss, its entropy, its score.

One definition each, for classifiers and for language models, used by everything that trains,
chooses or evaluates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from germane.core.errors import CheckpointError, RecordsError
from germane.core.evidence import Score
from germane.core.records import Data, Row
from germane.core.statistics import bootstrap_mean, wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loss = Literal["cross-entropy", "entropy"]
Batch = dict[str, Tensor]
_IGNORED = -100


class Task:
    """Records together with the model that reads them.

    Args:
        data: Name and fields of the records.
        rows: The records.
        model: A sequence classifier (or regressor), or a causal language model.
        tokenizer: The model's own.

    Raises:
        CheckpointError: Another kind of model.
        RecordsError: A label the classifier does not know.
    """

    def __init__(
        self,
        data: Data,
        rows: Sequence[Row],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.data = data
        self.model = model
        self.tokenizer = tokenizer
        self.generative = bool(model.can_generate()) and not model.config.is_encoder_decoder
        if not self.generative and "SequenceClassification" not in type(model).__name__:
            raise CheckpointError(
                f"{model.config.name_or_path}: a {type(model).__name__} cannot be scored on {data.name!r}: "
                "germane reads records with sequence classifiers and causal language models."
            )
        self.rows = [self._encode(row, number) for number, row in enumerate(rows, 1)]

    @property
    def name(self) -> str:
        """The data's name."""
        return self.data.name

    @property
    def labelled(self) -> bool:
        """Whether every record says what is right."""
        return all("labels" in row for row in self.rows)

    def _encode(self, row: Row, number: int) -> Row:
        if self.generative:
            return self._encode_language(row, number)
        pair = row[self.data.pair] if self.data.pair else None
        encoded = dict(
            self.tokenizer(row[self.data.text], pair, truncation=True, max_length=self._length())
        )
        if row.get(self.data.label) not in (None, ""):
            encoded["labels"] = self._class(row[self.data.label], number)
        return encoded

    def _length(self) -> int:
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
        tokens = (prompt + answer + end)[: self._length()]
        labels = ([_IGNORED] * len(prompt) + answer + end)[: self._length()]
        if all(label == _IGNORED for label in labels[1:]):
            raise RecordsError(
                f"{self.data.path}, record {number}: nothing is left to predict in its first "
                f"{self._length()} tokens; raise max_tokens, or leave the record out."
            )
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}

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
        return sorted(range(len(self.rows)), key=lambda index: len(self.rows[index]["input_ids"]))

    def _pad(self, rows: list[Row]) -> Batch:
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.tokenizer.pad_token_id or 0, "labels": _IGNORED}
        batch = {}
        for name in [name for name in rows[0] if all(name in row for row in rows)]:
            values = [row[name] for row in rows]
            if isinstance(values[0], list):
                values = [value + [fill.get(name, 0)] * (width - len(value)) for value in values]
            batch[name] = torch.tensor(values, device=self.model.device)
        return batch

    def losses(self, batch: Batch, loss: Loss) -> Tensor:
        """(records,) cross-entropy or entropy in nats; of language, the mean over target tokens."""
        labels = batch.get("labels")
        if loss == "cross-entropy" and labels is None:
            raise RecordsError(f"{self.data.path}: has no field {self.data.label!r}, so no loss.")
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.model(**inputs).logits
        if self.generative:
            return _language_losses(logits, batch["labels"], loss)
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


def _language_losses(logits: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """(records,) mean over the target tokens, each predicted from the tokens before it."""
    logits, targets = logits[:, :-1], labels[:, 1:]
    counted = targets != _IGNORED
    if loss == "entropy":
        values = entropy(logits)
    else:
        values = functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none", ignore_index=_IGNORED
        )
    return (values * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the distribution over the last dimension."""
    log_probabilities = logits.log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
