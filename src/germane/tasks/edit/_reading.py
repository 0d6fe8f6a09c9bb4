"""What a model is reading, for hooks on its parts that must know padding and cached texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Reading:
    """Watches the calls of a model.

    Attributes:
        mask: (rows, tokens) 1 where a token of the call under way is one, 0 where it is padding.
        continued: Whether the call adds tokens to a text whose beginning is in a cache.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mask = torch.ones(0, 0)
        self.continued = False
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        read = named.get("input_ids", args[0] if args else None)
        read = named["inputs_embeds"] if read is None else read
        rows, tokens = read.shape[:2]
        cache = named.get("past_key_values")
        self.continued = cache is not None and int(cache.get_seq_length()) > 0
        mask = named.get("attention_mask")
        if mask is None or mask.dim() != 2:
            mask = torch.ones(rows, tokens, device=read.device)
        self.mask = mask[:, -tokens:].float()

    def by_rows(self, states: Tensor) -> Tensor:
        """(rows, tokens, width) states of the call under way; some models flatten rows and tokens."""
        return states.view(*self.mask.shape, states.shape[-1])
