"""Set-Based Prompting: what a model says does not depend on the order of marked parts of its prompt."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import nn

from germane.attention import Attending, Attention, Encoded, Layout, causal, flat
from germane.core.checkpoint import Checkpoint, model_class
from germane.core.errors import CheckpointError
from germane.method import method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MASKED = ("sdpa", "eager")  # implementations of attention that take a mask of one's own
_TRIAL: Encoded = [[1, 5, 2], ([[7]], [[3, 9, 4]], [[8, 6]]), [10, 1]]
_SHARE = 0.1  # of the usual effect of order, above which a model is said not to take the layout


@method(
    "attend/set-based-prompting",
    paper="2406.06581",
    code="reidmcy/set-based-prompting",
    needs=("language model",),
)
class SetBasedPrompting(Attention):
    """Read the options of a question as a set, so that their order cannot matter.

    McIlroy-Young et al., "Order-Independence Without Fine Tuning", NeurIPS 2024. The texts of a set stand
    beside each other: each begins at the position after the last one before the set, sees that and itself,
    and no other text of its set; what follows sees all of them, and begins where the longest ended. With n
    tokens before and texts of l_1 ... l_k tokens, positions are 0 ... n-1, then n ... n+l_i-1 of each text,
    then n + max l_i and on. Attention is a sum over keys, each with its position, so a permutation of the
    texts permutes terms and changes no sum: by induction over layers and over written tokens the output is
    the same. A prompt may have several sets, and a text of a set may itself be a prompt with sets.

    Equal is meant up to rounding: sums are in another order, some 1e-5 of the logits in float32, much more
    in bfloat16, where two almost equally likely tokens can change places. `canonical` first sorts the texts
    of each set, and results are then equal to the bit.

    For models that take positions and a mask: rotary ones (Llama, Mistral, Qwen2, GPT-NeoX, ...) and those
    with learned positions (GPT-2), of which several tokens may have the same. Models that work positions
    out of the mask (ALiBi: BLOOM, MPT, Falcon with alibi) or have no attention are refused: when the block
    is entered, a trial of four short prompts shows whether order has lost its effect.

    Use it when answers must not depend on how options, passages or candidates happen to be listed. Not when
    their order means something, or when they are lettered or refer to each other: a text cannot see another
    of its set. The layout is unlike anything a model was trained on, so it may be right less often than
    with a good order.

    Differs from the code: there the models' modules are replaced, and with GPT-2 the positions of new
    tokens go on from the number of tokens, with Llama from the last position; here always the latter.
    Without the new positions the code numbers the rows of the batch, which puts every token at 0; here they
    are the usual ones. Its padded variant, which gives the same numbers, is left out. Several sets in a
    prompt are its recursive variant; sets in sets it has not. It refuses no model and no length, and takes
    no notice of a sliding window; here prompts longer than one are refused.
    """

    mask: bool = Field(default=True, description="hide the texts of a set from each other")
    positions: bool = Field(default=True, description="let the texts of a set begin at the same position")
    canonical: bool = Field(
        default=False, description="sort each set first, for results that are equal to the bit"
    )

    def check_model(self, path: str, source: Checkpoint) -> None:
        """Its class takes positions, and its positions are no part of its mask."""
        super().check_model(path, source)
        _require_positions(path, model_class(source.folder), source.config.get("alibi"))

    @contextmanager
    def applied(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Attending]:
        """The model with an attention that takes a mask, tried on four prompts."""
        name = model.config.name_or_path or type(model).__name__
        _require_positions(name, type(model), getattr(model.config, "alibi", None))
        with _reading(model):
            attending = Attending(model, tokenizer, self.arrange)
            if self.mask and self.positions:
                _try(attending, name)
            yield attending

    def arrange(self, prompt: Encoded) -> Layout:
        """The tokens of a prompt, their positions, and what each sees."""
        prompt = _sorted(prompt) if self.canonical else prompt
        tokens = list(flat(prompt))
        positions: list[int] = []
        runs: list[tuple[slice, list[slice]]] = []
        _place(prompt, 0, [], positions, runs)
        sees = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        for run, before in runs:
            sees[run, run] = causal(run.stop - run.start)
            for earlier in before:
                sees[run, earlier] = True
        return Layout(
            tokens,
            positions if self.positions else list(range(len(tokens))),
            sees if self.mask else causal(len(tokens)),
            len(prompt[-1]),
        )


def _place(
    prompt: Encoded,
    start: int,
    before: list[slice],
    positions: list[int],
    runs: list[tuple[slice, list[slice]]],
) -> tuple[int, list[slice]]:
    """Place a prompt at position `start`, after what it sees; returns the position and tokens after it."""
    for part in prompt:
        if isinstance(part, tuple):
            placed = [_place(text, start, before, positions, runs) for text in part]
            start = max(end for end, _ in placed)
            before = before + [run for _, seen in placed for run in seen[len(before) :]]
            continue
        run = slice(len(positions), len(positions) + len(part))
        positions += range(start, start + len(part))
        runs.append((run, before))
        start, before = start + len(part), [*before, run]
    return start, before


def _sorted(prompt: Encoded) -> Encoded:
    return [
        tuple(sorted(map(_sorted, part), key=repr)) if isinstance(part, tuple) else part for part in prompt
    ]


def _require_positions(name: str, kind: type, alibi: Any) -> None:
    if "position_ids" not in inspect.signature(kind.forward).parameters or alibi:  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{name}: a {kind.__name__} does not take positions, so that texts cannot share them; "
            "set-based prompting needs rotary or learned ones."
        )


@contextmanager
def _reading(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode, with an attention that takes a mask of one's own."""
    modes: list[tuple[nn.Module, bool]] = [(module, module.training) for module in model.modules()]
    chosen = model.config._attn_implementation
    model.eval()
    try:
        if chosen not in _MASKED:
            model.set_attn_implementation("sdpa")
        yield
    finally:
        if chosen not in _MASKED:
            model.set_attn_implementation(chosen)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _try(attending: Attending, name: str) -> None:
    """Raise a `CheckpointError` unless order has lost its effect on a prompt of a few arbitrary tokens."""
    first, texts, last = _TRIAL
    other: Encoded = [first, texts[::-1], last]
    usual = SetBasedPrompting(mask=False, positions=False).arrange
    layouts = [
        arrange(prompt) for arrange in (SetBasedPrompting().arrange, usual) for prompt in (_TRIAL, other)
    ]
    try:
        logits = attending.read(layouts, 1)[:, -1].double()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{name}: cannot be given a mask and positions: {reason}") from None
    ours, theirs = ((logits[n] - logits[n + 1]).abs().max() for n in (0, 2))
    if ours > _SHARE * theirs:
        raise CheckpointError(
            f"{name}: a {type(attending.model).__name__} does not take a mask and positions of one's own: "
            f"on trial, order still moved its logits by {float(ours):.2g}, usually by {float(theirs):.2g}."
        )
