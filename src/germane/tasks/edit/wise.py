"""WISE: a second copy of one value matrix holds the edits, and a router says which copy answers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from germane.core.checkpoint import Checkpoint
from germane.core.errors import CheckpointError, SettingError
from germane.core.generation import continue_texts
from germane.core.layers import check_layer, decoder_layers, value_matrix, weight_of
from germane.core.objective import IGNORED, language_row, token_losses
from germane.core.progress import bar
from germane.core.training import require_finite
from germane.edited import Edit, Editing, Editor
from germane.method import method
from germane.tasks.edit._answers import encode_pair
from germane.tasks.edit._reading import Reading

_OPENINGS = ("I", "You", "Because", "Yes", "Q: ")  # the model writes on, to make contexts
_LENGTHS = (5, 10)  # tokens that it adds
_STILL, _LEARNED = 1e-4, 0.02  # change and size of the loss at which an edit is done
_LONG = 100  # tokens from which the released code asks the largest distance
_OLD_SHARE = 0.6  # of the merged memory where later shards are merged into it
_KEPT_OUT = 0.95  # share of the held-out texts that a calibrated threshold keeps out
_NONE = -1
_MOST_TOKENS = 128  # of an irrelevant text

Activation = Callable[[Tensor], Tensor]


@dataclass
class Side:
    """A side memory.

    Attributes:
        delta: (outputs, inputs) how far its value matrix is from the model's, in float32.
        epsilon: Least routing score of its edits.
        floor: Least threshold, of held-out texts where the method calibrates.
    """

    delta: Tensor
    epsilon: float = math.inf
    floor: float = 0.0


@dataclass
class Batch:
    """An edit as the model reads it: its contexts, and a text that has nothing to do with it last.

    Attributes:
        inputs: Tokens and mask, padded on the right.
        labels: (rows, tokens), the answer's tokens.
        below: What the layers under the memory give, kept from the first time on.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    below: dict[int, Any] = field(default_factory=dict)


class Memory:
    """The side memories of a model, and the hook through which they act.

    Attributes:
        working: The side that takes the edits now.
        shards: Finished sides that wait for their merge.
        merged: Merged sides.
        count: Edits made so far.
        seed: Of masks and replay.
        acting: Whether the hook does anything.
        training: Whether the working side answers whatever the score.
        scores: (rows,) routing scores of the call under way, of the working side in training.
    """

    def __init__(self, method: Wise, model: nn.Module, seed: int) -> None:
        _, self.matrix = value_matrix(model, method.layer)
        self.method = method
        self.weight = weight_of(self.matrix)
        self.reading = Reading(model)
        self.activation = activation_of(model) if method.score == "activated" else None
        self.working = self.fresh()
        self.shards: list[Side] = []
        self.merged: list[Side] = []
        self.count, self.seed = 0, seed
        self.acting, self.training = True, False
        self.scores = torch.zeros(0)
        self._held = torch.zeros(0, dtype=torch.long)
        self.matrix.register_forward_hook(self._act)

    def fresh(self) -> Side:
        """A side that is the model's own matrix still."""
        return Side(torch.zeros(self.weight.shape, device=self.weight.device))

    @property
    def sides(self) -> list[Side]:
        """All, the working one last."""
        return [*self.merged, *self.shards, self.working]

    def thresholds(self) -> list[float]:
        """Score above which each side may answer; in merge mode the least epsilon holds for all."""
        sides = self.sides
        least = min(side.epsilon for side in sides)
        epsilons = [side.epsilon if self.method.retrieve else least for side in sides]
        ratio = self.method.act_ratio
        return [max(e * ratio, side.floor) for e, side in zip(epsilons, sides, strict=True)]

    def score(self, side: Side, activations: Tensor, output: Tensor) -> Tensor:
        """(rows,) the routing score of each row under a side."""
        moved = activations.float() @ side.delta.T
        mask = self.reading.mask.to(moved.device)
        return routing_score(moved, mask, output.float(), self.activation, asking=not self.training)

    def _act(self, matrix: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.acting or not (self.training or self.count):
            return None
        activations, shaped = self.reading.by_rows(inputs[0]), self.reading.by_rows(output)
        if self.training:
            self.scores = self.score(self.working, activations, shaped)
            moved = activations.float() @ self.working.delta.T
            return (shaped.float() + moved).to(output.dtype).view_as(output)
        if not (self.reading.continued and len(self._held) == len(shaped)):
            scores = torch.stack([self.score(side, activations, shaped) for side in self.sides])
            self._held = choose(scores, self.thresholds())
        return self._routed(activations, shaped).view_as(output)

    def _routed(self, activations: Tensor, output: Tensor) -> Tensor:
        result = output.clone()
        for number in self._held.unique().tolist():
            if number != _NONE:
                rows = self._held == number
                moved = activations[rows].float() @ self.sides[number].delta.T
                result[rows] = (output[rows].float() + moved).to(output.dtype)
        return result

    def finish_edit(self, epsilon: float) -> None:
        """Count an edit; store the working side when its shard is full, and merge when it is time."""
        method = self.method
        self.working.epsilon = min(self.working.epsilon, epsilon)
        self.count += 1
        if self.count % method.save_every == 0:
            self.shards.append(self.working)
            self.working = self.fresh()
        if self.count % method.merge_every == 0:
            self._merge()

    def _merge(self) -> None:
        sides = list(self.shards)
        weights = [1.0 / len(sides)] * len(sides)
        if self.merged and not self.method.retrieve:
            weights = [(1 - _OLD_SHARE) / len(sides)] * len(sides) + [_OLD_SHARE]
            sides += self.merged
            self.merged = []
        deltas = torch.stack([side.delta for side in sides])
        if self.method.merge == "ties":
            delta = ties(deltas, weights, self.method.density)
        else:
            delta = linear(deltas, weights)
        self.merged.append(Side(delta, min(side.epsilon for side in sides)))
        self.shards = []

    def state(self) -> dict[str, Tensor]:
        """Everything that a later session needs to go on as if there had been no break."""
        sides = self.sides
        numbers = [self.count, self.seed, len(self.merged), len(self.shards)]
        kept = {f"side.{number}": side.delta for number, side in enumerate(sides)}
        return kept | {
            "epsilons": torch.tensor([side.epsilon for side in sides], dtype=torch.float64),
            "floors": torch.tensor([side.floor for side in sides], dtype=torch.float64),
            "numbers": torch.tensor(numbers),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave.

        Raises:
            CheckpointError: It is of another layer.
        """
        self.count, self.seed, merged, shards = state["numbers"].tolist()
        found = []
        for number, epsilon in enumerate(state["epsilons"].tolist()):
            delta = state[f"side.{number}"]
            if delta.shape != self.weight.shape:
                raise CheckpointError(
                    f"a side memory of shape {tuple(delta.shape)} does not fit layer {self.method.layer}, "
                    f"whose value matrix has {tuple(self.weight.shape)}: name the layer it was made for."
                )
            place = self.weight.device
            found.append(Side(delta.to(place).clone(), epsilon, float(state["floors"][number])))
        self.merged, self.shards = found[:merged], found[merged : merged + shards]
        self.working = found[-1]


@method("edit/wise", paper="2405.14768", code="zjunlp/EasyEdit", needs=("language model",))
class Wise(Editor):
    """Write edits into side copies of one value matrix, and answer from one only where its score is high.

    Wang et al., "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language
    Models", NeurIPS 2024. W is the matrix that writes the output of one feed-forward part, a(x) what
    goes into it, W' a copy. The routing score is D(x) = |a(x) (W' - W)|, the mean over the tokens. For an
    edit e = (p, y) and a text z that has nothing to do with it, SGD lowers

        -log P(y | context, p) + max(0, D(z) - alpha) + max(0, beta - D(e)) + max(0, gamma - D(e) + D(z))

    on W' alone, its gradient masked by 0s and 1s drawn anew for every `save_every` edits, W' kept within
    `norm_bound` of W. epsilon is the least D(e) of the edits. After `save_every` edits W' is put aside
    and starts again from W; every `merge_every` edits those put aside are merged. A text is answered by the
    side with the largest D(x) above its epsilon times `act_ratio`, else by W. With `retrieve`
    (WISE-Retrieve) every merge leaves a side with an epsilon of its own; without (WISE-Merge) there is one
    merged side, and one epsilon.

    Use it when edits keep coming and everything else must stay: the weights never change.
    Not when what follows from an edit must change too, or when a small model has to hold many edits: the
    router then misses some, and one weak edit lowers the epsilon for all.

    Differs from the paper: the norm is a mean over tokens, as in the code, since that of all tokens
    together would grow with their number. Differs from the code:

    - Its score compares the outputs after the feed-forward activation, and is the largest distance where a
      text has over 100 tokens: `score` is then `activated`; `plain` is the paper's.
    - Padding does not count. Every row is decided by itself, on its prompt, and the decision is held while
      it is continued; the code decides for a batch at once and for each new token again.
    - No weight decay; the code's 1e-5 also moves what the mask keeps still.
    - A side below its threshold keeps no other from answering. Shards that wait for a merge are asked one
      by one; WISE-Merge there merges them at the first question, so that asking changes later edits.
    - Edits made before, for `replay`, belong to the model and not to the process.
    - `irrelevant` is always a text of its own, never a part of the prompt that tells the subject's tokens.
    - Merges are TIES and linear. The code gives its linear and its slerp the original and the first shard,
      and loses the others; slerp is for two, and of matrices as near to parallel as these it is linear.
    - `calibrate` is ours: merged sides score higher on everything, and 0.88 of their epsilon lets too much
      in. Every second of the general texts is held out, and of these 95 % stay below the threshold.
    """

    layer: int = Field(default=-5, description="layer whose value matrix gets the side memory")
    learning_rate: float = Field(default=1.0, gt=0, description="of SGD; models of 135M need about 0.5")
    steps: int = Field(default=70, gt=0, description="most steps for an edit")
    alpha: float = Field(default=5.0, ge=0, description="most routing score of an irrelevant text")
    beta: float = Field(default=20.0, ge=0, description="least routing score of an edit")
    gamma: float = Field(default=10.0, ge=0, description="least difference of the two")
    mask_share: float = Field(
        default=0.2, gt=0, le=1, description="share of the entries that a shard trains"
    )
    norm_bound: float = Field(
        default=1.0, gt=0, description="largest distance of an entry from the original"
    )
    contexts: int = Field(
        default=10, ge=0, le=len(_OPENINGS) * len(_LENGTHS),
        description="openings, written by the model, before which an edit is learned besides alone",
    )  # fmt: skip
    score: Literal["plain", "activated"] = Field(
        default="plain",
        description="the paper's routing score, or the code's after the activation function",
    )
    act_ratio: float = Field(default=0.88, gt=0, description="share of the least score that opens a side")
    calibrate: bool = Field(
        default=False, description="raise thresholds above the scores of held-out general texts"
    )
    save_every: int = Field(default=500, gt=0, description="edits of a shard")
    merge_every: int = Field(default=1000, gt=0, description="edits between merges")
    merge: Literal["ties", "linear"] = Field(default="ties", description="how shards are merged")
    density: float = Field(default=0.53, gt=0, le=1, description="share of entries that TIES keeps")
    retrieve: bool = Field(default=True, description="keep a side for every merge, and not one for all")
    replay: bool = Field(
        default=False, description="keep edits of earlier merges away from the working side; for retrieve"
    )

    @model_validator(mode="after")
    def _fitting(self) -> Wise:
        if self.merge_every % self.save_every:
            raise ValueError("merge_every must be a multiple of save_every")
        if self.replay and not self.retrieve:
            raise ValueError("replay is for retrieve")
        return self

    def check(self, edits: Sequence[Edit], source: Checkpoint | None) -> None:
        if source is not None:
            check_layer(source, self.layer)

    def attach(self, editing: Editing, state: dict[str, Tensor]) -> None:
        editing.memory = Memory(self, editing.model, editing.seed)
        if state:
            editing.memory.restore(state)

    def state(self, editing: Editing) -> dict[str, Tensor]:
        found: dict[str, Tensor] = editing.memory.state()
        return found

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        self._require_texts(editing, edits)
        editing.model.requires_grad_(False).eval()
        session = _Session(self, editing)
        with bar("writing into the side memory", len(edits)) as advance:
            for edit in edits:
                session.learn(edit)
                advance()
        if self.calibrate:
            session.calibrate()
        editing.model.requires_grad_(True)

    def _require_texts(self, editing: Editing, edits: Sequence[Edit]) -> None:
        bare = [edit.id for edit in edits if not edit.irrelevant]
        if bare and not editing.general:
            raise SettingError(
                f"{self.name}: edit {bare[0]} has no field irrelevant, a text that has nothing to do with "
                "it: add one to each edit, or give such texts with --general FILE."
            )
        if self.calibrate and len(editing.general) < 2:
            raise SettingError(
                f"{self.name}: calibrate sets thresholds from texts that have nothing to do with the "
                "edits, half of which are held out: give at least 2 with --general FILE."
            )


class _Session:
    """The edits of one call, and what they share."""

    def __init__(self, method: Wise, editing: Editing) -> None:
        self.method = method
        self.editing = editing
        self.memory: Memory = editing.memory
        self.history = list(editing.edits)
        self.lower = _below(editing.model, self.memory.matrix)
        self.trained, self.held_out = editing.general, editing.general
        if method.calibrate:
            self.trained, self.held_out = editing.general[::2], editing.general[1::2]
        self.openings = self._openings()

    def _openings(self) -> list[str]:
        """What the untouched model writes, the same in every session."""
        editing, found = self.editing, [""]
        self.memory.acting = False
        for length in _LENGTHS:
            if len(found) <= self.method.contexts:
                texts = continue_texts(editing.model, editing.tokenizer, _OPENINGS, length)
                found += [f"{begin}{text} " for begin, text in zip(_OPENINGS, texts, strict=True)]
        self.memory.acting = True
        return found[: self.method.contexts + 1]

    def learn(self, edit: Edit) -> None:
        """Write one edit into the working side."""
        memory, side = self.memory, self.memory.working
        batch = self._batch(edit, memory.count)
        mask = draw_mask(
            side.delta, self.method.mask_share, memory.seed, memory.count // self.method.save_every
        )
        self.history.append(edit)
        losses: list[float] = []
        memory.training = True
        side.delta.requires_grad_(True)
        for number in range(1, self.method.steps + 1):
            loss, epsilon = self._loss(batch)
            if is_done(losses):
                break
            if self.method.replay:
                loss = loss + self._replayed(number)
            losses.append(float(loss.detach()))
            require_finite(losses[-1], "the loss", f"edit {edit.id}, step {number}")
            (gradient,) = torch.autograd.grad(loss, side.delta)
            masked_step(side.delta, gradient, mask, self.method.learning_rate, self.method.norm_bound)
        side.delta.requires_grad_(False)
        memory.training = False
        memory.finish_edit(epsilon)

    def _loss(self, batch: Batch) -> tuple[Tensor, float]:
        """What is lowered, and the mean score of the edit."""
        logits = self._forward(batch)
        losses, counted = token_losses(logits[:-1], batch.labels[:-1])
        answer = ((losses * counted).sum(dim=1) / counted.sum(dim=1)).mean()
        scores = self.memory.scores
        margins = margin_loss(
            scores[:-1], scores[-1], self.method.alpha, self.method.beta, self.method.gamma
        )
        return answer + margins, float(scores[:-1].detach().mean())

    def _forward(self, batch: Batch) -> Tensor:
        with _kept(self.lower, batch.below):
            logits: Tensor = self.editing.model(**batch.inputs, use_cache=False).logits
        return logits

    def _batch(self, edit: Edit, number: int) -> Batch:
        other = edit.irrelevant or self.trained[number % len(self.trained)]
        tokenizer, place = self.editing.tokenizer, self.editing.model.device
        rows = [encode_pair(tokenizer, (f"{o}{edit.prompt}", edit.answer)) for o in self.openings]
        rows.append(language_row(self._cut(other), [IGNORED] * len(self._cut(other))))

        def padded(name: str, fill: int) -> Tensor:
            found = [torch.tensor(row[name], dtype=torch.long) for row in rows]
            return pad_sequence(found, batch_first=True, padding_value=fill).to(place)

        inputs = {name: padded(name, 0) for name in ("input_ids", "attention_mask")}
        return Batch(inputs, padded("labels", IGNORED))

    def _cut(self, text: str) -> list[int]:
        return list(self.editing.tokenizer(text)["input_ids"])[:_MOST_TOKENS]

    def _replayed(self, number: int) -> Tensor:
        """Earlier groups' edits should not open the working side; edits of its own group should."""
        every = self.method.merge_every
        count = self.memory.count
        groups = [self.history[start : start + every] for start in range(0, count - count % every, every)]
        if not groups:
            return torch.zeros((), device=self.memory.weight.device)
        turn = count * self.method.steps + number
        picked = [group[turn % len(group)] for group in groups]
        recent = random.Random(f"{self.memory.seed}/{turn}").choice(self.history[len(groups) * every :])
        closed = [positive_mean(self._scores(edit) - self.method.alpha) for edit in picked]
        opened = positive_mean(self.method.beta - self._scores(recent))
        return torch.stack(closed).mean() + opened

    def _scores(self, edit: Edit) -> Tensor:
        """(contexts,) scores of an edit under the working side."""
        self._forward(self._batch(edit, 0))
        return self.memory.scores[:-1]

    @torch.no_grad()
    def calibrate(self) -> None:
        """Raise each side's threshold above the scores of most held-out texts."""
        memory, model = self.memory, self.editing.model
        scores: list[list[float]] = []

        def look(matrix: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            states = memory.reading.by_rows(inputs[0]), memory.reading.by_rows(output)
            scores.append([float(memory.score(side, *states)) for side in memory.sides])

        memory.acting = False
        handle = memory.matrix.register_forward_hook(look)
        for text in self.held_out:
            model(input_ids=torch.tensor([self._cut(text)], device=model.device), use_cache=False)
        handle.remove()
        memory.acting = True
        for side, found in zip(memory.sides, zip(*scores, strict=True), strict=True):
            side.floor = float(torch.tensor(found, dtype=torch.float64).quantile(_KEPT_OUT))


def activation_of(model: Any) -> Activation:
    """The activation function of a model's feed-forward parts, as its config names it.

    Raises:
        CheckpointError: It names none.
    """
    from transformers.activations import ACT2FN

    name = getattr(model.config, "hidden_act", getattr(model.config, "activation_function", None))
    if name not in ACT2FN:
        raise CheckpointError(
            f"a {type(model).__name__} names no activation function: use score plain, which needs none."
        )
    found: Activation = ACT2FN[name]
    return found


def routing_score(
    moved: Tensor, mask: Tensor, output: Tensor, activation: Activation | None = None, asking: bool = False
) -> Tensor:
    """(rows,) how far a side memory moves the output, as a mean over tokens that are not padding.

    Args:
        moved: (rows, tokens, outputs) what the side adds to the output.
        mask: (rows, tokens) 1 for tokens, 0 for padding.
        output: (rows, tokens, outputs) without the side.
        activation: Compare outputs after it, as the released code does.
        asking: Not in training, where the released code takes the largest distance of long texts.
    """
    if activation is None:
        distances = moved.norm(dim=-1) * mask
    else:
        distances = (activation(output + moved) - activation(output)).norm(dim=-1) * mask
    means = distances.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    if activation is None or not asking:
        return means
    return torch.where(mask.sum(dim=1) > _LONG, distances.max(dim=1).values, means)


def choose(scores: Tensor, thresholds: Sequence[float]) -> Tensor:
    """(rows,) the side that answers each row: the highest score above its own threshold; -1 for none.

    Args:
        scores: (sides, rows).
        thresholds: Of each side.
    """
    limits = torch.tensor(thresholds, dtype=scores.dtype, device=scores.device).unsqueeze(1)
    passing = scores.masked_fill(~(scores > limits), -math.inf)
    best, index = passing.max(dim=0)
    return torch.where(best.isfinite(), index, torch.full_like(index, _NONE))


def positive_mean(values: Tensor) -> Tensor:
    """The mean of the values above 0; 0 if there are none."""
    above = values[values > 0]
    return above.mean() if len(above) else values.sum() * 0


def margin_loss(edits: Tensor, other: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """How far the scores of an edit's rows and of an irrelevant text are from where they should be."""
    close = positive_mean((other - alpha).reshape(1))
    return close + positive_mean(beta - edits) + positive_mean(gamma - (edits - other))


def draw_mask(delta: Tensor, share: float, seed: int, shard: int) -> Tensor:
    """0s and 1s of the shape of `delta`, a `share` of them 1, the same for every edit of a shard."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{shard}").getrandbits(48))
    return (torch.rand(delta.shape, generator=generator) < share).to(delta)


@torch.no_grad()
def masked_step(delta: Tensor, gradient: Tensor, mask: Tensor, rate: float, bound: float) -> None:
    """A step of SGD inside the mask, with every entry kept within the bound."""
    delta.sub_(rate * mask * gradient).clamp_(-bound, bound)


def is_done(losses: Sequence[float]) -> bool:
    """Whether the last loss is small and hardly another than the one before."""
    return len(losses) > 1 and abs(losses[-1] - losses[-2]) <= _STILL and losses[-1] <= _LEARNED


def ties(deltas: Tensor, weights: Sequence[float], density: float) -> Tensor:
    """(outputs, inputs) the TIES merge of (members, outputs, inputs) differences.

    Of each member the largest entries are kept; where signs differ, those of the heavier sign are
    averaged. Yadav et al., "TIES-Merging", NeurIPS 2023.
    """
    flat = deltas.flatten(1)
    count = max(1, int(density * flat.shape[1]))
    kept = torch.zeros_like(flat).scatter_(1, flat.abs().topk(count, dim=1).indices, 1.0)
    share = torch.tensor(weights, dtype=flat.dtype, device=flat.device).unsqueeze(1)
    weighted = flat * kept * share
    sign = torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0)
    agreeing = (weighted.sign() == sign).to(flat)
    total = (share * agreeing).sum(dim=0)
    merged = (weighted * agreeing).sum(dim=0) / torch.where(total == 0, 1.0, total)
    return merged.view(deltas.shape[1:])


def linear(deltas: Tensor, weights: Sequence[float]) -> Tensor:
    """(outputs, inputs) the weighted mean of (members, outputs, inputs) differences."""
    share = torch.tensor(weights, dtype=deltas.dtype, device=deltas.device)
    return torch.einsum("m,moi->oi", share / share.sum(), deltas)


def _below(model: nn.Module, matrix: nn.Module) -> list[nn.Module]:
    """The decoder layers under the one that holds a matrix."""
    layers = [layer for _, layer in decoder_layers(model)]
    holding = next(n for n, layer in enumerate(layers) if any(part is matrix for part in layer.modules()))
    return layers[:holding]


@contextmanager
def _kept(layers: Sequence[nn.Module], results: dict[int, Any]) -> Iterator[None]:
    """Inside, layers give again what they gave for this batch before: nothing under the memory moves."""
    before = [vars(layer).get("forward") for layer in layers]
    for number, layer in enumerate(layers):
        vars(layer)["forward"] = _once(layer.forward, results, number)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            if forward is not None:  # libraries that place models on devices set one, too
                vars(layer)["forward"] = forward


def _once(forward: Callable[..., Any], results: dict[int, Any], number: int) -> Callable[..., Any]:
    def again(*args: Any, **named: Any) -> Any:
        if number not in results:
            results[number] = forward(*args, **named)
        return results[number]

    return again
