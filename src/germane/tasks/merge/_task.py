"""The merge task: a base, a pool, and a method make one checkpoint of the base's form.

Promised for every method: the result loads in plain transformers; it has the base's names, shapes,
dtypes, shards and tokenizer; a pool of copies of the base gives the base; the order of the pool
does not matter (but where weights or two ends are given in order); memory does not grow with the
pool; nothing is written before everything has been checked.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from germane.core.checkpoint import (
    INDEX,
    Checkpoint,
    Source,
    Writer,
    copy_companions,
    require_space,
    save_tensors,
)
from germane.core.effect import Change, judge_change
from germane.core.errors import CheckpointError, RecordsError, SettingError
from germane.core.evidence import Finding, Row, Scatter, Score, Share, Step, Table
from germane.core.objective import Task
from germane.core.progress import announce, bar
from germane.core.records import Data, read_rows
from germane.job import Job, is_reference
from germane.method import Method
from germane.tasks.merge._adapter import Adapter
from germane.tasks.merge._live import Live, LiveMethod, head_member, load_with_head, model_parameters
from germane.tasks.merge._pool import (
    Member,
    Pool,
    check_files,
    check_weights,
    expand,
    find_decoys,
    open_pool,
)
from germane.tasks.merge._rule import Rule
from germane.tasks.merge._stream import Block, Stream

HEADS = "heads"
TASKS = "tasks"


class Merge(Job):
    """Merge the checkpoints of a pool into one."""

    task: ClassVar[str] = "merge"
    paths: ClassVar[tuple[str, ...]] = ("base", "pool")

    base: str = Field(description="the model the others descend from: a folder or hub id")
    pool: list[str] = Field(
        description="checkpoints and LoRA adapters: folders, folders of folders, globs, hub ids"
    )
    data: list[Data] = Field(default=[], description="records for methods that need them, as name=path")
    heads: list[str] = Field(
        default=[], description="patterns of tensors kept out of the merge, besides those found"
    )
    save_tasks: bool = Field(
        default=False, description="also save a whole model for each member's head, under tasks/"
    )
    decoys: Literal["refuse", "report", "drop"] = Field(
        default="refuse",
        description="what to do about copies of the base or of each other, random weights and strangers",
    )

    def check(self, method: Method) -> None:
        """Everything that can be known from names, headers and records, before any work."""
        self._check_need(method)
        for data in (*self.data, *self.evaluate):
            read_rows(data)
        pool = open_pool(self.base, self.pool, self.heads)
        if isinstance(method, Rule):
            method.check_pool(len(pool.members))
        for data in (*self.data, *self.evaluate):
            head_member(pool, data)
        if isinstance(method, LiveMethod) and method.objective == "cross-entropy":
            self._check_labels(method, pool)

    def check_early(self, method: Method) -> None:
        """Records, the number of members, and the folders that are there already, each by itself."""
        self._check_need(method)
        super().check_early(method)
        known = [path for path in self.pool if not is_reference(path)]
        folders = expand(known) if known else []
        for path in (*folders, *([] if is_reference(self.base) else [self.base])):
            check_files(path)
        if isinstance(method, Rule):  # an earlier step's result is one member
            method.check_pool(len(folders) + len(self.pool) - len(known))

    def _check_need(self, method: Method) -> None:
        if isinstance(method, LiveMethod) and not self.data:
            raise SettingError(f"{method.name}: needs data: --data NAME=FILE, once for each task.")

    def _check_labels(self, method: LiveMethod, pool: Pool) -> None:
        """Classifiers need a label in every record."""
        for data in self.data:
            if not _is_classifier(pool, data):
                continue
            for number, row in enumerate(read_rows(data), 1):
                if row.get(data.label) in (None, ""):
                    raise RecordsError(
                        f"{data.path}, record {number}: has no field {data.label!r}, and {method.name} "
                        "lowers cross-entropy; name the field, or set objective=entropy."
                    )

    def run(self, method: Method, folder: Path, step: Step, seed: int) -> None:
        """Merge into `folder`, which exists and is empty."""
        with step.stage("check"):
            pool = self._open(step)
            require_space(folder, self._size(pool))
        copy_companions(pool.base.folder, folder)
        if isinstance(method, LiveMethod):
            self._merge_live(method, pool, folder, step, seed)
        elif isinstance(method, Rule):
            method.check_pool(len(pool.members))
            self._merge_stream(method, pool, folder, step, seed)
        with step.stage("heads"):
            self._save_heads(pool, folder)
        with step.stage("effect"):
            step.findings += effect(pool, folder, step)
        if self.evaluate:
            with step.stage("evaluate"):
                step.scores = self._evaluate(pool, folder)
                step.findings += lost_scores(step.scores)

    @classmethod
    def summarise(cls, rows: Sequence[Row], references: Sequence[Row]) -> tuple[list[Table], list[Scatter]]:
        """The normalised score of each row."""
        return normalised(rows, references), []

    def _open(self, step: Step) -> Pool:
        pool = open_pool(self.base, self.pool, self.heads)
        announce(f"checking {len(pool.members)} checkpoints")
        check_weights(pool)
        pool.findings += find_decoys(pool)
        self._judge_decoys(pool)
        step.inputs = dict(sorted(pool.digests.items()))
        step.findings += pool.findings
        return pool

    def _judge_decoys(self, pool: Pool) -> None:
        decoys = {f.about: f for f in pool.findings if f.severity == "serious"}
        if not decoys or self.decoys == "report":
            return
        if self.decoys == "refuse":
            raise CheckpointError(
                "\n".join(finding.message for finding in decoys.values())
                + "\nLeave them out with --decoys drop, or merge them all the same with --decoys report."
            )
        for data in (*self.data, *self.evaluate):
            member = head_member(pool, data)
            if member in pool.members and member.label in decoys:
                raise CheckpointError(
                    f"{decoys[member.label].message}\n"
                    f"It cannot be dropped: its head reads data {data.name!r}."
                )
        pool.members = [member for member in pool.members if member.label not in decoys]
        if not pool.members:
            raise CheckpointError("the pool is empty: every member was dropped as a decoy.")

    def _size(self, pool: Pool) -> int:
        """Bytes the result takes on disk."""
        heads = [member for member in pool.members if member.heads]
        return pool.base.size * (1 + (len(heads) if self.save_tasks else 0)) + (16 << 20)

    def _merge_stream(self, rule: Rule, pool: Pool, folder: Path, step: Step, seed: int) -> None:
        """Data-free: every block goes from the files through the rule to its place in the result."""
        stream = pool.stream(pool.tensors)
        with step.stage("survey"):
            survey = rule.survey(stream)
        writer = _begin(pool, folder)

        def place(block: Block) -> int:
            writer.write(block.name, block.start, rule.combine(block, survey, seed))
            return len(block.base)

        try:
            with step.stage("merge"), bar("merging", stream.elements) as advance:
                for count in stream.map(place):
                    advance(count)
        finally:
            writer.close()
        step.shares += _equal_shares(rule, pool)

    def _merge_live(self, method: LiveMethod, pool: Pool, folder: Path, step: Step, seed: int) -> None:
        """With data: the method moves a model in memory, which is then written."""
        samples = getattr(method, "samples", None)
        with step.stage("load"):
            live = Live(pool, self.data, samples)
        with step.stage("merge"):
            if live.tensors:  # else no member differs from the base
                method.move(live, pool, step, seed)
        with step.stage("write"):
            writer = _begin(pool, folder)
            try:
                for info in pool.tensors:
                    writer.write(info.name, 0, live.weights[info.name].reshape(-1))
            finally:
                writer.close()

    def _save_heads(self, pool: Pool, folder: Path) -> None:
        for member in pool.members:
            head = member.head()
            if not head:
                continue
            place = folder / HEADS / member.label
            place.mkdir(parents=True)
            save_tensors(head, place / "model.safetensors")
            shutil.copyfile(_config_of(member), place / _config_of(member).name)
            if self.save_tasks and isinstance(member, Member):
                self._save_task(pool, member, folder)

    def _save_task(self, pool: Pool, member: Member, folder: Path) -> None:
        """A whole model: the merged weights under the member's names, with the member's head."""
        place = folder / TASKS / member.label
        place.mkdir(parents=True)
        copy_companions(pool.base.folder, place)
        (place / INDEX).unlink(missing_ok=True)
        copy_companions(member.checkpoint.folder, place)
        merged = Checkpoint(folder)
        writer = Writer(member.checkpoint.tensors.values(), place)
        own = {member.names[name]: name for name in member.names}
        try:
            for name, info in member.checkpoint.tensors.items():
                aside = name in member.heads or name not in own
                source, key = (member.checkpoint, name) if aside else (merged, own[name])
                writer.write(info.name, 0, source.read(key))
        finally:
            writer.close()

    def _evaluate(self, pool: Pool, folder: Path) -> list[Score]:
        """Scores of the base, the result and, where members have heads, each on its own task."""
        scores = []
        result = Checkpoint(folder)
        for data in self.evaluate:
            announce(f"scoring {data.name}")
            task = _task(pool, data)
            for subject, source in self._subjects(pool, data, result):
                put_weights(pool, task.model, source)
                scores.append(task.score(subject))
        return scores

    def _subjects(self, pool: Pool, data: Data, result: Checkpoint) -> list[tuple[str, Source]]:
        """Whose weights are scored: the result's, and those it is compared with."""
        subjects: list[tuple[str, Source]] = [("result", result)]
        if self.references:
            subjects.append(("base", pool.base))
            member = head_member(pool, data)
            subjects += [("own", member)] if member is not None else []
        return subjects


def _begin(pool: Pool, folder: Path) -> Writer:
    """A writer of the base's layout, with the tensors that are not merged already in place."""
    writer = Writer(pool.base.tensors.values(), folder)
    for info in pool.kept:
        writer.write(info.name, 0, pool.base.read(info.name))
    return writer


def _is_classifier(pool: Pool, data: Data) -> bool:
    member = head_member(pool, data)
    if isinstance(member, Adapter):
        return member.config.get("task_type") == "SEQ_CLS"
    config = pool.base.config if member is None else member.checkpoint.config
    return "SequenceClassification" in str(config.get("architectures"))


def _config_of(member: Member | Adapter) -> Path:
    folder = member.checkpoint.folder if isinstance(member, Member) else member.folder
    name = "config.json" if isinstance(member, Member) else "adapter_config.json"
    return folder / name


def _task(pool: Pool, data: Data) -> Task:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pool.base.folder)
    return Task(data, read_rows(data), load_with_head(pool, data), tokenizer)


@torch.no_grad()
def put_weights(pool: Pool, model: Any, source: Source) -> None:
    """Copy the merged tensors of a source into a transformers model."""
    for name, parameter in model_parameters(pool, model).items():
        count = parameter.numel()
        parameter.copy_(source.read(name, 0, count).reshape(parameter.shape))


def _equal_shares(rule: Rule, pool: Pool) -> list[Share]:
    """Data-free rules take every member alike, unless weights were given."""
    weights: Sequence[float] = getattr(rule, "weights", None) or [1.0] * len(pool.members)
    total = sum(abs(weight) for weight in weights) or 1.0
    reason = "data-free: the method takes every member, and asks nothing of it"
    return [
        Share(member=member.label, share=abs(weight) / total, taken=weight != 0, reason=reason)
        for member, weight in zip(pool.members, weights, strict=True)
    ]


def effect(pool: Pool, folder: Path, step: Step) -> list[Finding]:
    """How far the weights moved, where, and whether the result is no model any more."""
    result = Checkpoint(folder)
    stream = Stream(pool.base, [result], pool.tensors)
    moved: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for name, sums in stream.fold(_square_sums, per_tensor=True):
        moved[name], sizes[name] = sums.tolist()
    change = Change.of(moved, sizes)
    step.facts["relative_change"], step.facts["most_changed"] = change.relative, change.most
    return [judge_change(change, "the merged weights equal the base's")]


def _square_sums(block: Block) -> torch.Tensor:
    return torch.stack([block.deltas[0].double().square().sum(), block.base.double().square().sum()])


def _effect(code: str, text: str) -> Finding:
    return Finding(code=code, severity="serious", about="result", message=text)


def lost_scores(scores: Sequence[Score]) -> list[Finding]:
    """Findings on tasks where the result is worse than the base it started from."""
    by_task: dict[str, dict[str, Score]] = {}
    for score in scores:
        by_task.setdefault(score.task, {})[score.subject] = score
    worse = []
    compared = {name: of for name, of in by_task.items() if "base" in of}
    for name, of in compared.items():
        base, result = of["base"], of["result"]
        better, other = (base, result) if base.higher_is_better else (result, base)
        if better.low > other.high:
            worse.append(f"{name} ({base.value:.3f} to {result.value:.3f})")
    if not worse:
        return []
    code = "destroyed" if len(worse) == len(compared) else "worse-than-base"
    return [_effect(code, f"clearly worse than the base on {', '.join(worse)}.")]


def normalised(rows: Sequence[Row], references: Sequence[Row]) -> list[Table]:
    """Mean of score over the member's own score, in percent, where members have scores of their own."""
    own = {score.task: score for row in references if row.label == "own" for score in row.scores}
    lines: list[list[str | float | int | None]] = []
    for row in rows:
        if row.status != "done" or not row.scores:
            continue
        shares = [_share(score, own.get(score.task)) for score in row.scores]
        known = [share for share in shares if share is not None]
        if known:
            lines.append([row.label, row.seed, round(sum(known) / len(known), 1)])
    title = "Normalised score: mean over tasks of result / fine-tuned member, in percent"
    return [Table(title=title, columns=["method", "seed", "normalised score"], rows=lines)] if lines else []


def _share(score: Score, own: Score | None) -> float | None:
    if own is None or not score.higher_is_better or own.value == 0:
        return None
    return 100 * score.value / own.value
