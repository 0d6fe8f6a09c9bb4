"""The model being merged, in memory: methods with data read its loss and gradient and move it.

One set of weights serves every task: each task's model has its own head and class, and shares the
backbone's memory and gradient with the others. What is held is the model, its gradient and a few
megabytes of candidates; members stay on disk however many there are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from germane.core.checkpoint import Source, TensorInfo, model_class
from germane.core.device import device
from germane.core.errors import CheckpointError, RecordsError
from germane.core.evidence import Step
from germane.core.objective import Loss, Task
from germane.core.records import Data, read_rows
from germane.method import Method
from germane.tasks.merge._adapter import Adapter
from germane.tasks.merge._pool import Member, Pool, common_prefix, open_pool, rename
from germane.tasks.merge._stream import Block, Stream

_BATCH = 16


class Live:
    """A model in memory that can be read as a `Source` while it is moved.

    Attributes:
        label: "merged".
        weights: Base tensor name -> float32 tensor, shared by every task's model.
        gradients: The same names -> gradient of the last `gradient()`.
        tasks: The tasks, each with its own head.
    """

    label = "merged"

    def __init__(self, pool: Pool, data: Sequence[Data], limit: int | None = None) -> None:
        self.weights: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.tensors = moving_tensors(pool)
        self.tasks = [self._load_task(pool, item, limit) for item in data]

    def _load_task(self, pool: Pool, data: Data, limit: int | None) -> Task:
        from transformers import AutoTokenizer

        rows = read_rows(data)[:limit]
        model = load_with_head(pool, data)
        self._share(pool, model)
        tokenizer = AutoTokenizer.from_pretrained(pool.base.folder)
        return Task(data, rows, model, tokenizer)

    def _share(self, pool: Pool, model: Any) -> None:
        """Put the shared weights and gradients under the model's parameters."""
        model.requires_grad_(False).eval()
        found = model_parameters(pool, model)
        moving = {info.name for info in self.tensors}
        seen: dict[int, str] = {}
        for name, parameter in found.items():
            twin = seen.setdefault(id(parameter), name)
            if twin != name:  # tied: one parameter under two of the base's names, moved once
                self.weights[name] = self.weights[twin]
                self.tensors = [info for info in self.tensors if info.name != name]
                continue
            if name not in self.weights:
                values = pool.base.tensor(name).to(device(), torch.float32)
                self.weights[name] = values
            parameter.data = self.weights[name]
            if name not in moving:
                continue
            gradient = self.gradients.setdefault(name, torch.zeros_like(parameter.data))
            if isinstance(parameter, torch.nn.Parameter):  # a buffer moves, but has no gradient
                parameter.requires_grad_(True)
                parameter.grad = gradient

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of the weights as they are now."""
        return self.weights[name].reshape(-1)[start:stop].cpu()

    def copy(self) -> Memory:
        """The moving weights as they are now, to come back to."""
        names = [info.name for info in self.tensors]
        return Memory("start", {name: self.weights[name].clone() for name in names})

    def update(self, function: Callable[[Block], Tensor], stream: Stream) -> None:
        """Replace every block of the weights by `function` of it."""

        def put(block: Block) -> None:
            flat = self.weights[block.name].view(-1)
            flat[block.start : block.start + len(block.base)].copy_(function(block))

        for _ in stream.map(put):
            pass

    def gradient(self, loss: Loss, tasks: Sequence[Task] | None = None) -> dict[str, float]:
        """Set `gradients` to those of the mean loss over tasks; returns each task's loss.

        Dropout is off (the official code leaves it on), so the same records give the same numbers.
        """
        self.clear_gradient()
        tasks = self.tasks if tasks is None else tasks
        losses = {}
        for task in tasks:
            total = 0.0
            for batch in task.batches(_BATCH, task.sorted_order()):
                value = task.losses(batch, loss).sum() / len(task.rows)
                (value / len(tasks)).backward()
                total += float(value.detach())
            losses[task.name] = total
        return losses

    def clear_gradient(self) -> None:
        """Set the shared gradients to zero, in place."""
        for gradient in self.gradients.values():
            gradient.zero_()

    @torch.no_grad()
    def loss(self, loss: Loss) -> dict[str, float]:
        """Each task's mean loss."""
        return {
            task.name: sum(
                float(task.losses(batch, loss).sum())
                for batch in task.batches(2 * _BATCH, task.sorted_order())
            )
            / len(task.rows)
            for task in self.tasks
        }

    def fold(self, stream: Stream, measure: Callable[[Block, Tensor], Tensor]) -> dict[str, Tensor]:
        """Tensor name -> sum over its blocks of `measure`, which also gets the block's gradient."""

        def with_gradient(block: Block) -> Tensor:
            flat = self.gradients[block.name].view(-1)
            return measure(block, flat[block.start : block.start + len(block.base)].cpu()).double()

        return dict(stream.fold(with_gradient, per_tensor=True))


class Memory:
    """A model's tensors in memory as a `Source`."""

    def __init__(self, label: str, tensors: dict[str, Tensor]) -> None:
        self.label = label
        self._tensors = tensors

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of a tensor, flat."""
        return self._tensors[name].reshape(-1)[start:stop].cpu()


class LiveMethod(Method):
    """A merge that needs data: it moves a model in memory, guided by loss and gradient."""

    objective: Loss = Field(
        default="cross-entropy",
        description="what to lower: cross-entropy on labelled records, or entropy on any",
    )

    @abstractmethod
    def move(self, live: Live, pool: Pool, step: Step, seed: int) -> None:
        """Bring `live` to the merged weights, and put shares, reasons and plots into `step`."""


def moving_tensors(pool: Pool) -> list[TensorInfo]:
    """The tensors in which at least one member differs from the base."""
    stream = Stream(pool.base, pool.members, pool.tensors)
    moved = {
        name
        for name, most in stream.fold(lambda block: block.deltas.abs().amax().view(1), True)
        if most > 0
    }
    return [info for info in pool.tensors if info.name in moved]


def load_with_head(pool: Pool, data: Data) -> Any:
    """The transformers model that reads `data`: the class and head of the member it names.

    Raises:
        RecordsError: Several members have heads and the data names none of them.
    """
    member = head_member(pool, data)
    if member is None:
        return _load(pool.base.folder)
    if isinstance(member, Member):
        return _load(member.checkpoint.folder)
    return _load_adapter_head(pool, member)


def head_member(pool: Pool, data: Data) -> Member | Adapter | None:
    """The model whose head reads `data`, or None where the models have no heads of their own.

    A member of the pool, by its label or the data's name, or any fine-tune of the base, by its folder.
    """
    if data.head and Path(data.head).is_dir():
        return open_pool(str(pool.base.folder), [data.head]).members[0]
    with_heads = [member for member in pool.members if member.heads]
    if not with_heads:
        if data.head:
            raise RecordsError(
                f"data {data.name!r}: no member of the pool has a head of its own; leave `head` out."
            )
        return None
    wanted = data.head or data.name
    for member in with_heads:
        if member.label == wanted:
            return member
    if len(with_heads) == 1 and not data.head:
        return with_heads[0]
    raise RecordsError(
        f"data {data.name!r}: no member {wanted!r} with a head to read it; set its `head` to one of "
        f"{', '.join(member.label for member in with_heads)}."
    )


def _load(folder: Path) -> Any:
    return model_class(folder).from_pretrained(folder, dtype=torch.float32).to(device())


def _load_adapter_head(pool: Pool, adapter: Adapter) -> Any:
    import transformers

    kinds = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}
    kind = kinds.get(str(adapter.config.get("task_type")))
    if kind is None:
        raise CheckpointError(f"{adapter.folder}: adapters of task type {adapter.config.get('task_type')} "
                              f"have no known head; known: {', '.join(kinds)}.")  # fmt: skip
    head = adapter.head()
    # The narrowest tensor is the last layer: heads such as RoBERTa's have wider ones before it.
    labels = min((len(tensor) for tensor in head.values() if tensor.dim()), default=2)
    model = getattr(transformers, kind).from_pretrained(
        pool.base.folder, num_labels=labels, dtype=torch.float32
    )
    model.load_state_dict(head, strict=False)
    return model.to(device())


def model_parameters(pool: Pool, model: Any) -> dict[str, Any]:
    """Base tensor name -> the model's parameter or buffer of that tensor.

    Raises:
        CheckpointError: A tensor to be merged is nowhere in the model transformers made of it.
    """
    inside = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    names = [info.name for info in pool.tensors]
    prefix = common_prefix(inside, names)
    found = {}
    for name in names:
        own = rename(name, prefix or "")
        if own not in inside:
            raise CheckpointError(
                f"{pool.base.folder}: transformers has no parameter for its tensor {name}; load and "
                "save_pretrained() the checkpoints with the transformers installed here first."
            )
        found[name] = inside[own]
    return found


def optimise_coefficients(
    live: Live,
    anchor: Source,
    vertices: Sequence[Source],
    start: float,
    *,
    per_tensor: bool,
    steps: int,
    learning_rate: float,
    batch_size: int,
    loss: Loss,
    seed: int,
    constrain: Callable[[Tensor], Tensor] = lambda coefficients: coefficients,
    on_step: Callable[[int, float], None] = lambda step, value: None,
) -> Tensor:
    """Adam on the coefficients of `anchor + sum_j c_j (vertex_j - anchor)`; leaves `live` there.

    The gradient of a coefficient is the gradient of the weights times the vertex's difference from
    the anchor, so no graph through the merge is kept and vertices are streamed from disk.

    Args:
        start: Every coefficient's first value.
        per_tensor: One coefficient for each vertex and tensor, or one for each vertex.
        constrain: Applied to the coefficients (vertices, tensors) after every step.

    Returns:
        (vertices, tensors) coefficients.
    """
    stream = Stream(anchor, vertices, live.tensors)
    columns = {info.name: index for index, info in enumerate(live.tensors)}
    free = torch.full((len(vertices), len(columns) if per_tensor else 1), start, dtype=torch.float64)
    coefficients = constrain(free.clone())
    optimiser = torch.optim.Adam([coefficients.requires_grad_()], lr=learning_rate)
    generator = np.random.default_rng(seed)

    def place(block: Block) -> Tensor:
        column = columns[block.name] if per_tensor else 0
        return block.base + coefficients.detach()[:, column].float() @ block.deltas

    live.update(place, stream)
    for step in range(steps):
        value = _sampled_gradient(live, generator, batch_size, loss)
        slopes = live.fold(stream, lambda block, gradient: block.deltas @ gradient)
        gradient = torch.stack([slopes[name] for name in columns], dim=1)
        coefficients.grad = gradient if per_tensor else gradient.sum(dim=1, keepdim=True)
        optimiser.step()
        coefficients.data = constrain(coefficients.data)
        live.update(place, stream)
        on_step(step, value)
    return coefficients.detach().expand(-1, len(columns))


def _sampled_gradient(live: Live, generator: np.random.Generator, batch_size: int, loss: Loss) -> float:
    """Gradient of the summed loss of one random batch of every task."""
    live.clear_gradient()
    total = 0.0
    for task in live.tasks:
        size = min(batch_size, len(task.rows))
        order = generator.choice(len(task.rows), size, replace=False)
        value = task.losses(next(task.batches(size, list(order))), loss).mean()
        value.backward()
        total += float(value.detach())
    return total
