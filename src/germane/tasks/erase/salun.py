"""SalUn: the concept is drawn as another, and only the weights that matter for it may move."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from germane.core.errors import SettingError
from germane.core.evidence import Plot, Series
from germane.core.saliency import Fence, Weights, gradient_sizes, top_share
from germane.core.training import Hooks, Training, build_optimiser, fit
from germane.method import method
from germane.tasks.erase._eraser import Concept, Eraser, Erasing, Noisy, noisy_batch
from germane.tasks.erase._pipeline import Condition, Pipeline

_WITH_PROMPTS, _WITH_CLASSES = 7.5, 2.0  # the released scales of guidance for the mask


@method("erase/salun", paper="2310.12508", code="OPTML-Group/Unlearn-Saliency", needs=("training",))
class SalUn(Eraser, Training):
    """Train the concept's prediction towards another's, moving only the most salient weights.

    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
    Classification and Generation", ICLR 2024. With x_t a noisy image of the concept c, sg no gradient:
    |e(x_t|c) - sg e(x_t|c')|^2 + keep_weight |e(x_t|c_keep) - noise|^2, means over elements; the `anchor`
    gives c'. Salient are the `share` of all weights of the unet whose gradient, summed over batches, of
    |noise - (1 + s) e(x_t|c) + s e(x_t|none)|^2 is largest in the untouched unet. Every other weight ends
    exactly as it was.

    Use it to erase a class or an object, where images of it and of others are at hand.
    Not when nothing may be drawn in its place: the concept becomes the anchor. Not with a large share in
    the hope that the mask then matters: compare it with `share` 1.

    Differs from the code: the target is the current unet's, as released, where the paper lets the
    gradient through both predictions. Errors are means over elements; the released code for classes sums
    the keep error over pixels, so its 0.001 is about 3 here, for 3 x 32 x 32. It also clips every batch's
    gradient before adding it to the saliency, which the paper does not, and draws times in pairs t and
    T - t; here they are drawn one by one, as for prompts. It leaves out the class at random while it
    trains; here it is always told. Without a condition for none the mask is unguided (s = 0). The default
    `keep_weight` is the README's 0.5; the script's own is 0.1.
    """

    share: float = Field(default=0.5, gt=0, le=1, description="of the weights that may move")
    anchor: str = Field(
        default="",
        description="class number, or words, drawn in the concept's place; default: the next class",
    )
    keep_weight: float = Field(default=0.5, ge=0, description="of the error on images to keep")
    mask_guidance: float | None = Field(
        default=None, ge=0,
        description="s of the guided prediction for the mask; default: 7.5 with prompts, 2 with classes",
    )  # fmt: skip
    lora_rank: int = Field(default=0, ge=0, le=0, description="always 0: the mask is on the unet's weights")

    def check_concept(self, concept: Concept) -> None:
        if isinstance(concept.value, str):
            if not self.anchor.strip():
                raise SettingError(
                    f"{self.name}: needs words to put in the concept's place: --anchor WORDS."
                )
            if concept.value.lower() in self.anchor.lower():
                raise SettingError(f"{self.name}: anchor {self.anchor!r} holds the concept itself.")
            return
        if self.anchor and (not self.anchor.isdigit() or int(self.anchor) not in concept.classes):
            raise SettingError(f"{self.name}: anchor {self.anchor!r} is no class of the pipeline.")
        if len(concept.classes) < 2 or self.anchor == str(concept.value):
            raise SettingError(f"{self.name}: the anchor must be another class than the concept.")

    def erase(self, erasing: Erasing) -> None:
        unet = erasing.pipeline.unet
        unet.requires_grad_(True)
        if self.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        fence = Fence(unet, self.mask(erasing))
        fence.optimiser = build_optimiser(unet.parameters(), self)
        torch.manual_seed(erasing.seed)  # of dropout, where the unet has it
        unet.train()
        history = fit(
            unet, self, lambda epoch: self._batches(erasing, epoch),
            -(-len(erasing.forget) // self.batch_size),
            lambda pair: self.loss(erasing.pipeline, pair), Hooks(fence.mask_gradients, fence.put_back),
            optimiser=fence.optimiser, label=self.name,
        )  # fmt: skip
        unet.eval()
        steps = [float(number) for number in range(1, len(history.losses) + 1)]
        series = [Series(name=self.name, steps=steps, values=history.losses)]
        erasing.step.plots.append(Plot(title="loss by batch", x="batch", y="loss", series=series))

    def mask(self, erasing: Erasing) -> Weights:
        """Of each parameter, which of its elements may move."""
        return top_share(gradient_sizes(erasing.pipeline.unet, self._mask_losses(erasing)), self.share)

    def _mask_losses(self, erasing: Erasing) -> Iterator[Tensor]:
        pipeline = erasing.pipeline
        default = _WITH_PROMPTS if isinstance(erasing.concept.value, str) else _WITH_CLASSES
        scale = default if self.mask_guidance is None else self.mask_guidance
        for start in range(0, len(erasing.forget), self.batch_size):
            numbers = range(start, min(start + self.batch_size, len(erasing.forget)))
            yield mask_loss(pipeline, noisy_batch(erasing, erasing.forget, numbers), scale)

    def _batches(self, erasing: Erasing, epoch: int) -> Iterator[Pair]:
        """Shuffled images of the concept, each batch with as many images to keep."""
        chosen = random.Random(f"{erasing.seed}/{epoch}")
        forget = chosen.sample(range(len(erasing.forget)), len(erasing.forget))
        keep = chosen.sample(range(len(erasing.keep)), len(erasing.keep))
        for start in range(0, len(forget), self.batch_size):
            numbers = forget[start : start + self.batch_size]
            others = [keep[(start + place) % len(keep)] for place in range(len(numbers))]
            concept = noisy_batch(erasing, erasing.forget, numbers)
            anchors = [replaced(c, erasing.concept, self.anchor) for c in concept.conditions]
            yield Pair(concept, anchors, noisy_batch(erasing, erasing.keep, others))

    def loss(self, pipeline: Pipeline, pair: Pair) -> Tensor:
        """Distance of the concept's prediction from the anchor's, and the error on images to keep."""
        concept, keep = pair.concept, pair.keep
        with torch.no_grad():
            wanted = pipeline.predict(concept.noisy, concept.times, pair.anchors)
        drawn = pipeline.predict(concept.noisy, concept.times, concept.conditions)
        kept = pipeline.predict(keep.noisy, keep.times, keep.conditions)
        return (drawn - wanted).square().mean() + self.keep_weight * (kept - keep.target).square().mean()


@dataclass(frozen=True)
class Pair:
    """One step's batches: of the concept, with what it is to be drawn as, and to keep."""

    concept: Noisy
    anchors: Sequence[Condition]
    keep: Noisy


def mask_loss(pipeline: Pipeline, batch: Noisy, scale: float) -> Tensor:
    """Mean squared error of the guided prediction (1 + scale) e(c) - scale e(none)."""
    guided = pipeline.guided(batch.noisy, batch.times, batch.conditions, 1 + scale)
    return (guided - batch.target).square().mean()


def replaced(condition: Condition, concept: Concept, anchor: str) -> Condition:
    """What is to be drawn instead: the anchor's class or the next one, or the prompt with other words."""
    if isinstance(condition, str):
        return re.sub(re.escape(str(concept.value)), lambda _: anchor, condition, flags=re.IGNORECASE)
    if anchor:
        return int(anchor)
    classes = list(concept.classes)
    return classes[(classes.index(condition) + 1) % len(classes)]
