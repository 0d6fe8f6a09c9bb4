"""A PEFT LoRA adapter seen as a member of a pool: its product is formed a run of rows at a time."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from germane.core.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    TensorInfo,
    model_class,
    read_elements,
    read_header,
    read_json,
)
from germane.core.errors import CheckpointError

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Adapters started from the base's own singular or orthogonal factors are stored relative to a
# changed base, so adding them to the original would be wrong.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Options of PEFT under which the update is more than scale * B @ A on the named weights.
_MORE_THAN_A_PRODUCT = (
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
)


def read_adapter(folder: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Configuration and tensors of an adapter's folder, whatever its base.

    Raises:
        CheckpointError: Files that are missing or damaged, or another kind of adapter than LoRA.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    _refuse_other_kinds(folder, config)
    if not (folder / _WEIGHTS).exists():
        raise CheckpointError(f"{folder}: has no {_WEIGHTS}; save the adapter again with safetensors.")
    return config, read_header(folder / _WEIGHTS)


def _refuse_other_kinds(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    start = str(config.get("init_lora_weights", True)).lower()
    if kind != "LORA" or config.get("use_dora"):
        name = "DoRA" if kind == "LORA" else kind
        raise CheckpointError(
            f"{folder}: a {name} adapter; only LoRA is a sum with the base. "
            "Merge it with PEFT (merge_and_unload) and give the full checkpoint."
        )
    used = [option for option in _MORE_THAN_A_PRODUCT if config.get(option)]
    if used:
        raise CheckpointError(
            f"{folder}: uses {used[0]}, which is more than a product added to the base. "
            "Merge it with PEFT (merge_and_unload) and give the full checkpoint."
        )
    if any(start.startswith(word) for word in _CHANGED_BASE):
        raise CheckpointError(
            f"{folder}: started by {start}, which changes the base; convert it with "
            "PEFT's path_initial_model_for_weight_conversion first."
        )


@dataclass(frozen=True)
class _Factors:
    """The two factors of one weight's update: scale * B @ A, transposed where the base stores so."""

    a: TensorInfo  # (rank, in)
    b: TensorInfo  # (out, rank)
    scale: float
    transposed: bool


class Adapter:
    """A LoRA adapter; `read` gives the base's elements plus the adapter's update.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        label: Name in messages and evidence.
        base: The model it was trained on.

    Raises:
        CheckpointError: Another kind of adapter, or keys that fit no tensor of the base.
    """

    def __init__(self, folder: Path, label: str, base: Checkpoint) -> None:
        self.folder = folder
        self.label = label
        self.base = base
        self.config, infos = read_adapter(folder)
        self.files = [folder / _WEIGHTS]
        self._factors: dict[str, _Factors] = {}
        self._whole: dict[str, TensorInfo] = {}
        self._extra_heads: dict[str, TensorInfo] = {}
        self._sort_tensors({info.name: info for info in infos})

    def _sort_tensors(self, infos: dict[str, TensorInfo]) -> None:
        for name, info in infos.items():
            plain = name.removeprefix(_PREFIX)
            pair = re.fullmatch(r"(.+)\.lora_(embedding_)?A(\.weight)?", plain)
            if pair:
                partner = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
                self._add_pair(pair[1], info, infos.get(partner), bool(pair[2]))
            elif ".lora_" not in plain:
                self._add_whole(plain, info)

    def _add_pair(self, module: str, a: TensorInfo, b: TensorInfo | None, embedding: bool) -> None:
        target = self._target(f"{module}.weight")
        if b is None or target is None:
            reason = "has no B factor" if b is None else "fits no tensor of the base"
            raise CheckpointError(f"{self.folder}: {module} {reason}; was it trained on this base?")
        transposed = embedding or self._stored_in_out(target, a, b)
        shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        if shape != self.base.tensors[target].shape:
            raise CheckpointError(
                f"{self.folder}: {module} updates a weight of shape {list(shape)}, the base has "
                f"{list(self.base.tensors[target].shape)}; was it trained on this base?"
            )
        self._factors[target] = _Factors(a, b, self._scale(module, a.shape[0]), transposed)

    def _stored_in_out(self, target: str, a: TensorInfo, b: TensorInfo) -> bool:
        """Whether the base stores a weight as (in, out), as GPT-2 does, and not as (out, in).

        A weight that is not square shows it. The adapter's own `fan_in_fan_out` is one word for all
        its weights, and PEFT goes by each module's class and not by it: so it is the last resort.
        """
        if a.shape[1] != b.shape[0]:
            return self.base.tensors[target].shape == (a.shape[1], b.shape[0])
        default = bool(self.config.get("fan_in_fan_out"))
        return _conv1d_modules(self.base).get(target.removesuffix(".weight"), default)

    def _add_whole(self, name: str, info: TensorInfo) -> None:
        """A tensor trained whole (`modules_to_save`, biases): it replaces the base's."""
        target = self._target(name.replace(".base_layer.", "."))
        if target is not None and self.base.tensors[target].shape == info.shape:
            self._whole[target] = info
        elif target is not None and "embed" in name:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {list(info.shape)}, the base has "
                f"{list(self.base.tensors[target].shape)}: the adapter was trained with another "
                "vocabulary; resize the base's embeddings to it first."
            )
        else:
            self._extra_heads[name] = info

    def _target(self, name: str) -> str | None:
        """The base's tensor of that name, with or without the prefix of a model with a head."""
        if name in self.base.tensors:
            return name
        bare = name.partition(".")[2]
        return bare if bare in self.base.tensors else None

    def _scale(self, module: str, rank: int) -> float:
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return float(alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank)

    def set_aside(self, names: set[str]) -> None:
        """Count the base's tensors of these names as the adapter's head."""
        for name in names & set(self._whole):
            self._extra_heads[name] = self._whole.pop(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of base plus update, flat, float32."""
        whole = self._whole.get(name)  # PEFT saves an embedding whole beside its factors
        values = (
            self.base.read(name, start, stop) if whole is None else read_elements(whole, start, stop)
        ).float()
        if name in self._factors:
            values += self._update(self._factors[name], start, stop)
        return values

    def _update(self, factors: _Factors, start: int, stop: int) -> Tensor:
        a = read_elements(factors.a, 0, factors.a.count).reshape(factors.a.shape).float()
        b = read_elements(factors.b, 0, factors.b.count).reshape(factors.b.shape).float()
        left, right = (a.T, b.T) if factors.transposed else (b, a)
        width = right.shape[1]
        first, last = start // width, -(-stop // width)
        rows = (factors.scale * left[first:last]) @ right
        return rows.flatten()[start - first * width : stop - first * width]

    @property
    def heads(self) -> list[str]:
        """Names of the tensors kept out of the merge."""
        return list(self._extra_heads)

    def head(self) -> dict[str, Tensor]:
        """The tensors kept out of the merge, under their names in the full model."""
        return {
            name: read_elements(info, 0, info.count).reshape(info.shape)
            for name, info in self._extra_heads.items()
        }


@functools.lru_cache(maxsize=1)  # all adapters of a pool ask it of the same base
def _conv1d_modules(base: Checkpoint) -> dict[str, bool]:
    """Module -> whether it is transformers' Conv1D, which stores its weight as (in, out).

    The base is made without weights, of its configuration alone. Nothing is known of a base that
    transformers has no class for, or cannot make here.
    """
    try:
        kind = model_class(base.folder)
        with torch.device("meta"):
            model = kind(kind.config_class.from_pretrained(base.folder))
    except Exception:  # whatever a model's own code raises, the merge itself needs no such model
        return {}
    from transformers.pytorch_utils import Conv1D

    found = {name: isinstance(module, Conv1D) for name, module in model.named_modules()}
    # Some checkpoints of models with a head name their tensors as the bare model does, as GPT-2's.
    bare = f"{model.base_model_prefix}."
    return {name.removeprefix(bare): is_one for name, is_one in found.items()} | found


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value whose pattern matches the end of the module's name, as PEFT resolves it."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
