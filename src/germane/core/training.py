"""The one training loop: what every method that fine-tunes stands on.

Devices, mixed precision and gradient accumulation are accelerate's. A loss or a gradient that is not
finite stops the training before it reaches the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from germane.core.device import device
from germane.core.errors import GermaneError, MissingExtra, SettingError
from germane.core.progress import bar
from germane.core.settings import Settings

Item = TypeVar("Item")


class Training(Settings):
    """Settings of fine-tuning; methods that fine-tune inherit them, with defaults of their own."""

    learning_rate: float = Field(default=1e-5, gt=0, description="of the optimiser")
    epochs: int = Field(default=5, ge=0, description="times the records are gone through")
    batch_size: int = Field(default=8, gt=0, description="records of a step that are in memory together")
    accumulate: int = Field(default=1, gt=0, description="batches whose gradients make one step")
    optimiser: Literal["adamw", "sgd"] = Field(default="adamw", description="AdamW, or SGD with momentum")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(default=0.0, ge=0, description="of the optimiser")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="how the learning rate falls to zero, if it does"
    )
    warmup: int = Field(default=0, ge=0, description="steps in which the learning rate rises")
    clip: float = Field(default=0.0, ge=0, description="longest gradient; 0 for no limit")
    lora_rank: int = Field(
        default=0, ge=0, description="rank of LoRA adapters that are trained instead; 0 trains all weights"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations twice instead of keeping them"
    )


class Diverged(GermaneError):
    """The loss or the gradient became NaN or infinite; the weights are those before that step."""


@dataclass
class Hooks:
    """What happens between the parts of a training step, for methods that need it.

    Attributes:
        after_backward: Called when the gradients of a step are complete, before clipping.
        after_step: Called when the weights have moved.
        after_epoch: Called with the epoch's number, from 1; training ends where it returns True.
    """

    after_backward: Callable[[], None] = lambda: None
    after_step: Callable[[], None] = lambda: None
    after_epoch: Callable[[int], bool] = lambda epoch: False


@dataclass
class History:
    """What a training left behind: the loss of each step, by epoch."""

    losses: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)


def fit(
    model: nn.Module,
    settings: Training,
    batches: Callable[[int], Iterable[Item]],
    steps: int,
    loss: Callable[[Item], Tensor | Iterator[Tensor]],
    hooks: Hooks | None = None,
    optimiser: torch.optim.Optimizer | None = None,
    label: str = "training",
) -> History:
    """Lower `loss` by moving those parameters of the model that require gradients.

    Args:
        model: Trained in place; its mode (training or evaluation) is left as it is.
        settings: Learning rate and the rest.
        batches: From an epoch's number, from 0, to its batches.
        steps: Batches of one epoch, for the schedule and the progress bar.
        loss: From a batch to a scalar, or to scalars that are added: each one's activations are let go
            before the next one is computed.
        hooks: What else happens.
        optimiser: Used instead of the settings' own.
        label: Of the progress bar.

    Raises:
        Diverged: With the step at which the loss or the gradient was not finite.
    """
    from accelerate import Accelerator

    hooks = hooks or Hooks()
    accelerator = Accelerator(cpu=device().type == "cpu")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = optimiser or build_optimiser(parameters, settings)
    schedule = _schedule(optimiser, settings, math.ceil(steps / settings.accumulate) * settings.epochs)
    history = History()
    with bar(label, steps * settings.epochs) as advance:
        for epoch in range(settings.epochs):
            total, count = 0.0, 0
            for number, item in enumerate(batches(epoch), 1):
                place = f"epoch {epoch + 1}, batch {number}"
                value = _descend(accelerator, _parts(loss, item), settings.accumulate, place)
                total, count = total + value, count + 1
                history.losses.append(value)
                advance(note=f"loss {history.losses[-1]:.3f}")
                if number % settings.accumulate == 0 or number == steps:
                    hooks.after_backward()
                    _clip(parameters, settings.clip, epoch, number)
                    optimiser.step()
                    schedule.step()
                    optimiser.zero_grad()
                    hooks.after_step()
            history.epochs.append(total / max(count, 1))
            if hooks.after_epoch(epoch + 1):
                break
    optimiser.zero_grad()
    return history


def _descend(accelerator: Any, losses: Iterator[Tensor], accumulate: int, place: str) -> float:
    """Add the gradients of a batch's losses, one by one; returns their sum."""
    total = 0.0
    while True:
        with accelerator.autocast():
            part = next(losses, None)
        if part is None:
            return total
        total += float(part.detach())
        require_finite(total, "the loss", place)
        accelerator.backward(part / accumulate)
        del part  # with its graph, before the next one is computed


def _parts(loss: Callable[[Item], Tensor | Iterator[Tensor]], item: Item) -> Iterator[Tensor]:
    """What a loss is made of, computed as it is asked for."""
    value = loss(item)
    if isinstance(value, Tensor):
        yield value
    else:
        yield from value


def _clip(parameters: list[nn.Parameter], limit: float, epoch: int, number: int) -> None:
    """Shorten the gradient to `limit`, if there is one; refuse a gradient that is not finite."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    require_finite(float(norm), "the gradient", f"epoch {epoch + 1}, batch {number}")
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def require_finite(value: float, what: str, place: str) -> None:
    """Raise `Diverged` for a loss or gradient that is not finite, with the place where it became so."""
    if not math.isfinite(value):
        raise Diverged(
            f"{what} became {value} in {place}; the weights are those before it. "
            "A lower learning rate, or clip, keeps it finite."
        )


def build_optimiser(parameters: Iterable[nn.Parameter], settings: Training) -> torch.optim.Optimizer:
    """The optimiser of the settings."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)


def _schedule(
    optimiser: torch.optim.Optimizer, settings: Training, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / (settings.warmup + 1)
        done = (step - settings.warmup) / max(1, steps - settings.warmup)
        falling = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return max(0.0, falling[settings.schedule])

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def prepare(model: Any, settings: Training) -> Any:
    """The model as it is to be trained: with LoRA adapters, and recomputed activations, where asked.

    Returns:
        The model itself, or PEFT's model around it; `finish` gives the plain one back.
    """
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise SettingError(f"gradient_checkpointing: a {type(model).__name__} cannot do it.")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not settings.lora_rank:
        model.requires_grad_(True)
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtra("peft", "adapters", "lora_rank above 0") from None
    chosen = LoraConfig(
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear"
    )
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, chosen)


def finish(model: Any) -> Any:
    """The plain model with what was trained in its weights."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        model.gradient_checkpointing_disable()
    return model.requires_grad_(True).eval()
