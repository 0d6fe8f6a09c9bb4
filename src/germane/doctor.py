"""What `germane doctor` says of the machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from germane import method as registry


def examine() -> Iterator[str]:
    """Lines about versions, device, room and extras."""
    import torch

    from germane.core.device import device

    yield f"germane {version('germane')}, Python {sys.version.split()[0]}, torch {torch.__version__}"
    yield f"device: {device()}, {os.cpu_count()} cores"
    free = shutil.disk_usage(Path.cwd()).free
    yield f"disk: {free / 1e9:.0f} GB free in {Path.cwd()}"
    yield f"hub: {'offline' if os.environ.get('HF_HUB_OFFLINE') else 'reached when a hub id is named'}"
    yield f"methods: {len(registry.names())} of {len(registry.tasks())} tasks"
    for extra, missing in sorted(_extras().items()):
        state = f"lacks {', '.join(missing)}: pip install 'germane[{extra}]'" if missing else "installed"
        yield f"extra {extra}: {state}"


def _extras() -> dict[str, list[str]]:
    """Extra -> its libraries that are not installed."""
    found: dict[str, list[str]] = {}
    for line in requires("germane") or []:
        requirement = Requirement(line)
        marker = str(requirement.marker or "")
        if "extra ==" in marker:
            extra = marker.split("extra ==")[1].strip(" \"'")
            found.setdefault(extra, []).extend([] if _installed(requirement.name) else [requirement.name])
    return found


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
