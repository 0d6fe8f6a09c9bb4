"""Concept patches: what ties images to a class is found, covered by another class's, and relearned."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.nn import functional

from germane.core.errors import CheckpointError, MissingExtra, RecordsError, SettingError
from germane.core.evidence import Table
from germane.core.objective import Task
from germane.core.records import Data, Row, read_rows
from germane.core.training import build_optimiser
from germane.method import method
from germane.tasks.unlearn._templates import with_rows
from germane.tasks.unlearn._unlearner import FineTuned, Pair, Work, batch_of, mean_loss, require_classifier
from germane.tasks.unlearn._unlearner import shuffled as in_random_order

_SHARPNESS, _LASSO = 1e-5, 0.99  # strength of the bottleneck's elastic net, and its share of l1
_SIDES = (0.001, 0.01, 0.1, 1.0, 10.0)  # costs tried for each concept's support vector machine
_BATCH = 64


@dataclass(frozen=True)
class Concepts:
    """Concepts, and what each says for each class.

    Attributes:
        names: Of the concepts.
        weights: (classes, concepts) of the linear classifier on standardised concept scores.
        mean: (concepts,) of the scores.
        deviation: (concepts,) of the scores.
    """

    names: list[str]
    weights: NDArray[np.float64]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    def top(self, label: int, count: int) -> list[int]:
        """The concepts that speak most for a class, the strongest first."""
        order = np.argsort(-self.weights[label], kind="stable")
        return [int(index) for index in order[:count]]

    def speaking_for(self, label: int, count: int) -> NDArray[np.float64]:
        """(concepts,) the class's weights on its `count` top concepts, 0 elsewhere."""
        kept = np.zeros(len(self.names))
        chosen = self.top(label, count)
        kept[chosen] = self.weights[label, chosen]
        return kept


@dataclass(frozen=True)
class Poisoned:
    """One record to forget as it is trained on: numbers of records from 1, corners as (row, column)."""

    record: int
    label: int
    donor: int
    new_label: int
    taken: tuple[int, int] | None = None
    put: tuple[int, int] | None = None


@method(
    "unlearn/concept-patches", paper="2405.15662", code="ChangWenhan/Concept_Inference_Unlearn_official",
    needs=("classifier", "retain"),
)  # fmt: skip
class ConceptPatches(FineTuned):
    """Cover what makes an image its class with a patch of another class, and train the head on that.

    Chang et al., "Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning",
    2024. Concept scores s of the training images feed a linear classifier W with an elastic net, a
    post-hoc concept bottleneck; the `top` largest weights of a class are its concepts. The donor is the
    class whose retained images the model confuses most with the one to forget. In each image to forget
    the window that speaks most for the class, by W times s, is covered with the window of a random donor
    image that speaks most for the donor; the label becomes the donor's (or a random one), and the head
    is fine-tuned on these and the records to keep.

    Concepts are the brightness of the cells of a grid, which needs nothing but the images; or directions
    in the model's own embeddings, the normals of linear support vector machines (concept activation
    vectors) learned from records of images labelled with names of concepts.

    Read this before relying on the patch: on images the changed labels alone forget as well, here and in
    the authors' own table, and their first release trained on nothing else (the line that replaced the
    images was commented out, the patch went to the centre). `patch=none` is that. And with `layers=head`
    the features keep the class: an epoch on its images brings it back. This suppresses, it does not erase.

    Use it to make a classifier of images stop naming a class, cheaply and with a record of what was
    changed. Not where the class must be gone from the weights.

    Differs from the paper and code: no CLIP and no ConceptNet, so windows are scored by W times s (the
    code's "margin" form) of the concepts above; donor and concepts are inferred, where the code lists them
    by hand; `patch=whole` pastes the whole donor image, not 160 of 224 pixels; frozen layers stay in
    evaluation mode, so that statistics of batch norms do not move, as they do in the code.
    """

    uses_forget: ClassVar[bool] = True
    uses_retain: ClassVar[bool] = True

    patch: Literal["localized", "centre", "whole", "none"] = Field(
        default="localized",
        description="where the donor's patch goes; or the whole donor image, or nothing",
    )
    labels: Literal["targeted", "random", "keep"] = Field(
        default="targeted", description="the donor's label, one of all classes, or the image's own"
    )
    layers: Literal["head", "all"] = Field(default="head", description="what is fine-tuned")
    donor: str = Field(default="", description="class whose patches are taken; default: the most confused")
    concepts: str = Field(
        default="", description="records of images labelled with a concept's name; default: cells of a grid"
    )
    grid: int = Field(default=4, gt=1, description="cells of the grid on a side")
    top: int = Field(default=5, gt=0, description="concepts of a class that locate its window")
    window: float = Field(
        default=2 / 7, gt=0, le=1, description="side of a window, as a share of the image's"
    )
    stride: float = Field(default=1 / 14, gt=0, le=1, description="step between windows, as such a share")
    learning_rate: float = Field(default=1e-3, gt=0, description="of the optimiser")
    epochs: int = Field(default=20, ge=0, description="times all records are gone through")
    batch_size: int = Field(default=32, gt=0, description="records of a step that are in memory together")
    optimiser: Literal["adamw", "sgd"] = Field(default="sgd", description="AdamW, or SGD with momentum")
    lora_rank: int = Field(default=0, ge=0, le=0, description="always 0: the head itself is trained")
    _mixed: Any = PrivateAttr(default=None)

    def begin(self, work: Work) -> None:
        super().begin(work)
        require_classifier(self, work.forget)
        if not (work.forget.labelled and work.kept().labelled):
            raise RecordsError(f"{self.name}: all records to forget and to keep need their class.")
        work.model.eval()
        images = [*self._images(work.forget), *self._images(work.kept())]
        scores = self._scorer(work)
        found = bottleneck(scores, [row["labels"] for row in _all_rows(work)], images, work)
        poisoned = self._poison(work, images, scores, found)
        self._report(work, found, poisoned)

    def _images(self, task: Task) -> list[Tensor]:
        """Every record as a (channels, rows, columns) image, as the model reads it."""
        return [as_image(row, f"{self.name}: {task.data.path}") for row in task.rows]

    def _scorer(self, work: Work) -> Grid | Vectors:
        if not self.concepts:
            return Grid(self.grid)
        data = Data(name="concepts", path=self.concepts)
        return learn_vectors(data, work.forget, head_of(work.model), work.seed)

    def _poison(
        self, work: Work, images: list[Tensor], scores: Grid | Vectors, found: Concepts
    ) -> list[Poisoned]:
        """Put the poisoned records and those to keep together as what is trained on."""
        generator = random.Random(work.seed)
        forget, kept = work.forget.rows, work.kept().rows
        donors = {label: self._donor(work, label) for label in {row["labels"] for row in forget}}
        classes = int(work.model.config.num_labels)
        rows, manifest = [], []
        for number, row in enumerate(forget):
            label = row["labels"]
            choices = [n for n, other in enumerate(kept) if other["labels"] == donors[label]]
            donor = generator.choice(choices)
            new = {"targeted": donors[label], "random": generator.randrange(classes), "keep": label}
            image, other = images[number], images[len(forget) + donor]
            taken, put = self._places(scores, found, (image, label), (other, donors[label]))
            rows.append(
                with_image(row, self._patched(image, other, taken, put)) | {"labels": new[self.labels]}
            )
            manifest.append(Poisoned(number + 1, label, donor + 1, new[self.labels], taken, put))
        self._mixed = with_rows(work.forget, [*rows, *kept])
        return manifest

    def _donor(self, work: Work, label: int) -> int:
        """The class to take patches from: named, or the one most taken for `label` among those kept."""
        present = {row["labels"] for row in work.kept().rows} - {label}
        if self.donor:
            names = {str(name): index for name, index in (work.model.config.label2id or {}).items()}
            chosen = names.get(self.donor, int(self.donor) if self.donor.isdigit() else -1)
            if chosen not in present:
                raise SettingError(
                    f"{self.name}: donor: no record to keep is of class {self.donor!r}, or it is to be "
                    f"forgotten. Classes: {', '.join(str(name) for name in sorted(present))}."
                )
            return chosen
        if not present:
            raise SettingError(
                f"{self.name}: the records to keep hold no other class to take patches from."
            )
        return most_confused(work.kept(), label, sorted(present))

    def _places(
        self, scores: Grid | Vectors, found: Concepts, image: tuple[Tensor, int], other: tuple[Tensor, int]
    ) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """Upper left corners of the window in the donor's image, and of that in the image to forget."""
        if self.patch in ("whole", "none"):
            return None, None
        side, step = self._window(image[0])
        if self.patch == "centre":
            middle = tuple((length - side) // 2 for length in image[0].shape[1:])
            return (middle[0], middle[1]), (middle[0], middle[1])
        corners = []
        for pixels, label in (other, image):
            speaking = found.speaking_for(label, self.top)
            corners.append(locate_peak(scores.windows(pixels, speaking, found, side, step), step))
        return corners[0], corners[1]

    def _window(self, image: Tensor) -> tuple[int, int]:
        """Side of a window and step between windows, in pixels."""
        shortest = min(image.shape[1:])
        side = min(shortest, max(1, round(self.window * shortest)))
        return side, max(1, round(self.stride * shortest))

    def _patched(
        self, image: Tensor, other: Tensor, taken: tuple[int, int] | None, put: tuple[int, int] | None
    ) -> Tensor:
        if self.patch == "whole":
            return other
        if taken is None or put is None:
            return image
        return paste(image, crop(other, taken, self._window(image)[0]), put)

    def _report(self, work: Work, found: Concepts, poisoned: Sequence[Poisoned]) -> None:
        """The ranking and the manifest, once however many strengths are tried."""
        title = "Poisoned records"
        if any(table.title == title for table in work.step.tables):
            return
        for label in sorted({item.label for item in poisoned}):
            work.step.tables.append(_ranking(found, label))
        columns = ["record", "donor record", "new label", "taken at row", "column", "put at row", "column "]
        rows: list[list[str | float | int | None]] = [
            [
                item.record,
                item.donor,
                item.new_label,
                *(item.taken or (None, None)),
                *(item.put or (None, None)),
            ]
            for item in poisoned
        ]
        work.step.tables.append(Table(title=title, columns=columns, rows=rows))

    def make_optimiser(self, work: Work) -> torch.optim.Optimizer | None:
        """Freeze all but the head, if only that is trained: its layers stay in evaluation mode."""
        if self.layers == "all":
            return None
        work.model.requires_grad_(False).eval()
        head = head_of(work.model).requires_grad_(True)
        return build_optimiser(head.parameters(), self)

    def length(self, work: Work) -> int:
        return -(-len(_all_rows(work)) // self.batch_size)

    def pairs(self, work: Work, epoch: int) -> Iterator[Pair]:
        """All records in random order, poisoned ones among those to keep."""
        order = in_random_order(self._mixed, random.Random(f"{work.seed}/{epoch}"))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            yield Pair(None, batch_of(self._mixed, rows), (), rows)

    def loss(self, work: Work, pair: Pair) -> Tensor:
        return mean_loss(self._mixed, pair.retain)


@dataclass(frozen=True)
class Grid:
    """Concepts that are the mean brightness of the cells of a grid."""

    side: int

    @property
    def names(self) -> list[str]:
        """Of the cells, row by row."""
        return [f"row {row}, column {column}" for row in range(1, self.side + 1)
                for column in range(1, self.side + 1)]  # fmt: skip

    def of(self, images: Sequence[Tensor], work: Work) -> NDArray[np.float64]:
        """(images, cells) scores."""
        means = [functional.adaptive_avg_pool2d(image.float(), self.side).mean(dim=0) for image in images]
        found: NDArray[np.float64] = torch.stack(means).flatten(1).double().cpu().numpy()
        return found

    def windows(
        self, image: Tensor, speaking: NDArray[np.float64], found: Concepts, side: int, step: int
    ) -> Tensor:
        """(rows, columns) how much each window speaks for a class: the cells' contributions in it."""
        means = (
            functional.adaptive_avg_pool2d(image.float(), self.side).mean(dim=0).flatten().double().cpu()
        )
        standard = (means.numpy() - found.mean) / found.deviation
        cells = torch.tensor(speaking * standard).view(1, 1, self.side, self.side)
        pixels = functional.interpolate(cells, size=image.shape[1:], mode="nearest")
        return functional.avg_pool2d(pixels, side, step)[0, 0]


@dataclass(frozen=True)
class Vectors:
    """Concepts that are directions in the model's embeddings.

    Attributes:
        names: Of the concepts.
        directions: (concepts, embedding) of length 1.
        intercepts: (concepts,) of the machines, as scaled with them.
        task: A task of the model, which tells what shape its inputs have.
        head: The layer whose inputs are the embeddings.
    """

    names: list[str]
    directions: NDArray[np.float64]
    intercepts: NDArray[np.float64]
    task: Task
    head: nn.Linear

    def of(self, images: Sequence[Tensor], work: Work) -> NDArray[np.float64]:
        """(images, concepts) scores: signed distances from the machines' boundaries."""
        return self._scores(images)

    def _scores(self, images: Sequence[Tensor]) -> NDArray[np.float64]:
        rows = [with_image(self.task.rows[0], image) for image in images]
        found: NDArray[np.float64] = embeddings(with_rows(self.task, rows), self.head) @ self.directions.T
        return found + self.intercepts

    def windows(
        self, image: Tensor, speaking: NDArray[np.float64], found: Concepts, side: int, step: int
    ) -> Tensor:
        """(rows, columns) how much each window, enlarged to a whole image, speaks for a class."""
        height, width = image.shape[1:]
        rows, columns = range(0, height - side + 1, step), range(0, width - side + 1, step)
        cut = torch.stack([crop(image, (row, column), side) for row in rows for column in columns])
        whole = functional.interpolate(
            cut.float(), size=(height, width), mode="bilinear", align_corners=False
        ).to(image.dtype)
        standard = (self._scores(list(whole)) - found.mean) / found.deviation
        return torch.tensor(standard @ speaking).view(len(rows), len(columns))


def bottleneck(
    scorer: Grid | Vectors, labels: Sequence[int], images: Sequence[Tensor], work: Work
) -> Concepts:
    """A linear classifier on concept scores, with an elastic net as in post-hoc concept bottlenecks."""
    linear = _library().SGDClassifier(
        loss="log_loss", penalty="elasticnet", alpha=_SHARPNESS, l1_ratio=_LASSO, max_iter=1000,
        random_state=work.seed,
    )  # fmt: skip
    scores = scorer.of(images, work)
    mean, deviation = scores.mean(axis=0), np.maximum(scores.std(axis=0), 1e-8)
    linear.fit((scores - mean) / deviation, labels)
    weights = np.zeros((int(work.model.config.num_labels), len(scorer.names)))
    if len(linear.classes_) == 2:
        weights[linear.classes_] = np.concatenate([-linear.coef_, linear.coef_])
    else:
        weights[linear.classes_] = linear.coef_
    return Concepts(list(scorer.names), weights, mean, deviation)


def learn_vectors(data: Data, task: Task, head: nn.Linear, seed: int) -> Vectors:
    """Concept activation vectors: of each concept's images against those of the others.

    The cost of errors is the one with the best accuracy in three-fold cross-validation.

    Args:
        data: Images, labelled with the names of concepts.
        task: Of the model whose embeddings are used.
        head: The layer whose inputs are the embeddings.
        seed: Of the machines.

    Raises:
        RecordsError: Fewer than two concepts, or one of fewer than three images.
    """
    rows = read_rows(data)
    names = [str(row.get(data.label, "")) for row in rows]
    known = sorted(set(names))
    few = [name for name in known if names.count(name) < 3]
    if len(known) < 2 or few or "" in known:
        raise RecordsError(
            f"{data.path}: needs at least two names of concepts in field {data.label!r}, with three images "
            f"each; it has {', '.join(f'{names.count(name)} of {name!r}' for name in known)}."
        )
    plain = [{key: value for key, value in row.items() if key != data.label} for row in rows]
    found = embeddings(Task(data, plain, task.model, task.processor), head)
    directions, intercepts = [], []
    for name in known:
        machine = _machine(found, np.array([other == name for other in names]), seed)
        length = float(np.linalg.norm(machine.coef_))
        directions.append(machine.coef_[0] / length)
        intercepts.append(float(machine.intercept_[0]) / length)
    return Vectors(known, np.array(directions), np.array(intercepts), task, head)


def _machine(found: NDArray[np.float64], positive: NDArray[np.bool_], seed: int) -> Any:
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    folds = min(3, int(positive.sum()), int((~positive).sum()))
    search = GridSearchCV(SVC(kernel="linear", random_state=seed), {"C": _SIDES}, cv=folds)
    return search.fit(found, positive).best_estimator_


def _library() -> Any:
    try:
        from sklearn import linear_model
    except ImportError:
        raise MissingExtra("scikit-learn", "suites", "unlearn/concept-patches") from None
    return linear_model


def head_of(model: Any) -> nn.Linear:
    """The last linear layer that gives the classes.

    Raises:
        CheckpointError: There is none.
    """
    size = model.config.num_labels
    found = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == size]
    if not found:
        raise CheckpointError(
            f"{model.config.name_or_path}: has no linear layer of {size} outputs, so no head to train."
        )
    return found[-1]


@torch.no_grad()
def embeddings(task: Task, head: nn.Linear) -> NDArray[np.float64]:
    """(records, embedding) what the head reads of each record."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().cpu()))
    try:
        for batch in task.batches(_BATCH):
            task.logits(batch)
    finally:
        handle.remove()
    found: NDArray[np.float64] = torch.cat(seen).double().numpy()
    return found


@torch.no_grad()
def most_confused(task: Task, label: int, classes: Sequence[int]) -> int:
    """The class among `classes` whose records get most probability of `label`, on average."""
    shares: dict[int, list[float]] = {name: [] for name in classes}
    for batch in task.batches(_BATCH):
        found = task.logits(batch).float().softmax(dim=1)[:, label].tolist()
        for truth, share in zip(batch["labels"].tolist(), found, strict=True):
            if truth in shares:
                shares[truth].append(share)
    return max(classes, key=lambda name: float(np.mean(shares[name])))


def as_image(row: Row, where: str) -> Tensor:
    """(channels, rows, columns) a record of an image; of n * n numbers, one channel of n rows.

    Raises:
        SettingError: The record is no image.
    """
    if "pixel_values" in row:
        image: Tensor = row["pixel_values"]
        return image
    values = row.get("values")
    side = round(len(values) ** 0.5) if values is not None else 0
    if values is None or side * side != len(values):
        raise SettingError(
            f"{where}: reads images, or rows of numbers that are a square one; these are neither."
        )
    square: Tensor = values.view(1, side, side)
    return square


def with_image(row: Row, image: Tensor) -> Row:
    """The record with another image."""
    if "pixel_values" in row:
        return {**row, "pixel_values": image}
    return {**row, "values": image.flatten()}


def locate_peak(windows: Tensor, step: int) -> tuple[int, int]:
    """Row and column of the upper left corner of the best window; of equal ones the first.

    Args:
        windows: (rows, columns) their scores.
        step: Pixels between windows.
    """
    row, column = divmod(int(windows.flatten().argmax()), windows.shape[1])
    return row * step, column * step


def crop(image: Tensor, corner: tuple[int, int], side: int) -> Tensor:
    """(channels, side, side) a window, moved inside the image where it would leave it."""
    row, column = _inside(image, corner, side)
    return image[:, row : row + side, column : column + side]


def paste(image: Tensor, patch: Tensor, corner: tuple[int, int]) -> Tensor:
    """The image with a square patch on it, moved inside where it would leave it."""
    side = patch.shape[-1]
    row, column = _inside(image, corner, side)
    covered = image.clone()
    covered[:, row : row + side, column : column + side] = patch
    return covered


def _inside(image: Tensor, corner: tuple[int, int], side: int) -> tuple[int, int]:
    height, width = image.shape[1:]
    return max(0, min(corner[0], height - side)), max(0, min(corner[1], width - side))


def _all_rows(work: Work) -> list[Row]:
    return [*work.forget.rows, *work.kept().rows]


def _ranking(found: Concepts, label: int) -> Table:
    rows: list[list[str | float | int | None]] = [
        [found.names[index], float(f"{found.weights[label, index]:.4g}")]
        for index in found.top(label, len(found.names))
    ]
    return Table(title=f"Concepts of class {label}", columns=["concept", "weight"], rows=rows[:50])
