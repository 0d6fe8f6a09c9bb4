"""Which device the work runs on, decided in one place."""

from __future__ import annotations

import os

import torch


def device() -> torch.device:
    """`GERMANE_DEVICE` if set, else cuda, mps or cpu, the first that is there."""
    named = os.environ.get("GERMANE_DEVICE")
    if named:
        return torch.device(named)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
