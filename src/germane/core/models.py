"""Models that are looked into or changed: loaded with what reads their records, and saved again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from germane.core.checkpoint import Checkpoint, copy_companions, locate, model_class, read_json
from germane.core.device import device
from germane.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    @property
    def is_language_model(self) -> bool:
        """Whether it continues texts."""
        return is_language_model(self.model)

    def save(self, folder: Path) -> None:
        """Write a plain model folder, in the dtypes of the files it was loaded from."""
        from transformers.utils import logging

        logging.disable_progress_bar()  # germane shows its own, and only to a terminal
        dtypes = {name: info.dtype for name, info in Checkpoint(self.folder).tensors.items()}
        with stored_as(self.model, dtypes):
            self.model.save_pretrained(folder)
        copy_companions(self.folder, folder)
        self.model.config.save_pretrained(folder)


def is_language_model(model: PreTrainedModel) -> bool:
    """Whether it is a causal language model."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


class stored_as:  # noqa: N801 - reads as the phrase it is: `with stored_as(model, dtypes)`
    """Inside, a model's floating-point weights have the dtype that most of the file's tensors have."""

    def __init__(self, model: PreTrainedModel, dtypes: Mapping[str, str]) -> None:
        names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
        floats = [names[dtype] for dtype in dtypes.values() if dtype in names]
        self.model = model
        self.inside = max(set(floats), key=floats.count) if floats else torch.float32
        self.outside = model.dtype

    def __enter__(self) -> None:
        self.model.to(self.inside)

    def __exit__(self, *_: object) -> None:
        self.model.to(self.outside)


def load_model(path: str, dtype: torch.dtype | None = None) -> Loaded:
    """The model of a folder or hub id on the device, by the class that its config names.

    Args:
        path: A folder or hub id.
        dtype: Of the weights; default: float32 on a CPU, else the files' own.

    Raises:
        CheckpointError: No such model, or one that cannot be loaded whole.
    """
    folder = locate(path)
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


def named_module(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The part of the model called `name`.

    Raises:
        CheckpointError: There is none; names that end alike are said.
    """
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name]
    last = name.rsplit(".", 1)[-1]
    alike = [known for known in modules if known.rsplit(".", 1)[-1] == last] or list(modules)[1:]
    raise CheckpointError(f"the model has no part {name!r}; it has, for example, {', '.join(alike[:4])}.")


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The model's layers: its longest list of equal blocks.

    Raises:
        CheckpointError: It has none.
    """
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    if not lists:
        raise CheckpointError(f"a {type(model).__name__} has no list of layers.")
    return max(lists, key=len)


def outputs_of(
    model: PreTrainedModel, names: Sequence[str], run: Callable[[], Any]
) -> dict[str, torch.Tensor]:
    """What parts of the model put out while `run` is called."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [named_module(model, name).register_forward_hook(keep(name)) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen
