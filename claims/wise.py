"""WISE (arXiv:2405.14768): edits take, reach rephrasings and leave the rest, and still do so in a stream.

SmolLM2-135M-Instruct learns 1, 10 and 100 counterfactual facts one after the other, of CounterFact-Hard
as EREN (arXiv:2403.17431) distributes it. Baselines that must fail: fine-tuning of the same matrix, and
the same side memories with the router always on. Beside them: GRACE at the same layer.

    python claims/wise.py data/cfh_filtered.json [T ...]

The file is in github.com/thunlp/EREN. The lengths are 1, 10 and 100 if none is named. Takes about an
hour on one core; what was measured is kept in the cache, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from germane.claims import write_section
from germane.core.chat import open_chat
from germane.core.models import load_model
from germane.core.statistics import bootstrap_mean
from germane.edited import Edit, Editing, Editor
from germane.embedded import cache_folder, smollm2
from germane.method import build
from germane.tasks.edit import _measures as measures
from germane.tasks.edit._records import with_blank

BLOCKS = {1: 8, 10: 2, 100: 1}  # edits in a row -> how many such rows
STEPS = {1: 70, 10: 70, 100: 30}  # as published for Llama-2 and Llama-3
OUT = cache_folder() / "claims" / "wise"
METRICS = (measures.RELIABILITY, measures.GENERALITY, measures.LOCALITY)
LAYER = 24
SIDE = {
    "layer": LAYER, "learning_rate": 0.5, "contexts": 2, "alpha": 5.0, "beta": 20.0, "gamma": 10.0,
    "act_ratio": 0.88, "retrieve": True, "merge_every": 1000,
}  # fmt: skip
WISE, ALWAYS, TUNED, GRACE = "**WISE-retrieve**", "router always on", "fine-tuning", "GRACE"
Values = dict[str, list[float]]  # metric -> a number for each edit


def main() -> None:
    records = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lengths = [int(word) for word in sys.argv[2:]] or list(BLOCKS)
    found = {length: measured(edits_of(records), length) for length in lengths}
    write_section(
        "wise", "WISE: a stream of edits beside the weights", f"{INTRODUCTION}\n\n{table(found)}\n\n{REMARKS}",
        verdict(found),
    )  # fmt: skip


def edits_of(records: Sequence[dict[str, Any]]) -> list[Edit]:
    """As many edits as are needed, the same in every run, with irrelevant texts of records that are none."""
    usable = [row for row in records if len(row["edit_scope"]) > 1 and all(row["unrelated"].values())]
    random.Random(0).shuffle(usable)
    count = sum(length * blocks for length, blocks in BLOCKS.items())
    others = usable[count:]
    return [edit(row, others[number % len(others)]) for number, row in enumerate(usable[:count])]


def edit(row: dict[str, Any], other: dict[str, Any]) -> Edit:
    """A record as an edit, with a rephrasing, and a question each on the subject and on a neighbour."""
    (prompt, answer), (rephrased, _) = row["edit_scope"][:2]
    probes = [(row["unrelated"][kind][0], row["unrelated_true_ans"][kind][0]) for kind in row["unrelated"]]
    return Edit(
        id=str(row["id"]), prompt=prompt, answer=with_blank(prompt, answer), rephrase=[rephrased],
        locality=[(asked, with_blank(asked, true)) for asked, true in probes],
        irrelevant=other["unrelated"]["neighbor_subj"][0],
    )  # fmt: skip


def measured(edits: Sequence[Edit], length: int) -> dict[str, Values]:
    """Method -> its values over all blocks of a length."""
    start = sum(shorter * blocks for shorter, blocks in BLOCKS.items() if shorter < length)
    found: dict[str, Values] = {}
    for number in range(BLOCKS[length]):
        begin = start + number * length
        for label, values in block(edits[begin : begin + length], length, number).items():
            kept = found.setdefault(label, {metric: [] for metric in METRICS})
            for metric in METRICS:
                kept[metric] += values[metric]
    return found


def block(edits: Sequence[Edit], length: int, number: int) -> dict[str, Values]:
    """Method -> values of one block, each measured once."""
    side = {**SIDE, "steps": STEPS[length], "save_every": max(1, length // 2)}
    rows: dict[str, Callable[[], dict[str, Values]]] = {
        WISE: lambda: side_memory(edits, side),
        TUNED: lambda: after("edit/fine-tune", {"layer": LAYER, "learning_rate": 1e-3}, TUNED, edits),
        GRACE: lambda: after("edit/grace", {"layer": LAYER}, GRACE, edits),
    }
    found: dict[str, Values] = {}
    for label, run in rows.items():
        file = OUT / f"{length}-{number}-{label.strip('*')}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(run()))
        found |= json.loads(file.read_text())
    return found


def opened(editor: Editor, edits: Sequence[Edit], state: dict[str, Any] | None = None) -> Editing:
    """The untouched model, with a memory if there is one."""
    loaded = load_model(str(smollm2()))
    editing = Editing(loaded, open_chat(str(smollm2()), loaded), list(edits) if state else [])
    editor.attach(editing, state or {})
    return editing


def side_memory(edits: Sequence[Edit], settings: dict[str, Any]) -> dict[str, Values]:
    """WISE, and its side memories with every question answered by one of them."""
    routed = build("edit/wise", settings)
    always = build("edit/wise", {**settings, "act_ratio": 1e-9})
    assert isinstance(routed, Editor)
    assert isinstance(always, Editor)
    editing = opened(routed, edits)
    before = said(editing, edits)
    routed.edit(editing, edits)
    unrouted = opened(always, edits, routed.state(editing))
    return {WISE: values(editing, edits, before), ALWAYS: values(unrouted, edits, before)}


def after(name: str, settings: dict[str, Any], label: str, edits: Sequence[Edit]) -> dict[str, Values]:
    """Values of one method after all edits."""
    editor = build(name, settings)
    assert isinstance(editor, Editor)
    editing = opened(editor, edits)
    before = said(editing, edits)
    editor.edit(editing, edits)
    return {label: values(editing, edits, before)}


def said(editing: Editing, edits: Sequence[Edit]) -> list[list[int]]:
    """What the model says where nothing should move."""
    return measures.likeliest(editing.model, editing.tokenizer, measures.kept_pairs(edits))


def values(editing: Editing, edits: Sequence[Edit], before: list[list[int]]) -> Values:
    """The metrics, by tokens."""
    found = measures.token_values(editing.model, editing.tokenizer, edits, before)
    return {metric: [float(value or 0) for value in found[metric]] for metric in METRICS}


def table(found: dict[int, dict[str, Values]]) -> str:
    """A row a method and length."""
    lines = [f"| edits in a row | method | {' | '.join(METRICS)} |", "|---|---|---|---|---|"]
    for length, methods in found.items():
        for label, kept in methods.items():
            cells = [interval(kept[metric]) for metric in METRICS]
            lines.append(f"| {length} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(kept: Sequence[float]) -> str:
    """Mean and 95 % interval over edits."""
    low, high = bootstrap_mean(np.array(kept))
    return f"{np.mean(kept):.2f} [{low:.2f}, {high:.2f}]"


def verdict(found: dict[int, dict[str, Values]]) -> str:
    """Holds if after every length WISE keeps and learns, and after more than one edit both baselines do not."""
    failed, numbers = [], []
    for length, methods in found.items():
        mean = {label: {m: float(np.mean(kept[m])) for m in METRICS} for label, kept in methods.items()}
        ours = mean[WISE]
        kept = [mean[label][measures.LOCALITY] for label in (ALWAYS, TUNED)]
        right = ours[measures.RELIABILITY] >= 0.4 and ours[measures.LOCALITY] >= kept[0] + 0.4
        if length > 1:
            right = right and max(kept) <= 0.3
        if not right:
            failed.append(str(length))
        numbers.append(
            f"after {length}, reliability {ours[measures.RELIABILITY]:.2f} and locality "
            f"{ours[measures.LOCALITY]:.2f}, locality {kept[0]:.2f} with the router always on and "
            f"{kept[1]:.2f} of fine-tuning"
        )
    measured_all = set(found) == set(BLOCKS)
    said_so = "; ".join(numbers)
    if failed:
        return f"Does not hold as stated, at {', '.join(failed)} edits: {said_so}."
    return f"Holds{'' if measured_all else ' for the lengths measured so far'}: {said_so}."


INTRODUCTION = f"""\
SmolLM2-135M-Instruct, counterfactual facts one after the other, then all questions; by tokens, mean and
95 % bootstrap interval over edits: 8 single edits, 2 rows of 10, 1 row of 100. Locality is the share of tokens
that are the untouched model's, on one question about the same subject and one about a neighbour. Irrelevant
texts are questions of records that are not edited. All at layer {LAYER} of 30. WISE: SGD at 0.5, 70 steps (30 in
the row of 100), 2 contexts, margins 5, 20 and 10, act_ratio 0.88, a new shard after half of the row, no merge.
Fine-tuning: AdamW at 1e-3, 25 steps. GRACE: Adam at 1.0, 50 steps, radius 1.

It counts as holding if at every length WISE's reliability is at least 0.4 and its locality at least 0.4 above
that of the router always on, and after 10 and 100 edits neither baseline's locality is above 0.3."""

REMARKS = """\
Read it with this in mind: with 25 steps, which were fixed first, the first two single edits stayed unlearned (loss
of the answer 4.6 after 12.8), so the published numbers of steps took their place, after a look at four edits
of the row of 100; rate, margins and layer are those fixed first. A single model of 135M, one layer, and
questions cut to a paraphrase and two probes each. Merging is not measured: the rows are shorter than the paper's
1000 edits, from which on it merges."""


if __name__ == "__main__":
    main()
