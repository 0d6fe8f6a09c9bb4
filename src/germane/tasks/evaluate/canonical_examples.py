"""Canonical examples: whether a model does in other words what simple sentences asked of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from germane.core.errors import RecordsError
from germane.core.evidence import Score, Step
from germane.core.models import Loaded
from germane.core.objective import IGNORED, Task, language_row, token_losses
from germane.core.progress import track
from germane.core.records import Data, Row, open_rows, read_rows
from germane.core.statistics import bootstrap_mean, wilson
from germane.edited import Edit, Pair
from germane.method import method
from germane.roles import Records
from germane.suite import Measured, Suite

EXAMPLES, NEGATIVES, GENERAL = "examples", "hard-negatives", "general"
# Field of a record -> of an edit; the last four as published.
_NAMES = {
    "other": "other", "loss": "loss",
    "prefix": "prompt", "suffix": "answer", "suffix1": "answer", "suffix2": "other",
}  # fmt: skip


@method(
    "evaluate/canonical-examples",
    paper="2402.06155",
    code="john-hewitt/model-editing-canonical-examples",
    needs=("language model",),
)
class CanonicalExamples(Suite):
    """Share of examples in other words on which a model does as asked, and what it cost elsewhere.

    Hewitt et al., "Model Editing with Canonical Examples", 2024. Of an item with prefix and suffix, or two
    suffixes, the loss is worked out from the summed NLL of the suffixes: NLL ("good"), -NLL ("bad"),
    NLL1 - NLL2 ("good-v-bad") or |NLL1 - NLL2| ("balance"). It is a success where the loss is at most the
    threshold of its kind. Published thresholds: good, -ln 0.2 of capitals and -ln 0.05 of company heads and
    of facts that changed; bad, ln 0.001 of stereotypes; good-v-bad, ln(1/16) of verb agreement; balance,
    ln 1.5 of pronouns. The paper's result is success after less success before: "result" less "base".

    "hard-negatives" are prompts where the new behaviour would be wrong, each with its right answer: their
    mean NLL should not rise. "general" texts give the loss, of which the paper allows a relative rise of
    0.001, 0.0001 or 0.00001.

    Use it when a model was changed by examples, on items in wordings that it was not changed with.
    Not with the examples themselves, which a model can learn by heart.

    Differs from the code: the general loss is the mean over texts of a text's mean, and every text ends
    with the tokenizer's end token. Suffixes are read as they are; where a tokenizer wants no blank before
    them, the records must not have it.
    """

    roles: ClassVar[Mapping[str, str]] = {EXAMPLES: "items: a prompt and an answer, or two answers"}
    optional: ClassVar[Mapping[str, str]] = {
        NEGATIVES: "prompts where the new behaviour would be wrong, and their answers",
        GENERAL: "texts that have nothing to do with the examples",
    }

    loss: Literal["own", "good", "bad", "good-v-bad", "balance"] = Field(
        default="own", description="what is wanted of every item; own: what its record says"
    )
    good: float = Field(default=-math.log(0.2), description="largest loss of a success, of loss good")
    bad: float = Field(default=math.log(0.001), description="the same of loss bad")
    good_v_bad: float = Field(default=math.log(1 / 16), description="the same of loss good-v-bad")
    balance: float = Field(default=math.log(1.5), ge=0, description="the same of loss balance")

    def check_records(self, records: Records) -> None:
        if EXAMPLES not in records:
            super().check_records(records)
        for role, data in records.items():
            if role == GENERAL:
                read_rows(data)
            else:
                self.items(data)

    def items(self, data: Data) -> list[Edit]:
        """The records as examples.

        Raises:
            RecordsError: One lacks an answer, or the second answer that its loss weighs.
        """
        return [self._item(row, data, number) for number, row in enumerate(open_rows(data), 1)]

    def _item(self, row: Row, data: Data, number: int) -> Edit:
        place = f"{data.path}, record {number}"
        named = {data.prompt: "prompt", data.answer: "answer", **_NAMES}
        found = {name: row[field] for field, name in named.items() if row.get(field)}
        if self.loss != "own":
            found["loss"] = self.loss
        elif "other" in found:
            found.setdefault("loss", "good-v-bad")
        try:
            item = Edit(id=str(number), **found)
        except ValidationError as error:
            first = error.errors()[0]
            raise RecordsError(
                f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}. An item needs a prompt and "
                f"an answer. Fields: {', '.join(row)}."
            ) from None
        if item.loss in ("good-v-bad", "balance") and not item.other:
            raise RecordsError(f"{place}: loss {item.loss} weighs two answers: it needs a field 'other'.")
        return item

    def score(
        self, subject: str, loaded: Loaded, records: Records, calibration: Any, step: Step
    ) -> Measured:
        found = Measured()
        self._score_examples(subject, loaded, records[EXAMPLES], found)
        if NEGATIVES in records:
            self._score_negatives(subject, loaded, records[NEGATIVES], found)
        if GENERAL in records:
            data = records[GENERAL]
            task = Task(data, read_rows(data), loaded.model, loaded.processor)
            values = [
                float(value)
                for batch in task.batches(8, task.sorted_order())
                for value in task.losses(batch, "cross-entropy").detach()
            ]
            found.scores.append(_mean(subject, data.name, "general loss", values))
        return found

    def _score_examples(self, subject: str, loaded: Loaded, data: Data, found: Measured) -> None:
        items = self.items(data)
        limits = {
            "good": self.good, "bad": self.bad, "good-v-bad": self.good_v_bad, "balance": self.balance,
        }  # fmt: skip
        losses = item_losses(loaded, items)
        right = [loss <= limits[item.loss] for loss, item in zip(losses, items, strict=True)]
        low, high = wilson(sum(right), len(right))
        found.scores.append(
            Score(
                subject=subject, task=data.name, metric="success", value=sum(right) / len(right),
                n=len(right), low=low, high=high,
            )
        )  # fmt: skip
        for item, loss, success in zip(items, losses, right, strict=True):
            found.items.append(_row(EXAMPLES, item, loss) | {"success": success})

    def _score_negatives(self, subject: str, loaded: Loaded, data: Data, found: Measured) -> None:
        items = [item.model_copy(update={"loss": "good"}) for item in self.items(data)]
        losses = item_losses(loaded, items)
        found.scores.append(_mean(subject, data.name, "NLL of hard negatives", losses))
        found.items += [_row(NEGATIVES, item, loss) for item, loss in zip(items, losses, strict=True)]


def item_losses(loaded: Loaded, items: Sequence[Edit]) -> list[float]:
    """The loss of each item, of summed NLL in nats."""
    found = []
    for item in track(items, "scoring examples", len(items)):
        first = suffix_loss(loaded, (item.prompt, item.answer))
        two = item.loss in ("good-v-bad", "balance")
        other = suffix_loss(loaded, (item.prompt, item.other)) if two else None
        found.append(float(item.weigh(first, other)))
    return found


@torch.no_grad()
def suffix_loss(loaded: Loaded, pair: Pair) -> Tensor:
    """The summed NLL in nats of an answer's tokens after its prompt, each after those before it."""
    prompt = loaded.processor(pair[0])["input_ids"]
    answer = loaded.processor(pair[1], add_special_tokens=False)["input_ids"]
    row = language_row([*prompt, *answer], [IGNORED] * len(prompt) + list(answer))
    batch = {name: torch.tensor([values], device=loaded.model.device) for name, values in row.items()}
    labels = batch.pop("labels")
    losses, _ = token_losses(loaded.model.eval()(**batch).logits, labels)
    return losses.sum()


def _row(role: str, item: Edit, loss: float) -> Row:
    kept = {"prompt": item.prompt, "answer": item.answer, "other": item.other, "loss": item.loss}
    return {"role": role, **kept, "score": loss}


def _mean(subject: str, task: str, metric: str, values: Sequence[float]) -> Score:
    low, high = bootstrap_mean(np.array(values))
    return Score(
        subject=subject, task=task, metric=metric, value=float(np.mean(values)), n=len(values),
        low=low, high=high, higher_is_better=False,
    )  # fmt: skip
