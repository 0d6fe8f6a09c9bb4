"""The edit task: a model, facts to change, and a method make a model that states them.

Promised for every method: reliability, generality, locality and portability of the result as it is
loaded again from its folder, and of the untouched model; every edit is listed in `edits.json`, can be
taken back, and more can be made later; the weights that were changed are kept as they were, so that
the untouched model is in the folder too; an edit that contradicts an earlier one is reported.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from germane.core.chat import is_address, open_chat
from germane.core.checkpoint import (
    Checkpoint,
    TensorInfo,
    Writer,
    copy_companions,
    digest,
    locate,
    read_elements,
    read_header,
    require_space,
    save_tensors,
)
from germane.core.effect import judge_change, weight_change
from germane.core.errors import SettingError, nearest
from germane.core.evidence import Finding, Row, Scatter, ScatterPoint, Score, Step, Table
from germane.core.models import MEMORY, load_model, names_language_model
from germane.core.objective import Task
from germane.core.progress import announce
from germane.core.records import Data, read_rows
from germane.edited import (
    ORIGINALS,
    Edit,
    Editing,
    EditList,
    Editor,
    load_edited,
    read_memory,
    replaced,
)
from germane.job import Job
from germane.method import Method
from germane.tasks.edit import _measures as measures
from germane.tasks.edit._records import read_edits

_CHUNK = 1 << 22  # elements compared at a time
_LISTED = 50  # edits that the report shows


class EditModel(Job):
    """Make a model state changed facts, and leave the rest unmoved."""

    task: ClassVar[str] = "edit"
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(
        description="the model to edit, or one edited before: a folder or hub id; for methods that only "
        "ask it also an address, http://HOST/v1#MODEL"
    )
    edits: Data | None = Field(default=None, description="the edits, as path or name=path")
    take_back: list[str] = Field(default=[], description="ids of earlier edits to undo")
    general: Data | None = Field(
        default=None, description="texts that have nothing to do with the edits, for methods that use some"
    )

    def check(self, method: Method) -> None:
        """Everything that can be known from files and records, before any work."""
        assert isinstance(method, Editor)
        listed = self._check_model(method)
        if self.edits is None and not self.take_back:
            raise SettingError("edit: there is nothing to do: --edits FILE, or --take-back ID.")
        earlier = listed.edits if listed else []
        for name in self.take_back:
            known = [edit.id for edit in earlier]
            if name not in known:
                raise SettingError(
                    f"take_back: {self.model} has no edit {name!r}{nearest(name, known)} It has "
                    f"{', '.join(known[:20]) or 'none'}."
                )
        if "general" in method.information.needs and self.general is None:
            raise SettingError(
                f"{method.name}: needs texts that have nothing to do with the edits: --general FILE."
            )
        for data in (*filter(None, [self.general]), *self.evaluate):
            read_rows(data)
        made, _ = self.wanted(listed)
        source = None if is_address(self.model) else self.source()
        method.check(made, source)

    def _check_model(self, method: Method) -> EditList | None:
        if is_address(self.model):
            if "language model" in method.information.needs:
                raise SettingError(
                    f"{method.name}: changes the model, which {self.model} does not give away."
                )
            return None
        listed = EditList.read(locate(self.model))
        if listed and listed.method != method.name:
            raise SettingError(
                f"{self.model}: was edited with {listed.method}: edit the untouched model, or go on with "
                f"--method {listed.method.partition('/')[2]}."
            )
        source = self.source()
        kind = str(source.config.get("architectures")) if source else ""
        if source and not names_language_model(kind):
            raise SettingError(f"{method.name}: edits language models; {self.model} is {kind}.")
        return listed

    def source(self) -> Checkpoint | None:
        """The model's files, if they are here."""
        folder = locate(self.model)
        return Checkpoint(folder) if (folder / "config.json").is_file() else None

    def check_early(self, method: Method) -> None:
        """The same without the model, which may not be there yet."""
        for data in (*filter(None, [self.general]), *self.evaluate):
            read_rows(data)
        if self.edits is not None:
            read_edits(self.edits)

    def wanted(self, listed: EditList | None) -> tuple[list[Edit], list[Edit]]:
        """The edits to make now, and all that the result has."""
        earlier = [edit for edit in listed.edits if edit.id not in self.take_back] if listed else []
        new = read_edits(self.edits, listed.edits if listed else []) if self.edits else []
        everything = [*earlier, *new]
        over = replaced(everything)
        made = everything if self.take_back else new
        return [edit for edit in made if edit.id not in over], everything

    def run(self, method: Method, folder: Path, step: Step, seed: int) -> None:
        """Edit into `folder`, which exists and is empty."""
        assert isinstance(method, Editor)
        run = _Run(self, method, folder, step, seed)
        run.edit()
        run.measure()

    @classmethod
    def summarise(cls, rows: Sequence[Row], references: Sequence[Row]) -> tuple[list[Table], list[Scatter]]:
        """What a comparison shows besides its rows: whose edits take, and what else they move."""
        for suffix in ("", measures.WRITTEN):
            points = [point for row in (*references, *rows) if (point := _point(row, suffix))]
            if len(points) > len(references):
                title = "How far edits reach, and what they leave alone"
                axes = f"locality{suffix}", f"reliability and generality{suffix}"
                return [], [Scatter(title=title, x=axes[0], y=axes[1], points=points, lower_x=False)]
        return [], []


def _point(row: Row, suffix: str) -> ScatterPoint | None:
    kept = row.mean(measures.LOCALITY + suffix)
    reached = [row.mean(name + suffix) for name in (measures.RELIABILITY, measures.GENERALITY)]
    known = [value for value in reached if value is not None]
    if row.status == "failed" or kept is None or not known:
        return None
    return ScatterPoint(
        name=row.label, x=kept, y=sum(known) / len(known), reference=row.status == "reference"
    )


class _Run:
    """One run: the edits made, everything written, the folder opened again and measured."""

    def __init__(self, job: EditModel, method: Editor, folder: Path, step: Step, seed: int) -> None:
        self.job = job
        self.method = method
        self.folder = folder
        self.step = step
        self.seed = seed
        self.scratch = folder / ".untouched"
        self.source = None if is_address(job.model) else job.source()
        self.listed = None if is_address(job.model) else EditList.read(locate(job.model))
        self.to_make, self.everything = job.wanted(self.listed)

    def edit(self) -> None:
        """Make the edits, and write the result."""
        step = self.step
        with step.stage("check"):
            self._begin()
        announce(f"{self.method.name}: making {len(self.to_make)} edits")
        with step.stage("edit"):
            editing = self._open()
            if self.to_make:
                self.method.edit(editing, self.to_make)
            self._save(editing)
        del editing
        gc.collect()
        with step.stage("effect"):
            self._keep_originals()

    def _begin(self) -> None:
        step, source = self.step, self.source
        if source:
            require_space(self.folder, 4 * source.size)
            step.inputs = {str(file): digest(file) for file in source.files}
            self.scratch.mkdir()
            _write_untouched(source, self.scratch)
        files = [d for d in (self.job.edits, self.job.general, *self.job.evaluate) if d is not None]
        step.inputs |= {d.path: digest(Path(d.path)) for d in files if Path(d.path).is_file()}
        for old, new in replaced(self.everything).items():
            step.findings.append(_contradicted(old, new))

    def _open(self) -> Editing:
        """The model to edit, with the edits that stay."""
        fresh = bool(self.job.take_back)
        editing = self._editing(str(self.scratch) if fresh else self.job.model)
        editing.edits = self.listed.active if self.listed and not fresh else []
        state = read_memory(self.source.folder) if self.source and not fresh else {}
        self.method.attach(editing, state)
        return editing

    def _editing(self, path: str) -> Editing:
        loaded = load_model(path, beside=True) if self.source else None
        general = self.job.general
        texts = [_text(row, general) for row in read_rows(general)] if general else []
        model = self.listed.model if self.listed and not loaded else path
        return Editing(loaded, open_chat(model, loaded), [], texts, self.seed, self.step)

    def _save(self, editing: Editing) -> None:
        if editing.loaded:
            editing.loaded.save(self.folder)
        state = self.method.state(editing)
        if state:
            save_tensors(
                {name: tensor.detach().cpu() for name, tensor in state.items()}, self.folder / MEMORY
            )
        untouched = self.listed.model if self.listed else self.job.model
        settings = self.method.model_dump(mode="json")
        EditList(method=self.method.name, settings=settings, model=untouched, edits=self.everything).save(
            self.folder
        )
        self.step.facts["edits"] = len(self.everything)
        self.step.facts["acts beside the weights"] = bool(state)

    def _keep_originals(self) -> None:
        """Put what the changed weights were into the folder, and say how far they moved."""
        if not self.source:
            return
        before, after = Checkpoint(self.scratch), Checkpoint(self.folder)
        changed = [info for info in before.tensors.values() if _differ(info, before, after)]
        if changed:
            (self.folder / ORIGINALS).mkdir()
            _copy(changed, before.read, self.folder / ORIGINALS)
        change = weight_change(before, after)
        self.step.facts["relative_change"], self.step.facts["most_changed"] = change.relative, change.most
        if changed:
            self.step.findings.append(judge_change(change))

    def measure(self) -> None:
        """Scores of the untouched model, and of the result as its folder gives it."""
        edits = EditList(method="", model="", edits=self.everything).active
        with self.step.stage("evaluate"):
            announce("scoring the untouched model")
            editing = self._editing(str(self.scratch) if self.source else self.job.model)
            self.method.attach(editing, {})
            before = _Before(self.method, editing, edits)
            scores = (
                self._scores("base", self.method, editing, edits, before)[0] if self.job.references else []
            )
            del editing
            gc.collect()
            announce("scoring the result")
            editor, editing = load_edited(str(self.folder))
            assert editor is not None
            editing.step = self.step
            found, table = self._scores("result", editor, editing, edits, before)
            self.step.scores = scores + found
            self.step.tables.append(table)
        self.step.findings += measures.judge(self.step.scores)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _scores(
        self, subject: str, editor: Editor, editing: Editing, edits: Sequence[Edit], before: _Before
    ) -> tuple[list[Score], Table]:
        name = self.job.edits.name if self.job.edits else "edits"
        found: list[Score] = []
        values: dict[str, measures.Values] = {}
        if editing.loaded and type(editor).answer is Editor.answer:
            values[""] = measures.token_values(editing.model, editing.tokenizer, edits, before.tokens)
        values[measures.WRITTEN] = measures.written_values(
            before.ask(editor, editing), before.count, edits, before.written
        )
        for suffix, each in values.items():
            found += measures.scores(subject, name, each, suffix)
        for data in self.job.evaluate if editing.loaded else ():
            found.append(Task(data, read_rows(data), editing.model, editing.tokenizer).score(subject))
        return found, _table(edits, values)


class _Before:
    """What the untouched model says where nothing should move."""

    def __init__(self, editor: Editor, editing: Editing, edits: Sequence[Edit]) -> None:
        tokenizer = editing.loaded.processor if editing.loaded else None
        self.count: Callable[[str], int] = lambda text: (
            len(tokenizer(text)["input_ids"]) if tokenizer else len(text) // 2
        )
        self.written = measures.written_before(self.ask(editor, editing), self.count, edits)
        self.tokens: list[list[int]] = []
        if editing.loaded:
            self.tokens = measures.likeliest(editing.model, tokenizer, measures.kept_pairs(edits))

    @staticmethod
    def ask(editor: Editor, editing: Editing) -> measures.Ask:
        """The model as something that answers prompts."""
        return lambda prompts, tokens: editor.answer(editing, prompts, tokens)


def _text(row: dict[str, Any], data: Data) -> str:
    """A record as a text: of a prompt and an answer both."""
    return row[data.prompt] + row[data.answer] if data.prompt in row else row[data.text]


def _write_untouched(source: Checkpoint, target: Path) -> None:
    """The model as it was before any edit, from its folder's weights and the originals beside them."""
    originals = {info.name: info for info in _kept(source.folder)}

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        info = originals.get(name)
        return read_elements(info, start, stop) if info else source.read(name, start, stop)

    _copy(list(source.tensors.values()), read, target)
    copy_companions(source.folder, target)


def _kept(folder: Path) -> Iterator[TensorInfo]:
    for file in sorted((folder / ORIGINALS).glob("*.safetensors")):
        yield from read_header(file)


def _copy(infos: Sequence[TensorInfo], read: Callable[[str, int, int], torch.Tensor], folder: Path) -> None:
    """Write these tensors into a folder, a few million elements at a time."""
    writer = Writer(infos, folder)
    for info in infos:
        for start in range(0, info.count, _CHUNK):
            writer.write(info.name, start, read(info.name, start, min(start + _CHUNK, info.count)))
    writer.close()


def _differ(info: TensorInfo, before: Checkpoint, after: Checkpoint) -> bool:
    """Whether a tensor has changed; one that grew or went is no weight that was changed."""
    other = after.tensors.get(info.name)
    if other is None or other.shape != info.shape:
        return False
    for start in range(0, info.count, _CHUNK):
        stop = min(start + _CHUNK, info.count)
        if not torch.equal(before.read(info.name, start, stop), after.read(info.name, start, stop)):
            return True
    return False


def _table(edits: Sequence[Edit], values: dict[str, measures.Values]) -> Table:
    """The first edits, each with its scores."""
    columns = [name + suffix for suffix, each in values.items() for name in each]
    lists = [found for each in values.values() for found in each.values()]
    rows: list[list[str | float | int | None]] = [
        [edit.id, edit.prompt, edit.answer.strip(), *(column[number] for column in lists)]
        for number, edit in enumerate(edits[:_LISTED])
    ]
    title = "The edits" if len(edits) <= _LISTED else f"The first {_LISTED} of {len(edits)} edits"
    return Table(title=title, columns=["id", "prompt", "answer", *columns], rows=rows)


def _contradicted(old: str, new: str) -> Finding:
    text = f"edit {new} asks what edit {old} asks, and answers differently: {new} holds, {old} is left out."
    return Finding(code="contradiction", severity="warning", about=f"edit {old}", message=text)
