"""Evidence to make reports of: of a run, of a comparison, and of someone who means harm."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from germane.core.evidence import Evidence, Finding, Plot, Row, Score, Series, Share, Step, Table

HOSTILE = (
    "</title></svg><script>alert('x')</script><img src=x onerror=\"alert(1)\">&\x00\x1b" + 20 * "checkpoint"
)


def score(subject: str, task: str, value: float, **more: Any) -> Score:
    fields = {"metric": "accuracy", "n": 400, "low": value - 0.04, "high": value + 0.04, **more}
    return Score(subject=subject, task=task, value=value, **fields)


def perplexity(subject: str, task: str, value: float) -> Score:
    return score(
        subject, task, value, metric="perplexity", low=value - 1, high=value + 1,
        higher_is_better=False,
    )  # fmt: skip


def run_evidence() -> Evidence:
    tasks = {"boolq": (0.62, 0.80), "arc": (0.55, 0.74), "news": (0.70, 0.88), "tox": (0.61, 0.82)}
    members = [f"member-{place:02d}" for place in range(12)]
    taken = {"member-00": 0.4, "member-03": 0.2, "member-05": 0.15, "member-11": 0.1}
    scores = [
        score(subject, task, value)
        for task, pair in tasks.items()
        for subject, value in zip(("base", "result"), pair, strict=True)
    ]
    step = Step(
        task="merge",
        method="merge/frank-wolfe",
        summary="Frank-Wolfe over the pool.",
        paper="arXiv:2503.12649",
        settings={"steps": 20},
        inputs={"pool/member-00": "sha256:" + "ab" * 32},
        seconds=252.0,
        timings={"read": 8.0},
        peak_memory_bytes=2**31,
        scores=scores,
        findings=[
            Finding(code="dtype", severity="note", about="pool/a", message="Stored in float16."),
            Finding(code="copy", severity="warning", about="pool/b", message="Same as a."),
        ],
        shares=[
            Share(
                member=name,
                share=taken.get(name, 0.0),
                taken=name in taken,
                reason=f"Reason for {name}.",
            )
            for name in members
        ],
        plots=[
            Plot(
                title="Loss",
                x="step",
                y="loss",
                series=[Series(name="loss", steps=[0, 1, 2, 3], values=[3.0, 2.0, 1.5, 1.2])],
            )
        ],
        tables=[Table(title="Steps", columns=["step", "chosen"], rows=[[0, "member-00"], [1, None]])],
        facts={"moved": {"layers": 30}},
    )
    return Evidence(title="Twelve fine-tunes", recipe={"steps": [{"task": "merge"}]}, steps=[step])


def row(method: str, seed: int, values: dict[str, float], **more: Any) -> Row:
    scores = [score("result", task, value) for task, value in values.items()]
    return Row(
        label=f"{method}, seed {seed}",
        method=f"merge/{method}",
        seed=seed,
        **{"scores": scores, "seconds": 12.0, "peak_memory_bytes": 2**30, **more},
    )


def compare_evidence() -> Evidence:
    tasks = ("boolq", "arc", "news", "a task with quite a long name")
    levels = {"frank-wolfe": 0.81, "dare": 0.77, "ties": 0.76, "mean": 0.69, "slerp": 0.66}
    rows = [
        row(method, seed, {task: level + 0.01 * seed + 0.02 * i for i, task in enumerate(tasks)})
        for method, level in levels.items()
        for seed in range(3)
    ]
    error = "CheckpointError: layer 3 has shape [1536, 512], the base has [1536, 576]"
    rows[5] = row("dare", 2, {}, status="failed", error=error)
    base = [score("base", task, 0.6) for task in tasks]
    rows.append(Row(label="base", status="reference", scores=base))
    table = Table(title="Taken", columns=["method", "taken"], rows=[["dare", 12], ["ties", 12]])
    return Evidence(kind="compare", title="Which merge?", rows=rows, tables=[table])


def hostile_evidence() -> Evidence:
    step = Step(
        task=HOSTILE,
        method=HOSTILE,
        summary=HOSTILE,
        paper="javascript:alert(1)",
        settings={HOSTILE: HOSTILE},
        job={"base": Path(HOSTILE.replace("\x00", ""))},
        inputs={HOSTILE: HOSTILE},
        timings={HOSTILE: 1.0},
        findings=[Finding(code=HOSTILE, severity="serious", about=HOSTILE, message=HOSTILE)],
        scores=[score(HOSTILE, HOSTILE, 0.5, metric=HOSTILE)],
        shares=[Share(member=HOSTILE, share=1.0, taken=True, reason=HOSTILE)],
        plots=[
            Plot(
                title=HOSTILE,
                x=HOSTILE,
                y=HOSTILE,
                series=[Series(name=HOSTILE, steps=[0, 1], values=[0, 1])],
            )
        ],
        tables=[Table(title=HOSTILE, columns=[HOSTILE], rows=[[HOSTILE]])],
        facts={"kept": HOSTILE},
    )
    rows = [
        Row(label=HOSTILE, method=HOSTILE, scores=[score("result", HOSTILE, 0.5)], folder=HOSTILE),
        Row(label=HOSTILE, method="b", status="failed", error=HOSTILE, settings={"a": HOSTILE}),
        Row(label=HOSTILE, method="b", status="failed", error=HOSTILE, settings={"a": "other"}),
    ]
    names = {HOSTILE: HOSTILE}
    return Evidence(title=HOSTILE, recipe=names, versions=names, machine=names, steps=[step], rows=rows)


def sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
