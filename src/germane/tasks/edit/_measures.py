"""What is measured of an edited model: reliability, generality, locality, portability.

Two readings of each. By tokens, as the field does it: the answer's tokens are shown, and the share that
the model finds likeliest, each after those before it, is the score of one prompt. By answers: the model
writes, and the text must be the answer. Locality compares with the untouched model, not with the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from germane.core.answers import normalise, says
from germane.core.evidence import Finding, Score
from germane.core.objective import IGNORED, next_tokens
from germane.core.statistics import bootstrap_mean
from germane.edited import Edit, Pair
from germane.tasks.edit._answers import batches

RELIABILITY, GENERALITY, LOCALITY, PORTABILITY = "reliability", "generality", "locality", "portability"
WRITTEN = ", written"  # of scores by answers
Values = dict[str, list[float | None]]  # metric -> the score of each edit, None where nothing is asked
Ask = Callable[[Sequence[str], int], list[str]]  # prompts and the longest answer, to answers
_ROOM = 8  # tokens that an answer may be longer than the right one


def probes(edits: Sequence[Edit]) -> dict[str, list[list[Pair]]]:
    """Metric -> of each edit, the prompts that are asked for it and their answers."""
    return {
        RELIABILITY: [[(edit.prompt, edit.answer)] for edit in edits],
        GENERALITY: [[(prompt, edit.answer) for prompt in edit.rephrase] for edit in edits],
        LOCALITY: [edit.locality for edit in edits],
        PORTABILITY: [edit.portability for edit in edits],
    }


@torch.no_grad()
def likeliest(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> list[list[int]]:
    """Of each pair, the likeliest token at every place of its answer, after the answer's own tokens."""
    model.eval()
    found: dict[int, list[int]] = {}
    for picked, batch in batches(tokenizer, pairs, model.device):
        labels = batch.pop("labels")
        tokens = model(**batch).logits.argmax(dim=-1)
        for index, row, mask in zip(picked, tokens, next_tokens(labels) != IGNORED, strict=True):
            found[index] = row[mask].tolist()
    return [found[index] for index in range(len(pairs))]


def targets(tokenizer: Any, pairs: Sequence[Pair]) -> list[list[int]]:
    """Of each pair, the tokens of its answer."""
    return [tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in pairs]


def share(found: Sequence[int], wanted: Sequence[int]) -> float:
    """Share of tokens that are the same."""
    return float(np.mean([one == other for one, other in zip(found, wanted, strict=True)]))


def token_values(model: Any, tokenizer: Any, edits: Sequence[Edit], before: Sequence[list[int]]) -> Values:
    """The score of each edit, by tokens.

    Args:
        model: A causal language model, its edits in place.
        tokenizer: The model's own.
        edits: What to ask about.
        before: What the untouched model says on the locality probes, as `likeliest` gives it.
    """
    values: Values = {}
    for metric, asked in probes(edits).items():
        pairs = [pair for each in asked for pair in each]
        found = likeliest(model, tokenizer, pairs)
        wanted = before if metric == LOCALITY else targets(tokenizer, pairs)
        values[metric] = _by_edit(asked, [share(*both) for both in zip(found, wanted, strict=True)])
    return values


def kept_pairs(edits: Sequence[Edit]) -> list[Pair]:
    """All locality probes."""
    return [pair for edit in edits for pair in edit.locality]


def written_values(
    ask: Ask, count: Callable[[str], int], edits: Sequence[Edit], before: Sequence[str]
) -> Values:
    """The same by answers.

    Args:
        ask: Answers prompts.
        count: Tokens of a text.
        edits: What to ask about.
        before: What the untouched model writes on the locality probes, as `written_before` asked it.
    """
    values: Values = {}
    for metric, asked in probes(edits).items():
        pairs = [pair for each in asked for pair in each]
        written = ask([prompt for prompt, _ in pairs], longest(count, edits)) if pairs else []
        if metric == LOCALITY:
            right = [normalise(one) == normalise(other) for one, other in zip(written, before, strict=True)]
        else:
            right = [says(text, answer) for text, (_, answer) in zip(written, pairs, strict=True)]
        values[metric] = _by_edit(asked, right)
    return values


def written_before(ask: Ask, count: Callable[[str], int], edits: Sequence[Edit]) -> list[str]:
    """What a model writes on the locality probes."""
    prompts = [prompt for prompt, _ in kept_pairs(edits)]
    return ask(prompts, longest(count, edits)) if prompts else []


def longest(count: Callable[[str], int], edits: Sequence[Edit]) -> int:
    """Tokens that any answer may take."""
    return max(count(edit.answer) for edit in edits) + _ROOM


def _by_edit(asked: Sequence[Sequence[Pair]], values: Sequence[float]) -> list[float | None]:
    """The mean over each edit's probes."""
    means: list[float | None] = []
    start = 0
    for each in asked:
        means.append(float(np.mean(values[start : start + len(each)])) if each else None)
        start += len(each)
    return means


def scores(subject: str, name: str, values: Values, suffix: str = "") -> list[Score]:
    """A score for each metric that was asked for, its n the number of edits."""
    found = []
    for metric, each in values.items():
        known = np.array([value for value in each if value is not None])
        if not len(known):
            continue
        low, high = bootstrap_mean(known)
        found.append(
            Score(
                subject=subject, task=name, metric=metric + suffix, value=float(known.mean()),
                n=len(known), low=low, high=high,
            )
        )  # fmt: skip
    return found


def judge(found: Sequence[Score]) -> list[Finding]:
    """Findings on edits that did not take, and on a model that answers everything differently."""
    by = {(score.subject, score.metric): score.value for score in found}
    findings = []
    for suffix in ("", WRITTEN):
        before, after = by.get(("base", RELIABILITY + suffix)), by.get(("result", RELIABILITY + suffix))
        if before is not None and after is not None and after <= before < 1:
            text = f"the edits are answered as rarely as before ({before:.2f} to {after:.2f}{suffix})."
            findings.append(_finding("no-effect", text))
        kept = by.get(("result", LOCALITY + suffix))
        if kept is not None and kept < 0.2:
            text = f"of the answers that should stay, {kept:.0%} did{suffix}: little is left of the model."
            findings.append(_finding("destroyed", text))
    return findings


def _finding(code: str, text: str) -> Finding:
    return Finding(code=code, severity="serious", about="result", message=text)
