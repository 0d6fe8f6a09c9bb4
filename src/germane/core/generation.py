"""Plain texts continued by a language model, the likeliest token always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from germane.core.chat import pad_left, padding, stops_at
from germane.core.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONTEXTS = ("max_position_embeddings", "n_positions")  # how configs call the longest input


def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 16,
) -> list[str]:
    """What the model writes after each prompt, greedily, without special tokens.

    A prompt that leaves no room for `max_new_tokens` in the model's context loses its beginning.

    Args:
        model: A causal language model; left as it is.
        tokenizer: The model's own.
        prompts: Texts to continue, without a chat template.
        max_new_tokens: Longest continuation, in tokens.
        stop: Texts that end a continuation, and are no part of it.
        batch_size: Prompts at a time.

    Returns:
        One continuation for each prompt, in their order.

    Raises:
        SettingError: The context has no room for `max_new_tokens`.
    """
    room = _room(model, max_new_tokens)
    encoded = [_encode(tokenizer, prompt)[-room:] for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    written: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        texts = _continue(model, tokenizer, [encoded[index] for index in picked], max_new_tokens, stop)
        written.update(zip(picked, texts, strict=True))
    return [written[index] for index in range(len(encoded))]


def context_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model reads at most, by what its config says; None where it says nothing."""
    return next((int(config[name]) for name in _CONTEXTS if config.get(name)), None)


def require_room(context: int | None, max_new_tokens: int, name: str) -> None:
    """Refuse a model that cannot write so many tokens after a prompt.

    Raises:
        SettingError: With what it can read.
    """
    if context is not None and context <= max_new_tokens:
        raise SettingError(
            f"{name}: reads {context} tokens at most, which leaves no room for a "
            f"prompt before {max_new_tokens} new ones: ask for fewer."
        )


def _room(model: PreTrainedModel, max_new_tokens: int) -> int:
    """Tokens that a prompt may have."""
    context = getattr(model.config, "max_position_embeddings", None)
    require_room(context, max_new_tokens, model.config.name_or_path)
    return 2**31 if context is None else int(context) - max_new_tokens


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's tokens; of a prompt without any, one to begin with."""
    tokens = list(tokenizer(prompt)["input_ids"])
    begin = tokenizer.bos_token_id
    return tokens or [padding(tokenizer) if begin is None else int(begin)]


@torch.no_grad()
def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str],
) -> list[str]:
    tokens, mask = pad_left(prompts, padding(tokenizer), model.device)
    output = model.eval().generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding(tokenizer),
        stopping_criteria=[stops_at(tokenizer, stop, tokens.shape[1])],
    )
    ends = _ends(model, tokenizer)
    return [_text(tokenizer, row, ends, stop) for row in output[:, tokens.shape[1] :].tolist()]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a text; the model may name several."""
    named = getattr(model.generation_config, "eos_token_id", None)
    found = {named} if isinstance(named, int) else set(named or ())
    return (found | {tokenizer.eos_token_id}) - {None}


def _text(tokenizer: PreTrainedTokenizerBase, row: list[int], ends: set[int], stop: Sequence[str]) -> str:
    length = next((place for place, token in enumerate(row) if token in ends), len(row))
    text = str(tokenizer.decode(row[:length], skip_special_tokens=True))
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(places)] if places else text
