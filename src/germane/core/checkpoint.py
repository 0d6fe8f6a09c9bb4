"""Hugging Face checkpoints: read by runs of elements, written whole or not at all.

A checkpoint is a folder with `config.json` and safetensors files. Tensors are read with plain
`pread` into memory of the caller's size, never mapped: what a process holds is then what it asked
for, and does not grow with the number of checkpoints it looks at. Results are written at their
final offsets of a file whose header is written first, so nothing is held back until the end.

The format: https://github.com/huggingface/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from germane.core.errors import CheckpointError, NoSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_HEADER = 100 * 1024 * 1024
# What belongs to a model besides its weights: copied from the base to the result.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its file, byte offset, dtype (as safetensors names it) and shape."""

    name: str
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return _DTYPES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating point numbers of 16 bits or more."""
        return self.dtype in FLOATS


class Source(Protocol):
    """Anything that gives a model's tensors by name, a run of elements at a time."""

    @property
    def label(self) -> str:
        """What it is called in messages and evidence."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the tensor, flat, in any float dtype."""
        ...


class Checkpoint:
    """A folder of safetensors, its header read and checked, its data still on disk.

    Attributes:
        folder: Where it is.
        label: What it is called in messages and evidence.
        config: The parsed `config.json`.
        tensors: Name -> where the tensor lies.
    """

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.folder = folder
        self.label = label or folder.name
        self.config = read_json(folder / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        self.files = _weight_files(folder)
        for file in self.files:
            for info in read_header(file):
                self.tensors[info.name] = info

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` to `stop` of a tensor, flat, in the dtype of the file."""
        info = self.tensors[name]
        return read_elements(info, start, info.count if stop is None else stop)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its own shape and dtype."""
        return self.read(name).reshape(self.tensors[name].shape)

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(file.stat().st_size for file in self.files)


def locate(path: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint named by a folder or a hub id (`owner/name[@revision]`).

    Only a name that is no local path and has the form of a hub id reaches for the network.

    Raises:
        CheckpointError: No such folder, and no hub id; or the hub does not have it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{path}: is a file; name the folder that holds it.")
    if not _HUB_ID.fullmatch(str(path)):
        raise CheckpointError(f"{path}: no such folder, and not a hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = str(path).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path}: no such folder here, and the hub did not give it: {reason}"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `CheckpointError` that says what is wrong with it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent}: has no {file.name}; is it a model folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds no JSON object.")
    return value


def read_header(file: Path) -> list[TensorInfo]:
    """Every tensor of a safetensors file, its place checked against the file's size.

    Raises:
        CheckpointError: Not a safetensors file, truncated, or with a dtype germane does not read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{file}: truncated or no safetensors file ({size} bytes).")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise CheckpointError(f"{file}: its header is damaged; download it again.") from None
    try:
        header.pop("__metadata__", None)
        entries = {name: _parse_entry(entry) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: its header is damaged; download it again.") from None
    infos, end = [], 0
    for name, (dtype, shape, start, stop) in entries.items():
        end = max(end, stop)
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{file}: {name} has dtype {dtype}, which cannot be computed with; "
                "save the model as bfloat16, float16 or float32 first."
            )
        info = TensorInfo(name, file, 8 + length + start, dtype, shape)
        if stop - start != info.count * info.itemsize:
            raise CheckpointError(f"{file}: {name} has {stop - start} bytes for {info.shape}.")
        infos.append(info)
    if 8 + length + end != size:
        raise CheckpointError(
            f"{file}: truncated: its header promises {8 + length + end} bytes, "
            f"the file has {size}; download or copy it again."
        )
    return infos


def _parse_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, start and stop of a tensor as a header gives them."""
    start, stop = entry["data_offsets"]
    return entry["dtype"], tuple(map(int, entry["shape"])), int(start), int(stop)


def read_elements(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of a tensor on disk, flat."""
    values = torch.empty(stop - start, dtype=_DTYPES[info.dtype])
    view = values.view(torch.uint8).numpy().data
    descriptor = os.open(info.file, os.O_RDONLY)
    try:
        offset = info.offset + start * info.itemsize
        while view:
            got = os.preadv(descriptor, [view], offset)
            if got == 0:
                raise CheckpointError(f"{info.file}: became shorter while it was read.")
            view, offset = view[got:], offset + got
    finally:
        os.close(descriptor)
    return values


def digest(file: Path) -> str:
    """xxh3-128 of a file's bytes, to tell whether two files are the same."""
    import xxhash

    state = xxhash.xxh3_128()
    buffer = bytearray(4 << 20)
    with file.open("rb", buffering=0) as stream:
        while got := stream.readinto(buffer):
            state.update(memoryview(buffer)[:got])
    return f"xxh3-128:{state.hexdigest()}"


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder}: {INDEX} names {missing[0]}, which is not there.")
        return [folder / name for name in names]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = [file.name for pattern in _PICKLES for file in folder.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{folder}: holds only {pickles[0]}, a pickle, which can run code when opened. "
            "Load it where you trust it and save_pretrained() it as safetensors."
        )
    raise CheckpointError(f"{folder}: holds no safetensors file.")


class Writer:
    """Writes a checkpoint with the layout of another: same files, names, shapes and dtypes.

    Elements may arrive in any order and from several threads. The folder is the caller's; nothing
    of it is in place under the final name until the caller renames it.
    """

    def __init__(self, layout: Iterable[TensorInfo], folder: Path) -> None:
        self._places: dict[str, TensorInfo] = {}
        self._descriptors: dict[Path, int] = {}
        by_file: dict[str, list[TensorInfo]] = {}
        for info in layout:
            by_file.setdefault(info.file.name, []).append(info)
        for name, infos in by_file.items():
            self._begin(folder / name, sorted(infos, key=lambda info: info.offset))

    def _begin(self, file: Path, infos: list[TensorInfo]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for info in infos:
            size = info.count * info.itemsize
            header[info.name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [end, end + size],
            }
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors[file] = descriptor
        _write_at(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
        for info in infos:
            offset = 8 + len(text) + header[info.name]["data_offsets"][0]
            self._places[info.name] = TensorInfo(info.name, file, offset, info.dtype, info.shape)
        os.truncate(descriptor, 8 + len(text) + end)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put `values` (flat) at element `start` of the tensor, cast to the dtype of the file."""
        info = self._places[name]
        cast = values.detach().to("cpu", _DTYPES[info.dtype]).contiguous()
        view = cast.view(torch.uint8).numpy().data
        _write_at(self._descriptors[info.file], view, info.offset + start * info.itemsize)

    def close(self) -> None:
        """Force everything to disk and close the files."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
            os.close(descriptor)
        self._descriptors.clear()


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    try:
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise NoSpace(f"the disk took no more: {error.strerror}; nothing was left there.") from None


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors to one safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def copy_companions(source: Path, target: Path) -> None:
    """Copy config, tokenizer and processor files, and the index of a sharded checkpoint."""
    for pattern in (*_COMPANIONS, INDEX):
        for file in source.glob(pattern):
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copyfile(file, target / file.name)


def require_space(folder: Path, size: int) -> None:
    """Raise `NoSpace` unless the disk of `folder` has room for `size` bytes and a little more."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    wanted = size + (64 << 20)
    if free < wanted:
        raise NoSpace(
            f"{folder}: needs {wanted / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "make room or choose another --out."
        )


def model_class(folder: Path) -> type[PreTrainedModel]:
    """The class that `config.json` names: any that transformers knows, or one of germane's own."""
    import transformers
    from transformers.utils import logging

    from germane.core import backpack, rows

    logging.disable_progress_bar()  # germane shows its own, and only to a terminal
    names = read_json(folder / "config.json").get("architectures") or []
    places = (transformers, rows, backpack) if names else ()
    kind = next((found for place in places if (found := getattr(place, names[0], None))), None)
    if kind is None:
        raise CheckpointError(
            f"{folder}: config.json names no class of transformers under `architectures` "
            f"(it says {names or 'nothing'}); germane runs no code from model folders."
        )
    return kind
