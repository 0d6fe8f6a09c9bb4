"""Texts as vectors, by a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from germane.core.device import device
from germane.core.progress import track


class Encoder:
    """Texts to vectors of length 1 by an encoder of transformers, the mean of its last states.

    Args:
        folder: Of the model, which is loaded when it is first used.
        max_tokens: Longer texts are cut.
        batch_size: Texts at a time.
    """

    def __init__(self, folder: Path, max_tokens: int = 256, batch_size: int = 32) -> None:
        self.folder = folder
        self.place = device()
        self._longest = max_tokens
        self._batch_size = batch_size

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.folder, dtype=torch.float32).to(self.place).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(texts, width) vectors."""
        starts = range(0, len(texts), self._batch_size)
        parts = [
            self._embed(texts[s : s + self._batch_size]) for s in track(starts, "embedding", len(starts))
        ]
        return torch.cat(parts)

    def _embed(self, texts: Sequence[str]) -> Tensor:
        limit = getattr(self._model.config, "max_position_embeddings", None) or self._longest
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=min(self._longest, limit),
            split_special_tokens=True,  # "[SEP]" in a text of someone else is text
            return_tensors="pt",
        ).to(self.place)  # fmt: skip
        states = self._model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1), dim=1)
