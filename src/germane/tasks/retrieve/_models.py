"""The models of sentence-transformers that methods read: found, checked, and loaded when first used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from germane.core.checkpoint import locate, read_json
from germane.core.device import device
from germane.core.errors import CheckpointError
from germane.core.progress import bar
from germane.embedded import MINILM, minilm
from germane.retrieval import Passage, Passages

LIBRARY = {"sentence_transformers": "sentence-transformers"}
CHUNK = 16  # batches that are encoded at a time, so that texts of like length share a batch


def _absolute(name: str) -> str:
    """A folder by its whole path: an index is opened from elsewhere."""
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name


ModelName = Annotated[str, AfterValidator(_absolute)]


def find_model(name: str) -> Path:
    """Where a model lies: minilm, a folder, or a hub id.

    Raises:
        CheckpointError: No such model, or the folder holds none.
    """
    if name == MINILM and not Path(name).is_dir():
        return minilm()
    folder = locate(name)
    if not any((folder / file).is_file() for file in ("config.json", "modules.json")):
        raise CheckpointError(f"{name}: has no config.json and no modules.json; is it a model folder?")
    return folder


def check_kind(name: str, ending: str, module: str, purpose: str) -> None:
    """Refuse a model that sentence-transformers would load with parts that were never trained.

    Args:
        name: The model.
        ending: Of the architecture that it must have, such as "ForMaskedLM".
        module: What the modules of sentence-transformers hold that make it one of the kind all the same.
        purpose: What needs it.
    """
    folder = find_model(name)
    modules = folder / "modules.json"
    if modules.is_file() and module in modules.read_text(encoding="utf-8"):
        return
    kinds = read_json(folder / "config.json").get("architectures") or []
    if not any(str(kind).endswith(ending) for kind in kinds):
        raise CheckpointError(f"{purpose}: needs a model with ...{ending}; {name} is {', '.join(kinds)}.")


def batches(passages: Passages, size: int, label: str) -> Iterator[list[Passage]]:
    """Passages as they come, so many at a time, with a bar."""
    held: list[Passage] = []
    with bar(label, len(passages)) as advance:
        for passage in passages:
            held.append(passage)
            if len(held) == size:
                yield held
                advance(len(held))
                held = []
        if held:
            yield held


def require_finite_vectors(vectors: NDArray[np.float32], name: str) -> None:
    """Refuse what a broken model gives."""
    if not np.isfinite(vectors).all():
        raise CheckpointError(f"{name}: gives numbers that are not finite; its weights are damaged.")


def load(kind: str, name: str) -> Any:
    """A model as one of sentence-transformers' classes."""
    import sentence_transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # germane shows its own, and only to a terminal
    return getattr(sentence_transformers, kind)(str(find_model(name)), device=str(device()))


class Lazy:
    """A model that is loaded when it is first used."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._model: Any = None

    def __call__(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model
