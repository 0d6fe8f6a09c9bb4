"""FW-Merging: merging as Frank-Wolfe optimisation over a pool of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from germane.core.checkpoint import Source
from germane.core.errors import GermaneError, SettingError
from germane.core.evidence import Plot, Series, Share, Step
from germane.core.progress import bar
from germane.core.settings import validate
from germane.method import build, load, method
from germane.tasks.merge._live import Live, LiveMethod, optimise_coefficients
from germane.tasks.merge._pool import Pool
from germane.tasks.merge._rule import Rule
from germane.tasks.merge._stream import Block, Stream

_HALVINGS = 6
_START = "start"


@method("merge/frank-wolfe", paper="2503.12649", code="hmarkc/FW-Merging", needs=("data",))
class FrankWolfe(LiveMethod):
    """Take from the pool, round by round, only what lowers the loss on a few records.

    Chen et al., "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization", 2025. Each round
    computes the gradient of the loss at the merged model, looks for the pool member that promises
    the steepest descent (the linear minimisation oracle), and steps towards it.

    Use it for pools of which you do not know what helps: about a hundred records for each wanted
    task decide. With pools that may hold ruined or foreign checkpoints take variant=soft,
    granularity=task, score=direction, constraint=free: of what was measured in CLAIMS.md they lose
    least to irrelevant members, though not nothing; the hard form loses several points.
    Not without records, nor when one member alone already does the whole job.

    Where this follows the paper and not its code, and why:

    - `score`: the paper's inner product of gradient and checkpoint is the default; the code's
      cosine with the raw weights, summed over tensors, is `cosine`. An inner product grows with
      distance, so a checkpoint trained with far too high a learning rate can win it by sheer size;
      `direction` divides by the distance, and is the safer choice for pools of unknown origin.
    - `start`: the paper's hard variant starts from the merge of the whole pool. With many
      irrelevant members that point is ruined, and steps of 2/(t+2) x 0.1 cannot bring it back, so
      the base is the default here, and the other is `start=merge`.
    - `step`: the paper's 2/(t+2) is `schedule`. The default, `line-search`, halves the step from 1
      until the loss stops falling, and stops the merge when no step helps.
    - The starting point is a candidate of every round, as in the code, so a step can lead back.
    - The language code puts zeros in for tensors whose best cosine is not negative, which shrinks
      them; here such tensors stay as they are.
    - `constraint`: in the soft variant the paper projects the coefficients on the simplex, with the
      current model taking what is left; the code has that function, never calls it, and leaves
      them free.
    - Dropout is off while gradients are computed; the code leaves it on.

    Memory: the model, its gradient, a few megabytes of candidates, and, but for `step=schedule`, a
    copy of the model to come back to. It does not grow with the pool.
    """

    variant: Literal["hard", "soft"] = Field(
        default="hard",
        description="one member a round, or one for each task with optimised coefficients",
    )
    granularity: Literal["layer", "task"] = Field(
        default="layer", description="choose a member for each tensor, or for the whole model"
    )
    rounds: int = Field(default=10, gt=0, description="most rounds")
    samples: int = Field(default=100, gt=0, description="records of each task that are used")
    score: Literal["inner", "direction", "cosine"] = Field(
        default="inner",
        description="inner product with the gradient (the paper), the same per distance from here, "
        "or the cosine with the raw weights (the code)",
    )
    start: Literal["base", "merge"] = Field(
        default="base", description="start from the base, or from the local merge of the whole pool"
    )
    step: Literal["line-search", "schedule"] = Field(
        default="line-search", description="halve until the loss stops falling, or 2 / (round + 2)"
    )
    step_size: float = Field(default=1.0, gt=0, le=1, description="factor of every step")
    local: str = Field(default="task-arithmetic", description="data-free method that makes a step")
    local_settings: dict[str, Any] = Field(
        default={}, description="its settings; a `scale` not given is 1 (the paper's lambda is 0.3)"
    )
    patience: int = Field(default=2, gt=0, description="stop after so many rounds without progress")
    inner_steps: int = Field(default=500, ge=0, description="soft: steps of Adam in each round")
    learning_rate: float = Field(default=1e-3, gt=0, description="soft: of Adam")
    batch_size: int = Field(default=16, gt=0, description="soft: records of each task in a step")
    constraint: Literal["simplex", "free"] = Field(
        default="simplex", description="soft: keep coefficients on the simplex, or free (the code)"
    )

    @model_validator(mode="after")
    def _check_local(self) -> FrankWolfe:
        try:
            self._rule().check_pool(1)
        except GermaneError as error:
            raise ValueError(str(error)) from None
        return self

    def _rule(self) -> Rule:
        """The data-free method that makes a step; its scale is the paper's lambda."""
        kind = load(f"merge/{self.local}")
        if not issubclass(kind, Rule):
            raise SettingError(f"local: {self.local} is not data-free.")
        whole = {"scale": 1.0} if "scale" in kind.model_fields else {}
        return validate(kind, {**whole, **self.local_settings}, "local_settings")

    def move(self, live: Live, pool: Pool, step: Step, seed: int) -> None:
        search = _Search(self, live, pool, seed)
        search.begin()
        with bar("Frank-Wolfe", self.rounds) as advance:
            for number in range(self.rounds):
                going_on = search.soft_round(number) if self.variant == "soft" else search.round(number)
                advance(note=f"loss {search.log[-1].after:.4f}")
                if not going_on:
                    break
        search.report(step)


@dataclass
class _Round:
    """What one round saw and did."""

    before: float
    after: float
    losses: dict[str, float]
    gradient_norm: float
    step: float
    scores: dict[str, float]  # candidate -> its oracle score; lower is better
    chosen: dict[str, float]  # candidate -> share of the chosen weights it supplied


@dataclass
class _Search:
    """State of a merge: the model, where it started, what each member has given."""

    method: FrankWolfe
    live: Live
    pool: Pool
    seed: int
    log: list[_Round] = field(default_factory=list)

    def begin(self) -> None:
        self.candidates: list[Source] = [*self.pool.members]
        if self.method.start == "merge":
            self._merge_all()
            self.candidates.append(self.live.copy())
        else:
            self.candidates.append(_Labelled(_START, self.pool.base))
        self.labels = [source.label for source in self.candidates]
        self.counts = {info.name: info.count for info in self.live.tensors}
        # (candidates, tensors) how much of the merged model each has supplied
        self.given = torch.zeros(len(self.labels), len(self.counts), dtype=torch.float64)
        self.given[-1] = 1.0
        self.still = 0

    def _merge_all(self) -> None:
        """Put the live model at the local merge of the whole pool, at that method's own scale."""
        rule = build(f"merge/{self.method.local}", self.method.local_settings, "local_settings")
        assert isinstance(rule, Rule)
        stream = self.pool.stream(self.live.tensors)
        survey = rule.survey(stream)
        self.live.update(lambda block: rule.combine(block, survey, self.seed), stream)

    def round(self, number: int) -> bool:
        """One hard round; False when there is nothing left to gain."""
        losses = self.live.gradient(self.method.objective)
        scores = self.scores()
        chosen = self.choose(scores)
        moving = self._promising(scores, chosen)
        before = _mean(losses)
        step, after = self._step(number, chosen, moving, before)
        self._record(losses, scores, [chosen], step, after)
        taken = self.given.clone()
        columns = moving.nonzero().squeeze(1)
        taken[:, columns] = 0.0
        taken[chosen[columns], columns] = 1.0
        reach = step * getattr(self.method._rule(), "scale", 1.0)
        self.given = (1 - reach) * self.given + reach * taken
        return step > 0 and self._progress(before, after)

    def _promising(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """(tensors,) whether a step towards the choice is downhill at all; the rest stay."""
        if self.method.granularity == "layer":
            return scores.gather(0, chosen.unsqueeze(0))[0] < 0
        downhill = self.method.score == "cosine" or bool(scores[chosen[0]].sum() < 0)
        return torch.full((scores.shape[1],), downhill)

    def _progress(self, before: float, after: float) -> bool:
        """Whether to go on: the loss fell within the last `patience` rounds."""
        self.still = 0 if after < before - 1e-6 else self.still + 1
        return self.still < self.method.patience

    def scores(self) -> Tensor:
        """(candidates, tensors) oracle scores at the current gradient; lower is better."""
        stream = Stream(self.live, self.candidates, self.live.tensors)
        if self.method.score == "cosine":
            return self._scores(stream, _weights_and_gradient, per_tensor=True)
        if self.method.score == "direction":
            return self._scores(stream, _step_and_gradient, per_tensor=self.method.granularity == "layer")
        slopes = self.live.fold(stream, lambda block, gradient: block.deltas @ gradient)
        return torch.stack([slopes[name] for name in self.counts], dim=1)

    def _scores(
        self, stream: Stream, measure: Callable[[Block, Tensor], Tensor], per_tensor: bool
    ) -> Tensor:
        """Inner products over the product of norms, taken in each tensor or over the whole model."""
        sums = self.live.fold(stream, measure)
        inner, squares, gradient = torch.stack([sums[name] for name in self.counts], dim=2).unbind(dim=1)
        norms = squares * gradient if per_tensor else (squares.sum(1) * gradient.sum(1))[:, None]
        return torch.where(norms > 0, inner / norms.clamp(min=1e-60).sqrt(), 0.0)

    def choose(self, scores: Tensor) -> Tensor:
        """(tensors,) index of the candidate chosen for each tensor."""
        if self.method.granularity == "layer":
            return scores.argmin(dim=0)
        return scores.sum(dim=1).argmin().expand(scores.shape[1])

    def _step(self, number: int, chosen: Tensor, moving: Tensor, before: float) -> tuple[float, float]:
        """Move towards the choice; returns the step taken and the loss after it."""
        vertex = self._vertex(chosen)
        tensors = [info for info, moves in zip(self.live.tensors, moving, strict=True) if moves]
        if not tensors:
            return 0.0, before
        if self.method.step == "line-search":
            return self._line_search(Stream(self.live.copy(), [vertex], tensors), before)
        step = self.method.step_size * 2 / (number + 2)
        self._go(Stream(self.live, [vertex], tensors), step)
        return step, _mean(self.live.loss(self.method.objective))

    def _vertex(self, chosen: Tensor) -> Source:
        return _Composite(self.candidates, dict(zip(self.counts, chosen.tolist(), strict=True)))

    def _go(self, stream: Stream, step: float) -> None:
        """Go `step` of the way to what the local method makes of the current model and the choice."""
        rule = self.method._rule()
        survey = rule.survey(stream)

        def part_way(block: Block) -> Tensor:
            return block.base + step * (rule.combine(block, survey, self.seed) - block.base)

        self.live.update(part_way, stream)

    def _line_search(self, stream: Stream, before: float) -> tuple[float, float]:
        """Halve the step until the loss stops falling; 0 where no step lowers it."""
        best, best_loss = 0.0, before
        for halving in range(_HALVINGS):
            step = self.method.step_size * 0.5**halving
            self._go(stream, step)
            loss = _mean(self.live.loss(self.method.objective))
            if loss < best_loss:
                best, best_loss = step, loss
            elif best:
                break
        self._go(stream, best)
        return best, best_loss

    def soft_round(self, number: int) -> bool:
        """One soft round: a vertex for each task, then coefficients for all of them together."""
        chosen: list[Tensor] = []
        losses: dict[str, float] = {}
        for task in self.live.tasks[: len(self.candidates)]:
            losses |= self.live.gradient(self.method.objective, [task])
            scores = self.scores()
            for earlier in chosen:
                scores[earlier, torch.arange(scores.shape[1])] = torch.inf
            chosen.append(self.choose(scores))
        coefficients = self._optimise(number, [self._vertex(pick) for pick in chosen])
        after = _mean(self.live.loss(self.method.objective))
        self._record(losses, scores, chosen, float(coefficients.sum(dim=0).mean()), after)
        self.given = (1 - coefficients.sum(dim=0)) * self.given
        for pick, row in zip(chosen, coefficients, strict=True):
            self.given[pick, torch.arange(len(row))] += row
        return self._progress(self.log[-1].before, after)

    def _optimise(self, number: int, vertices: list[Source]) -> Tensor:
        method = self.method
        return optimise_coefficients(
            self.live, self.live.copy(), vertices, 0.3 if number == 0 else 1e-8,
            per_tensor=True, steps=method.inner_steps, learning_rate=method.learning_rate,
            batch_size=method.batch_size, loss=method.objective, seed=self.seed + number,
            constrain=project if method.constraint == "simplex" else lambda values: values,
        )  # fmt: skip

    def _record(
        self,
        losses: dict[str, float],
        scores: Tensor,
        chosen: list[Tensor],
        step: float,
        after: float,
    ) -> None:
        sizes = torch.tensor(list(self.counts.values()), dtype=torch.float64)
        picks = torch.zeros(len(self.labels), dtype=torch.float64)
        for pick in chosen:
            picks.index_add_(0, pick, sizes / sizes.sum())
        norm = sum(float(g.square().sum()) for g in self.live.gradients.values()) ** 0.5
        totals = scores.masked_fill(scores.isinf(), 0.0).sum(dim=1)
        self.log.append(
            _Round(
                before=_mean(losses),
                after=after,
                losses=losses,
                gradient_norm=norm,
                step=step,
                scores=dict(zip(self.labels, totals.tolist(), strict=True)),
                chosen={name: float(p) for name, p in zip(self.labels, picks, strict=True) if p > 0},
            )
        )

    def report(self, step: Step) -> None:
        """Shares with reasons, and the trajectories."""
        sizes = torch.tensor(list(self.counts.values()), dtype=torch.float64)
        shares = (self.given * sizes / sizes.sum()).sum(dim=1).tolist()
        for label, share in zip(self.labels, shares, strict=True):
            if label != _START:
                step.shares.append(
                    Share(
                        member=label,
                        share=max(0.0, share),
                        taken=share > 0,
                        reason=self._reason(label),
                    )
                )
        step.facts["rounds"] = [vars(entry) for entry in self.log]
        step.plots += self._plots()

    def _reason(self, label: str) -> str:
        """The member's score at each round, and the rounds in which something of it was taken."""
        rounds = [str(n) for n, entry in enumerate(self.log, 1) if label in entry.chosen and entry.step]
        scores = ", ".join(f"{entry.scores[label]:+.3g}" for entry in self.log)
        did = f"chosen in round {', '.join(rounds)}" if rounds else "never the steepest descent"
        return f"{did}; score by round (lower is better): {scores}"

    def _plots(self) -> list[Plot]:
        rounds = [float(n) for n in range(len(self.log) + 1)]
        names = list(self.log[0].losses)
        losses = [
            Series(name=name, steps=rounds[:-1], values=[entry.losses[name] for entry in self.log])
            for name in names
            if all(name in entry.losses for entry in self.log)
        ]
        mean = Series(name="mean", steps=rounds, values=[self.log[0].before, *(e.after for e in self.log)])
        steps = Series(name="step", steps=rounds[1:], values=[entry.step for entry in self.log])
        objective = self.method.objective
        return [
            Plot(title=f"{objective} by round", x="round", y=objective, series=[mean, *losses]),
            Plot(title="step by round", x="round", y="step", series=[steps]),
        ]


@dataclass(frozen=True)
class _Labelled:
    """A source under another label."""

    label: str
    source: Source

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.read(name, start, stop)


@dataclass(frozen=True)
class _Composite:
    """The vertex a round chose: for each tensor, one of the candidates."""

    candidates: list[Source]
    chosen: dict[str, int]
    label: str = "vertex"

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.candidates[self.chosen[name]].read(name, start, stop)


def project(coefficients: Tensor) -> Tensor:
    """Project each column, together with what is left for the current model, on the simplex.

    Args:
        coefficients: (vertices, tensors).

    Returns:
        Coefficients that are at least 0 and whose columns sum to at most 1.
    """
    rest = 1 - coefficients.sum(dim=0, keepdim=True)
    return project_on_simplex(torch.cat([coefficients, rest]))[:-1]


def project_on_simplex(values: Tensor) -> Tensor:
    """The nearest point, column by column, whose entries are at least 0 and sum to 1.

    By sorting: Duchi et al., "Efficient projections onto the l1-ball", 2008.

    Args:
        values: (n, columns).
    """
    ordered = values.sort(dim=0, descending=True).values
    ranks = torch.arange(1, len(values) + 1, dtype=values.dtype).unsqueeze(1)
    excess = (ordered.cumsum(dim=0) - 1) / ranks
    last = (ordered > excess).sum(dim=0, keepdim=True) - 1
    return (values - excess.gather(0, last)).clamp(min=0)


def _weights_and_gradient(block: Block, gradient: Tensor) -> Tensor:
    """(models, 3) inner product of weights and gradient, and the squared norms of both."""
    return _products(block.base + block.deltas, gradient)


def _step_and_gradient(block: Block, gradient: Tensor) -> Tensor:
    """(models, 3) inner product of the way to a candidate and the gradient, and squared norms."""
    return _products(block.deltas, gradient)


def _products(values: Tensor, gradient: Tensor) -> Tensor:
    squares = values.square().sum(dim=1)
    return torch.stack([values @ gradient, squares, (gradient @ gradient).expand_as(squares)], dim=1)


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)
