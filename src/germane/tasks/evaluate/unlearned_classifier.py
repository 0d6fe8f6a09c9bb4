"""UA, RA, TA and MIA-efficacy of a classifier that has unlearned, and their gap to a retrained one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from germane.core.errors import MissingExtra, RecordsError
from germane.core.evidence import Finding, Score, Step
from germane.core.models import Loaded
from germane.core.objective import Task
from germane.core.records import Data, Row, read_rows
from germane.core.statistics import wilson
from germane.method import method
from germane.roles import Records
from germane.suite import Measured, Suite

UNLEARNING, RETAIN, TEST, ATTACK = (
    "unlearning accuracy", "retain accuracy", "test accuracy", "MIA efficacy",
)  # fmt: skip
GAP = "average gap"


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of the records of one role.

    Attributes:
        labels: (records,) the true classes.
        predicted: (records,) the likeliest classes.
        confidence: (records,) softmax probabilities of the true classes.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]

    @property
    def right(self) -> int:
        """Records whose class is found."""
        return int((self.labels == self.predicted).sum())


@method(
    "evaluate/unlearned-classifier",
    paper="2310.12508",
    code="OPTML-Group/Unlearn-Saliency",
    needs=("classifier",),
)
class UnlearnedClassifier(Suite):
    """Accuracies on forget, retain and test records, an attack, and the gap to a retrained classifier.

    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
    Classification and Generation", ICLR 2024: the metrics of its tables of classifiers, as shares.
    Unlearning accuracy (UA) is 1 - accuracy on the forget records, retain accuracy (RA) and test
    accuracy (TA) are accuracies. MIA efficacy is the share of the forget records that a support vector
    machine takes for records never trained on. It sees only the probability of the true class, and
    learns from as many of the first retain records as there are test records, and from the test
    records. To forget a class, the test records are those without it.

    A high value is not always a good one: what counts is the distance from a model retrained without
    the forget records, the average gap over the four. Its interval is made of the ends of the four
    intervals, so it is wider than 95 %; the retrained model's own numbers are taken as they are.

    Use it when a classifier has unlearned records or a class, best with --retrained.
    Not when records must be hidden from a strong attacker: this attack is a weak one.

    Differs from the official code: the run time (RTE) is not a score but the step's own seconds; of
    the attacks only the one on confidence is there, the one of the paper.
    """

    roles: ClassVar[Mapping[str, str]] = {
        "forget": "records that were unlearned",
        "retain": "records that were trained on and kept",
        "test": "records like the retain records that were never trained on",
    }

    def check_records(self, records: Records) -> None:
        """Roles, labels, and the library of the attack."""
        super().check_records(records)
        _svc()
        for role in self.roles:
            _require_labels(records[role], read_rows(records[role]))

    def calibrate(self, retrained: Loaded | None, records: Records) -> dict[str, float] | None:
        """The four numbers of the retrained model."""
        if retrained is None:
            return None
        scores = self._scores("retrained", _predict_roles(retrained, records))[0]
        return {score.metric: score.value for score in scores}

    def score(
        self, subject: str, loaded: Loaded, records: Records, calibration: Any, step: Step
    ) -> Measured:
        """The four numbers, and their gap to the retrained model's where there is one."""
        found = _predict_roles(loaded, records)
        if len(found["retain"].labels) < len(found["test"].labels):
            _note_few(step, len(found["retain"].labels), len(found["test"].labels))
        scores, others = self._scores(subject, found)
        if calibration is not None:
            scores.append(average_gap(subject, scores, calibration))
        return Measured(scores, _items(found, others))

    def _scores(
        self, subject: str, found: Mapping[str, Predictions]
    ) -> tuple[list[Score], NDArray[np.bool_]]:
        """The four scores, and of each forget record whether the attack takes it for a non-member."""
        forget, retain, test = (found[role] for role in self.roles)
        members = retain.confidence[: len(test.confidence)]
        others = non_members(members, test.confidence, forget.confidence)
        scores = [
            _share(subject, "forget", UNLEARNING, len(forget.labels) - forget.right, len(forget.labels)),
            _share(subject, "retain", RETAIN, retain.right, len(retain.labels)),
            _share(subject, "test", TEST, test.right, len(test.labels)),
            _share(subject, "forget", ATTACK, int(others.sum()), len(others)),
        ]
        return scores, others


def non_members(
    members: NDArray[np.float32], others: NDArray[np.float32], asked: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Whether an attack that saw the confidences of members and others takes each asked one for another's.

    Args:
        members: (m,) confidences of records that were trained on.
        others: (n,) confidences of records that were not.
        asked: (k,) confidences to judge.
    """
    machine = _svc()(C=3, kernel="rbf", gamma="auto")
    seen = np.concatenate([members, others]).reshape(-1, 1)
    machine.fit(seen, np.concatenate([np.ones(len(members)), np.zeros(len(others))]))
    judged: NDArray[np.bool_] = machine.predict(asked.reshape(-1, 1)) == 0
    return judged


def average_gap(subject: str, scores: Sequence[Score], reference: Mapping[str, float]) -> Score:
    """Mean absolute difference of the scores from those of a retrained model."""
    gaps, nearest, furthest = [], [], []
    for score in scores:
        value = reference[score.metric]
        ends = sorted(abs(end - value) for end in (score.low, score.high))
        gaps.append(abs(score.value - value))
        nearest.append(0.0 if score.low <= value <= score.high else ends[0])
        furthest.append(ends[1])
    value, low, high = (float(np.mean(values)) for values in (gaps, nearest, furthest))
    return Score(
        subject=subject, task="all", metric=GAP, value=value, n=sum(score.n for score in scores),
        low=low, high=high, higher_is_better=False,
    )  # fmt: skip


def _svc() -> Any:
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise MissingExtra("scikit-learn", "suites", "evaluate/unlearned-classifier") from None
    return SVC


def _require_labels(data: Data, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows, 1):
        if row.get(data.label) in (None, ""):
            raise RecordsError(
                f"{data.path}, record {number}: has no class in field {data.label!r}. "
                f"Fields: {', '.join(row)}."
            )


def _predict_roles(loaded: Loaded, records: Records) -> dict[str, Predictions]:
    return {role: predict(loaded, records[role]) for role in UnlearnedClassifier.roles}


@torch.no_grad()
def predict(loaded: Loaded, data: Data) -> Predictions:
    """What the model says of the records, in their order."""
    task = Task(data, read_rows(data), loaded.model.eval(), loaded.processor)
    labels, predicted, confidence = [], [], []
    for batch in task.batches(64):
        probabilities = task.logits(batch).float().softmax(dim=-1).cpu()
        truth = batch["labels"].cpu()
        labels.append(truth)
        predicted.append(probabilities.argmax(dim=1))
        confidence.append(probabilities.gather(1, truth[:, None])[:, 0])
    return Predictions(*(torch.cat(parts).numpy() for parts in (labels, predicted, confidence)))


def _share(subject: str, task: str, metric: str, count: int, n: int) -> Score:
    low, high = wilson(count, n)
    return Score(subject=subject, task=task, metric=metric, value=count / n, n=n, low=low, high=high)


def _items(found: Mapping[str, Predictions], others: NDArray[np.bool_]) -> list[Row]:
    items: list[Row] = []
    for role, seen in found.items():
        rows = zip(seen.labels.tolist(), seen.predicted.tolist(), seen.confidence.tolist(), strict=True)
        for number, (label, predicted, confidence) in enumerate(rows, 1):
            item = {"role": role, "record": number, "answer": label, "response": predicted}
            item |= {"score": float(label == predicted), "confidence": confidence}
            if role == "forget":
                item["non_member"] = bool(others[number - 1])
            items.append(item)
    return items


def _note_few(step: Step, retain: int, test: int) -> None:
    """Say once that the attack learned from fewer members than others."""
    text = (
        f"there are {retain} retain and {test} test records: the attack learned from fewer members than "
        "others, and leans towards taking records for others."
    )
    finding = Finding(code="few-members", severity="warning", about="retain", message=text)
    if finding not in step.findings:
        step.findings.append(finding)
