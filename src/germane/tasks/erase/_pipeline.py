"""Diffusion pipelines of two kinds, class-conditional and text-to-image, behind one set of words.

A condition is a class number, or a prompt. Plain diffusers has no pipeline that draws by class with a
UNet2DModel and an ordinary schedule: DDPMPipeline and DDIMPipeline save and open one, but pass it no
class. Their folders are the form here, and drawing is done in this file.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from germane.core.checkpoint import Checkpoint, locate, read_json
from germane.core.device import device
from germane.core.errors import CheckpointError, MissingExtra

Condition = int | str
INDEX = "model_index.json"
UNET = "unet"
_KINDS = {
    "DDPMPipeline": "UNet2DModel",
    "DDIMPipeline": "UNet2DModel",
    "StableDiffusionPipeline": "UNet2DConditionModel",
}
_NEEDED = {
    "UNet2DModel": ("unet", "scheduler"),
    "UNet2DConditionModel": ("unet", "scheduler", "vae", "text_encoder", "tokenizer"),
}
_WEIGHTS = ("unet", "vae", "text_encoder")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # not opened, but kept in the result
_LIBRARIES = ("diffusers", "transformers")
_PREDICTIONS = ("epsilon", "v_prediction")


def check_folder(path: str) -> Path:
    """The folder of a pipeline that is whole and can be erased from; nothing of it is loaded.

    Raises:
        CheckpointError: What is missing, of another kind, or a pickle.
    """
    folder = locate(path)
    index = read_json(folder / INDEX)
    kind = str(index.get("_class_name"))
    if kind not in _KINDS:
        raise CheckpointError(f"{path}: is a {kind}; germane erases from {', '.join(_KINDS)}.")
    for part in _NEEDED[_KINDS[kind]]:
        _check_part(folder, part, index)
    config = read_json(folder / UNET / "config.json")
    if config.get("_class_name") != _KINDS[kind]:
        raise CheckpointError(
            f"{path}: its unet is a {config.get('_class_name')}, not a {_KINDS[kind]} as in a {kind}."
        )
    if kind != "StableDiffusionPipeline" and (
        not config.get("num_class_embeds") or config.get("class_embed_type")
    ):
        raise CheckpointError(
            f"{path}: its unet has no class embeddings (num_class_embeds), so it draws no class that "
            "could be erased."
        )
    prediction = read_json(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise CheckpointError(
            f"{path}: its unet predicts {prediction!r}; germane erases where it predicts "
            f"{' or '.join(_PREDICTIONS)}."
        )
    return folder


def _check_part(folder: Path, part: str, index: dict[str, Any]) -> None:
    """Whether a component is there, of a library that is trusted, with weights that are no pickle."""
    library = (index.get(part) or [None])[0]
    if library is None or not (folder / part).is_dir():
        raise CheckpointError(f"{folder}: has no {part}; save the whole pipeline again.")
    if library not in _LIBRARIES:
        raise CheckpointError(
            f"{folder}: its {part} is code of {library!r}; germane runs no code from model folders."
        )
    if part in _WEIGHTS:
        Checkpoint(folder / part)


def takes_text(folder: Path) -> bool:
    """Whether conditions are prompts."""
    return bool(read_json(folder / INDEX)["_class_name"] == "StableDiffusionPipeline")


def class_count(folder: Path) -> int:
    """Of a class-conditional pipeline, the class numbers that its unet has."""
    return int(read_json(folder / UNET / "config.json")["num_class_embeds"])


class Pipeline(ABC):
    """A pipeline of diffusers, opened to be drawn with and changed.

    Attributes:
        folder: Where it was loaded from.
        unet: Its network, on the device.
        schedule: DDPM's with the pipeline's betas: how much noise there is at each time.
        absent: The condition that stands for none, or None where there is no such.
    """

    unet: Any
    absent: Condition | None

    def __init__(self, folder: Path, scheduler: Any) -> None:
        from diffusers import DDIMScheduler, DDPMScheduler

        self.folder = folder
        self.schedule = DDPMScheduler.from_config(scheduler.config)
        self._drawing = DDIMScheduler.from_config(scheduler.config)

    @property
    def times(self) -> int:
        """Number of times of the schedule."""
        return int(self.schedule.config.num_train_timesteps)

    @property
    @abstractmethod
    def image_form(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that it draws."""

    @property
    @abstractmethod
    def latent_form(self) -> tuple[int, int, int]:
        """The same of what the unet works on."""

    @abstractmethod
    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images from -1 to 1 as what the unet works on."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images from -1 to 1, or a little beyond."""

    @abstractmethod
    def inputs(self, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """Conditions as the unet takes them."""

    def predict(self, noisy: Tensor, times: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """What the unet predicts: the noise, or the velocity."""
        prediction: Tensor = self.unet(noisy, times, **self.inputs(conditions)).sample
        return prediction

    def guided(
        self, noisy: Tensor, times: Tensor, conditions: Sequence[Condition], weight: float
    ) -> Tensor:
        """The prediction led away from that of no condition: e(none) + weight (e(c) - e(none))."""
        named = self.predict(noisy, times, conditions)
        if self.absent is None or weight == 1:
            return named
        unnamed = self.predict(noisy, times, [self.absent] * len(noisy))
        return unnamed + weight * (named - unnamed)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the unet should predict for these latents under this noise."""
        if self.schedule.config.prediction_type == "v_prediction":
            velocity: Tensor = self.schedule.get_velocity(latents, noise, times)
            return velocity
        return noise

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Standard normal latents; drawn on the CPU, so that every device gets the same."""
        return torch.randn(count, *self.latent_form, generator=generator).to(self.unet.device)

    @torch.no_grad()
    def draw(
        self, conditions: Sequence[Condition], generator: torch.Generator, steps: int, weight: float
    ) -> Tensor:
        """Images (records, channels, height, width) from 0 to 1, by DDIM: the noise alone decides them."""
        self.unet.eval()
        latents = self.noise(len(conditions), generator)
        self._drawing.set_timesteps(steps)
        for time in self._drawing.timesteps:
            times = time.to(latents.device).expand(len(latents))
            prediction = self.guided(latents, times, conditions, weight)
            latents = self._drawing.step(prediction, time, latents).prev_sample
        return (self.decode(latents).float() / 2 + 0.5).clamp(0, 1).cpu()

    def save(self, folder: Path) -> None:
        """Write a folder of the same form: the unet in the dtype of its files, all else copied."""
        shutil.copytree(
            self.folder, folder, dirs_exist_ok=True,
            ignore=lambda place, names: {UNET} if Path(place) == self.folder else set(),
        )  # fmt: skip
        tensors = Checkpoint(self.folder / UNET).tensors.values()
        dtypes = Counter(info.torch_dtype for info in tensors if info.is_float)
        self.unet.to(dtypes.most_common(1)[0][0]).save_pretrained(folder / UNET)
        self.unet.to(torch.float32)


class ByClass(Pipeline):
    """Draws classes, by number."""

    def __init__(self, folder: Path, pipeline: Any, absent: int | None) -> None:
        super().__init__(folder, pipeline.scheduler)
        self.unet = pipeline.unet
        self.absent = absent

    @property
    def image_form(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return self.unet.config.in_channels, height, width

    @property
    def latent_form(self) -> tuple[int, int, int]:
        return self.image_form

    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return images.to(self.unet.device, self.unet.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def inputs(self, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor(list(conditions), device=self.unet.device)}


class ByText(Pipeline):
    """Draws prompts: Stable Diffusion."""

    def __init__(self, folder: Path, pipeline: Any) -> None:
        super().__init__(folder, pipeline.scheduler)
        self.unet = pipeline.unet
        self.absent = ""
        self._pipeline = pipeline
        pipeline.vae.requires_grad_(False)
        pipeline.text_encoder.requires_grad_(False)

    @property
    def image_form(self) -> tuple[int, int, int]:
        side = self.unet.config.sample_size * self._pipeline.vae_scale_factor
        return self._pipeline.vae.config.in_channels, side, side

    @property
    def latent_form(self) -> tuple[int, int, int]:
        side = self.unet.config.sample_size
        return self.unet.config.in_channels, side, side

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        vae = self._pipeline.vae
        spread = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        noise = torch.randn(spread.mean.shape, generator=generator).to(spread.mean)
        latents: Tensor = (spread.mean + spread.std * noise) * vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self._pipeline.vae
        images: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
        return images

    @torch.no_grad()
    def inputs(self, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        states, _ = self._pipeline.encode_prompt(
            list(conditions), self.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states}


def load_pipeline(path: str, absent: int | None = None) -> Pipeline:
    """A pipeline on the device; a safety checker and what belongs to it stay where they are.

    Args:
        path: A folder or hub id.
        absent: Of a class-conditional pipeline, the class number that stands for none, if there is one.

    Raises:
        CheckpointError: One that is not whole, or of another kind.
    """
    folder = check_folder(path)
    diffusers = _diffusers()
    index = read_json(folder / INDEX)
    try:
        unet, report = getattr(diffusers, _KINDS[index["_class_name"]]).from_pretrained(
            folder, subfolder=UNET, output_loading_info=True, use_safetensors=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its unet lacks {sorted(report['missing_keys'])[0]!r}")
        unused = {part: None for part in _UNUSED if part in index}
        kind = getattr(diffusers, index["_class_name"])
        pipeline = kind.from_pretrained(folder, unet=unet, use_safetensors=True, **unused)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path}: cannot be loaded: {reason}") from None
    pipeline.to(device(), torch.float32)  # so that small steps are not lost
    unet.eval()
    return ByText(folder, pipeline) if takes_text(folder) else ByClass(folder, pipeline, absent)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise MissingExtra("diffusers", "diffusion", "a pipeline") from None
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers
