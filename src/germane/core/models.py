"""Models that are looked into or changed: loaded with what reads their records, and saved again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from germane.core.checkpoint import (
    INDEX,
    Checkpoint,
    TensorInfo,
    copy_companions,
    locate,
    model_class,
    read_json,
)
from germane.core.device import device
from germane.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEMORY = "memory.safetensors"  # of edited models: what acts beside the weights
_CONFIG = "config.json"
_IMAGES = "preprocessor_config.json"


@dataclass
class Loaded:
    """A model and what turns records into its inputs.

    Attributes:
        model: Any model of transformers.
        processor: Its tokenizer, its image processor, or None where records are rows of numbers.
        folder: Where it was loaded from.
    """

    model: PreTrainedModel
    processor: Any
    folder: Path

    def save(self, folder: Path) -> None:
        """Write a plain model folder, in the dtypes of the files it was loaded from."""
        from transformers.utils import logging

        logging.disable_progress_bar()  # germane shows its own, and only to a terminal
        folder.mkdir(parents=True, exist_ok=True)
        copy_companions(self.folder, folder)
        (folder / INDEX).unlink(missing_ok=True)  # the shards of the result are its own
        with _stored_as(self.model, Checkpoint(self.folder).tensors.values()):
            self.model.save_pretrained(folder)
        self.model.config.save_pretrained(folder)


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether it is a causal language model."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def names_language_model(architectures: str) -> bool:
    """The same from what a config says under `architectures`, before anything is loaded."""
    return "ForCausalLM" in architectures or "LMHead" in architectures


@contextmanager
def _stored_as(model: PreTrainedModel, tensors: Iterable[TensorInfo]) -> Iterator[None]:
    """Inside, a model's floating-point weights have the dtype that most of these tensors have."""
    counts = Counter(info.torch_dtype for info in tensors if info.is_float)
    outside = model.dtype
    model.to(counts.most_common(1)[0][0] if counts else torch.float32)
    try:
        yield
    finally:
        model.to(outside)


def load_model(path: str, dtype: torch.dtype | None = None, beside: bool = False) -> Loaded:
    """The model of a folder or hub id on the device, by the class that its config names.

    Args:
        path: A folder or hub id.
        dtype: Of the weights; default: float32 on a CPU, else the files' own.
        beside: Load the weights also where edits act beside them, which the caller then puts in place.

    Raises:
        CheckpointError: No such model, or one that cannot be loaded whole.
    """
    folder = locate(path)
    if (folder / MEMORY).is_file() and not beside:
        raise CheckpointError(
            f"{path}: its edits act beside its weights, which alone are the untouched model: "
            "open it with germane.load_edited, or use the untouched model."
        )
    place = device()
    chosen: Any = dtype or (torch.float32 if place.type == "cpu" else "auto")
    try:
        model, report = model_class(folder).from_pretrained(folder, dtype=chosen, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path}: cannot be loaded: {reason}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: lacks {len(missing)} tensors that its architecture has, among them {missing[0]!r}: "
            "they would be random. Save the whole model again."
        )
    if not hasattr(model, "hf_device_map"):
        model = model.to(place)
    return Loaded(model.eval(), load_processor(folder), folder)


def load_processor(folder: Path) -> Any:
    """The image processor or tokenizer of a model folder, or None where its records are rows.

    Raises:
        CheckpointError: There should be one, but it cannot be loaded.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    rows = "features" in read_json(folder / _CONFIG)
    if rows:
        return None
    kind: Any = AutoImageProcessor if (folder / _IMAGES).is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder}: has no tokenizer or image processor: {reason}") from None


def initialise(loaded: Loaded, seed: int) -> None:
    """Give the model the random weights it would have before any training, in place."""
    torch.manual_seed(seed)
    fresh = type(loaded.model)(loaded.model.config)
    loaded.model.load_state_dict(fresh.state_dict())
