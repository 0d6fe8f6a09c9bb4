"""The erase task: a diffusion pipeline, a concept and a method make a pipeline that does not draw it.

Promised for every method: the result opens in plain diffusers and has the pipeline's components, names,
shapes and dtypes, and only the unet's weights differ; the same noise is drawn before and after, and it is
measured how far images of the concept moved, how far others did and, where there is a judge, what it
still recognises; pictures of both stand in the result; the same seed gives the same weights.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from germane.core.checkpoint import Checkpoint, digest, locate, require_space
from germane.core.effect import judge_change, weight_change
from germane.core.errors import CheckpointError, RecordsError, SettingError
from germane.core.evidence import Row, Scatter, ScatterPoint, Score, Step, Table
from germane.core.models import Loaded, load_model
from germane.core.progress import announce
from germane.core.records import Data
from germane.job import Job
from germane.method import Method
from germane.tasks.erase import _measures as measures
from germane.tasks.erase._eraser import Concept, Eraser, Erasing
from germane.tasks.erase._pictures import Pictures, save_grid
from germane.tasks.erase._pipeline import (
    UNET,
    Condition,
    Pipeline,
    check_folder,
    class_count,
    load_pipeline,
    takes_text,
)

_PICTURES = "pictures.png"
_SHOWN = 8  # images of a row of the pictures


class Erase(Job):
    """Make a diffusion pipeline draw a concept no more, and the rest as before."""

    task: ClassVar[str] = "erase"
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(description="the pipeline: a folder of diffusers, or hub id")
    concept: str = Field(description="what to erase: a class number, or words that the prompts hold")
    forget: Data = Field(description="images of the concept, with label or prompt")
    keep: Data = Field(description="images of others, with label or prompt")
    judge: str = Field(
        default="", description="an image classifier, or one of rows of pixels: a folder or hub id"
    )
    absent: int | None = Field(
        default=None,
        ge=0,
        description="class number that stands for no class, if there is one; for guidance",
    )
    samples: int = Field(default=8, gt=0, description="images to draw of each class or prompt")
    steps: int = Field(default=50, gt=0, description="denoising steps of an image")
    guidance: float | None = Field(
        default=None, ge=0, description="of drawing; default: 7.5 with prompts, 2 with a class for none"
    )
    batch: int = Field(default=16, gt=0, description="images that are drawn together")

    def check(self, method: Method) -> None:
        """The pipeline's folder, the concept and every record, before any work."""
        assert isinstance(method, Eraser)
        folder = check_folder(self.model)
        concept = self.named_concept(folder)
        method.check_concept(concept)
        self._check_apart(concept, *(self.pictures(data, folder) for data in (self.forget, self.keep)))
        for data in self.evaluate:
            self.pictures(data, folder)
        if self.judge:
            kind = str(Checkpoint(locate(self.judge)).config.get("architectures"))
            if "ImageClassification" not in kind and "RowClassifier" not in kind:
                raise CheckpointError(f"{self.judge}: is {kind}; a judge is a classifier of images.")

    def named_concept(self, folder: Path) -> Concept:
        """The concept as a class number or as words."""
        if takes_text(folder):
            if not self.concept.strip():
                raise SettingError("concept: must be words.")
            if self.absent is not None:
                raise SettingError("absent: is for pipelines by class; of prompts, the empty one is none.")
            return Concept(self.concept)
        count = class_count(folder)
        if self.absent is not None and self.absent >= count:
            raise SettingError(f"absent: {self.absent} is no class number from 0 to {count - 1}.")
        classes = [number for number in range(count) if number != self.absent]
        if not self.concept.isdigit() or int(self.concept) not in classes:
            raise SettingError(
                f"concept: {self.concept!r} is no class of the pipeline: {classes[0]} to {classes[-1]}."
            )
        return Concept(int(self.concept), classes)

    def pictures(self, data: Data, folder: Path) -> Pictures:
        """Records as this pipeline reads them."""
        text = takes_text(folder)
        return Pictures(data, text, 0 if text else class_count(folder))

    def _check_apart(self, concept: Concept, forget: Pictures, keep: Pictures) -> None:
        """Refuse images of the concept that are to be kept, and others that are to be forgotten."""
        for pictures, wanted in ((forget, True), (keep, False)):
            for number, condition in enumerate(pictures.conditions, 1):
                if _shows(condition, concept) is not wanted:
                    raise RecordsError(
                        f"{pictures.data.path}, record {number}: is of {condition!r}, which "
                        f"{'is not' if wanted else 'is'} the concept {concept.value!r}: it belongs to the "
                        f"images to {'keep' if wanted else 'forget'}."
                    )

    def run(self, method: Method, folder: Path, step: Step, seed: int) -> None:
        """Erase into `folder`, which exists and is empty."""
        assert isinstance(method, Eraser)
        run = _Run(self, method, folder, step, seed)
        run.erase()
        run.measure()

    @classmethod
    def summarise(cls, rows: Sequence[Row], references: Sequence[Row]) -> tuple[list[Table], list[Scatter]]:
        """What a comparison shows besides its rows: who erases most at which cost to others."""
        points = []
        for row in (*references, *rows):
            found = {(s.task, s.metric): s.value for s in row.scores}
            lost = found.get((measures.CONCEPT, measures.RECOGNISED))
            kept = found.get((measures.OTHERS, measures.RECOGNISED))
            if row.status != "failed" and lost is not None and kept is not None:
                points.append(
                    ScatterPoint(name=row.label, x=lost, y=kept, reference=row.status == "reference")
                )
        if not points:
            return [], []
        title = "What is erased, and what it costs"
        axes = {"x": "concept still recognised", "y": "others recognised"}
        return [], [Scatter(title=title, **axes, points=points, lower_x=True)]


def _shows(condition: Condition, concept: Concept) -> bool:
    """Whether an image of the condition is one of the concept."""
    if isinstance(condition, str):
        return str(concept.value).lower() in condition.lower()
    return condition == concept.value


class _Run:
    """One run: drawn, erased, written, and drawn again from the same noise."""

    def __init__(self, job: Erase, method: Eraser, folder: Path, step: Step, seed: int) -> None:
        self.job = job
        self.method = method
        self.folder = folder
        self.step = step
        self.seed = seed
        source = locate(job.model)
        self.concept = job.named_concept(source)
        self.forget, self.keep = (job.pictures(data, source) for data in (job.forget, job.keep))
        self.sittings = measures.sittings(self.concept.value, self.forget, self.keep, job.samples)
        self.before: list[torch.Tensor] = []
        self.judge: Loaded | None = None

    @property
    def guidance(self) -> float:
        """Weight of guidance while drawing."""
        default = 7.5 if isinstance(self.concept.value, str) else 2.0
        return default if self.job.guidance is None else self.job.guidance

    def erase(self) -> None:
        """Draw with the untouched pipeline, change it, and write it."""
        job, step = self.job, self.step
        with step.stage("check"):
            source = locate(job.model)
            files = sorted(file for file in source.rglob("*") if file.is_file())
            require_space(self.folder, 2 * sum(file.stat().st_size for file in files))
            records = [Path(d.path) for d in (job.forget, job.keep, *job.evaluate)]
            step.inputs = {str(f): digest(f) for f in (*files, *records) if f.is_file()}
            pipeline = self._open(job.model)
            if job.judge:
                self.judge = load_model(job.judge)
                measures.check_judge(self.judge, pipeline.image_form, self.concept.value)
        announce("drawing with the untouched pipeline")
        with step.stage("evaluate"):
            self.before = self._draw(pipeline)
            if job.references:
                step.scores += self._scores("base", pipeline, self.before)
        announce(f"{self.method.name}: erasing {job.concept}")
        with step.stage("erase"):
            self.method.erase(Erasing(pipeline, self.concept, self.forget, self.keep, self.seed, step))
            pipeline.save(self.folder)
        del pipeline
        gc.collect()
        with step.stage("effect"):
            change = weight_change(Checkpoint(source / UNET), Checkpoint(self.folder / UNET))
            step.facts["relative_change"], step.facts["most_changed"] = change.relative, change.most
            step.findings.append(judge_change(change))

    def measure(self) -> None:
        """Draw with the result as its folder gives it, and score."""
        announce("drawing with the result")
        with self.step.stage("evaluate"):
            pipeline = self._open(str(self.folder))
            after = self._draw(pipeline)
            scores = self._scores("result", pipeline, after)
            for sitting, old, new in zip(self.sittings, self.before, after, strict=True):
                scores.append(measures.shift(sitting, old, new))
            self.step.scores += scores
            rows = [self._shown(images) for pair in zip(self.before, after, strict=True) for images in pair]
            save_grid(rows, self.folder / _PICTURES)
        self.step.facts["pictures"] = (
            f"{_PICTURES}, by rows: the concept before and after, then other images before and after"
        )
        self.step.findings += measures.judge_scores(self.step.scores)

    def _open(self, path: str) -> Pipeline:
        return load_pipeline(path, self.job.absent)

    def _draw(self, pipeline: Pipeline) -> list[torch.Tensor]:
        job = self.job
        return [
            measures.draw(pipeline, sitting, self.seed + number, job.steps, self.guidance, job.batch)
            for number, sitting in enumerate(self.sittings)
        ]

    def _scores(self, subject: str, pipeline: Pipeline, images: list[torch.Tensor]) -> list[Score]:
        found = []
        for sitting, drawn in zip(self.sittings, images, strict=True):
            score = measures.recognised(subject, sitting, drawn, self.judge) if self.judge else None
            found += [score] if score else []
        for data in self.job.evaluate:
            pictures = self.job.pictures(data, pipeline.folder)
            found.append(measures.denoising_error(subject, pipeline, pictures, self.seed, self.job.batch))
        return found

    def _shown(self, images: torch.Tensor) -> torch.Tensor:
        """Some images of a sitting, from the first to the last; a short row is filled up with black."""
        chosen = images[torch.linspace(0, len(images) - 1, min(_SHOWN, len(images))).long()]
        return torch.cat([chosen, chosen.new_zeros(_SHOWN - len(chosen), *images.shape[1:])])
