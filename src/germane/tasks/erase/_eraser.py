"""What a method of erasing supplies, a change of the pipeline's unet, and the noisy batches it works on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from germane.core.evidence import Step
from germane.method import Method
from germane.tasks.erase._pictures import Pictures
from germane.tasks.erase._pipeline import Condition, Pipeline


@dataclass(frozen=True)
class Concept:
    """What is to be erased.

    Attributes:
        value: A class number, or words that the prompts hold.
        classes: Of a class-conditional pipeline, the numbers of its classes without that for none.
    """

    value: Condition
    classes: Sequence[int] = ()


@dataclass
class Erasing:
    """What a method works on.

    Attributes:
        pipeline: Its unet is changed in place.
        concept: What is to be erased.
        forget: Images of the concept.
        keep: Images of others.
        seed: Of everything random.
        step: What there is to say goes here.
        generator: Draws noise and times, from the seed.
    """

    pipeline: Pipeline
    concept: Concept
    forget: Pictures
    keep: Pictures
    seed: int
    step: Step
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)


class Eraser(Method):
    """A method of erasing."""

    def check_concept(self, concept: Concept) -> None:
        """Raise a `SettingError` for settings that do not fit what is to be erased."""

    @abstractmethod
    def erase(self, erasing: Erasing) -> None:
        """Change `erasing.pipeline.unet` in place."""


@dataclass(frozen=True)
class Noisy:
    """A batch of images with noise added.

    Attributes:
        noisy: What the unet is given.
        times: (records,) how much noise there is.
        conditions: What the images are of.
        target: What the unet should predict.
    """

    noisy: Tensor
    times: Tensor
    conditions: Sequence[Condition]
    target: Tensor


def noisy_batch(erasing: Erasing, pictures: Pictures, numbers: Sequence[int]) -> Noisy:
    """These records under noise of random times."""
    pipeline, generator = erasing.pipeline, erasing.generator
    latents = pipeline.encode(pictures.images(numbers, pipeline.image_form), generator)
    noise = pipeline.noise(len(numbers), generator)
    times = torch.randint(0, pipeline.times, (len(numbers),), generator=generator).to(latents.device)
    noisy = pipeline.schedule.add_noise(latents, noise, times)
    conditions = [pictures.conditions[number] for number in numbers]
    return Noisy(noisy, times, conditions, pipeline.target(latents, noise, times))
