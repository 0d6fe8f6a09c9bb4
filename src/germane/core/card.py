"""The model card of a result: front matter the hub accepts, and what the evidence says in words.

Source of the sections: Mitchell et al., "Model Cards for Model Reporting", 2019, in the form of
huggingface_hub's ModelCardData and EvalResult.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from germane.core.evidence import Evidence, Score

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(evidence: Evidence, folder: Path, fields: dict[str, Any]) -> Path:
    """Write `README.md` into `folder`.

    Args:
        evidence: Of the run whose result lies in `folder`.
        folder: The model folder.
        fields: More front matter: license, language, tags, ... as ModelCardData names them.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = str(fields.get("model_name") or folder.name)
    data = ModelCardData(
        **{
            "library_name": "transformers",
            "model_name": name,
            "base_model": _hub_bases(evidence) or None,
            **fields,
            "tags": sorted({*fields.get("tags", []), *(step.task for step in evidence.steps), "germane"}),
            "eval_results": _eval_results(evidence.scores) or None,
        }
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(name, evidence)}")
    file = folder / "README.md"
    file.write_text(str(card), encoding="utf-8")
    return file


def _hub_bases(evidence: Evidence) -> list[str]:
    """Base and members that are hub ids; local folders mean nothing to a reader of the card."""
    found = []
    for step in evidence.steps:
        for value in (step.job.get("base"), *step.job.get("pool", [])):
            if isinstance(value, str) and _HUB_ID.fullmatch(value) and not Path(value).exists():
                found.append(value)
    return list(dict.fromkeys(found))


def _eval_results(scores: list[Score]) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation" if score.metric == "perplexity" else "text-classification",
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_value=round(score.value, 6),
        )
        for score in scores
        if score.subject == "result"
    ]


def _body(name: str, evidence: Evidence) -> str:
    parts = [f"# {name}", _how_made(evidence)]
    if evidence.scores:
        parts.append("## Evaluation\n\n" + _score_table(evidence.scores))
    shares = evidence.steps[-1].shares if evidence.steps else []
    if shares:
        rows = [
            f"| {s.member} | {s.share:.3f} | {'yes' if s.taken else 'no'} | {s.reason} |" for s in shares
        ]
        parts.append(
            "## What it was made from\n\n| checkpoint | share | taken | why |\n|---|---|---|---|\n"
            + "\n".join(rows)
        )
    if evidence.findings:
        found = [f"- {finding.severity}: {finding.message}" for finding in evidence.findings]
        parts.append("## Findings\n\n" + "\n".join(found))
    recipe = yaml.safe_dump(evidence.recipe, sort_keys=False, allow_unicode=True)
    parts.append(f"## How to make it again\n\n```yaml\n{recipe}```")
    parts.append(
        "## Limits\n\nThe scores above were measured by germane on the records named in the recipe, and "
        "say nothing of other uses. The rights of the checkpoints it was made from apply."
    )
    return "\n\n".join(parts) + "\n"


def _how_made(evidence: Evidence) -> str:
    lines = []
    for step in evidence.steps:
        paper = f" ([arXiv:{step.paper}](https://arxiv.org/abs/{step.paper}))" if step.paper else ""
        lines.append(f"{step.method}{paper}: {step.summary}")
    return f"Made with germane {evidence.germane}. " + " Then ".join(lines)


def _score_table(scores: list[Score]) -> str:
    subjects = list(dict.fromkeys(score.subject for score in scores))
    by_key = {(score.task, score.metric, score.subject): score for score in scores}
    lines = [
        "| data | metric | n | " + " | ".join(subjects) + " |",
        "|---" * (3 + len(subjects)) + "|",
    ]
    for task, metric, n in dict.fromkeys((score.task, score.metric, score.n) for score in scores):
        cells = [_cell(by_key.get((task, metric, subject))) for subject in subjects]
        lines.append(f"| {task} | {metric} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\nWith 95 % intervals."


def _cell(score: Score | None) -> str:
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" if score else ""
