"""What is measured of every unlearned model: memory, utility, privacy. No retrained model is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from germane.core.evidence import Finding, Score
from germane.core.membership import area_interval, signal
from germane.core.objective import Task
from germane.core.statistics import bootstrap_mean
from germane.tasks.unlearn._search import confidence

MEMORY, UTILITY, PRIVACY = "memory", "utility", "privacy leak"


def memory(subject: str, task: Task) -> Score:
    """Mean probability of what should be forgotten; lower is better."""
    return _confidence(subject, task, MEMORY, higher_is_better=False)


def utility(subject: str, task: Task) -> Score:
    """Mean probability of what should stay; higher is better."""
    return _confidence(subject, task, UTILITY, higher_is_better=True)


def privacy_leak(subject: str, forget: Task, holdout: Task, reference: float = 0.5) -> Score:
    """How far one can tell the forgotten records from records never seen; 0 is ideal.

    |AUC - reference| / reference of telling holdout from forget records by how unlikely they are:
    by the lowest 40 % of a text's token log-probabilities (Min-K), by the loss of a class. Both kinds
    of leak count: records still known, and records that are suspiciously unknown.

    Args:
        subject: Whose score it is.
        forget: Records that were trained on.
        holdout: Records of the same kind that never were.
        reference: AUC of a model retrained without the forget records; 0.5 if there is none.
    """
    area, low, high = area_interval(signal(forget), signal(holdout))
    ends = sorted(abs(value - reference) / reference for value in (low, high))
    inside = low <= reference <= high
    return Score(
        subject=subject, task=forget.name, metric=PRIVACY, value=abs(area - reference) / reference,
        n=len(forget.rows) + len(holdout.rows), low=0.0 if inside else ends[0], high=ends[1],
        higher_is_better=False,
    )  # fmt: skip


def _confidence(subject: str, task: Task, metric: str, higher_is_better: bool) -> Score:
    values = np.array(confidence(task))
    low, high = bootstrap_mean(values)
    return Score(
        subject=subject, task=task.name, metric=metric, value=float(values.mean()), n=len(values),
        low=low, high=high, higher_is_better=higher_is_better,
    )  # fmt: skip


def judge(scores: Sequence[Score]) -> list[Finding]:
    """Findings on a model that forgot nothing, and on one that forgot everything."""
    found = {(score.subject, score.metric): score for score in scores if score.metric in (MEMORY, UTILITY)}
    before, after = found.get(("base", MEMORY)), found.get(("result", MEMORY))
    findings = []
    if before and after and after.high >= before.low and after.value > 0.9 * before.value:
        text = (
            f"the forget records are as likely as before ({before.value:.3f} to {after.value:.3f}): "
            "nothing was forgotten."
        )
        findings.append(Finding(code="no-effect", severity="serious", about="result", message=text))
    for task in dict.fromkeys(score.task for score in scores if score.metric == UTILITY):
        pair = {s.subject: s for s in scores if s.metric == UTILITY and s.task == task}
        if {"base", "result"} <= pair.keys() and pair["result"].value < 0.5 * pair["base"].value:
            text = (
                f"{task}: utility fell from {pair['base'].value:.3f} to {pair['result'].value:.3f}: "
                "little is left of the model."
            )
            findings.append(Finding(code="destroyed", severity="serious", about="result", message=text))
    return findings
