"""AdaMerging: learn the merging coefficients on unlabelled data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from germane.core.evidence import Plot, Series, Share, Step
from germane.core.objective import Loss
from germane.core.progress import bar
from germane.method import method
from germane.tasks.merge._live import Live, LiveMethod, optimise_coefficients
from germane.tasks.merge._pool import Pool


@method("merge/adamerging", paper="2310.02575", code="EnnengYang/AdaMerging", needs=("data",))
class AdaMerging(LiveMethod):
    """Learn one coefficient a member, or a member and tensor, that makes predictions confident.

    Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", 2024: Adam on the
    coefficients of the task vectors, lowering the entropy of the predictions on unlabelled records.

    Use it when the members are all relevant and inputs, but no labels, are at hand.
    Not with many irrelevant members: it starts from all of them at once, and a model can be
    confident and wrong.

    Coefficients are free, as the formula has them; the official code clamps them to [0, 1].

    A step reads every member twice from disk and holds none: memory does not grow with the pool.
    """

    objective: Loss = Field(
        default="entropy",
        description="what to lower: entropy on any records, or cross-entropy on labelled ones",
    )
    granularity: Literal["layer", "task"] = Field(
        default="layer", description="a coefficient for each member and tensor, or for each member"
    )
    start: float = Field(default=0.3, description="every coefficient at first")
    steps: int = Field(default=1000, ge=0, description="steps of Adam")
    learning_rate: float = Field(default=1e-3, gt=0, description="of Adam")
    batch_size: int = Field(default=16, gt=0, description="records of each task in a step")

    def move(self, live: Live, pool: Pool, step: Step, seed: int) -> None:
        trajectory: list[float] = []
        with bar("AdaMerging", self.steps) as advance:

            def on_step(_: int, value: float) -> None:
                trajectory.append(value / len(live.tasks))
                advance(note=f"{self.objective} {trajectory[-1]:.3f}")

            coefficients = optimise_coefficients(
                live, pool.base, pool.members, self.start,
                per_tensor=self.granularity == "layer", steps=self.steps,
                learning_rate=self.learning_rate, batch_size=self.batch_size,
                loss=self.objective, seed=seed, on_step=on_step,
            )  # fmt: skip
        step.shares = self._shares(pool, coefficients)
        step.plots.append(
            Plot(
                title=f"{self.objective} while the coefficients are learned",
                x="step",
                y=f"mean {self.objective} of a batch",
                series=[Series(name=self.objective, steps=list(range(self.steps)), values=trajectory)],
            )
        )

    def _shares(self, pool: Pool, coefficients: Tensor) -> list[Share]:
        means = coefficients.mean(dim=1)
        total = float(means.clamp(min=0).sum()) or 1.0
        return [
            Share(
                member=member.label,
                share=max(0.0, float(mean)) / total,
                taken=bool(mean != 0),
                reason=f"mean coefficient {float(mean):.3f}, from {self.start} at the start",
            )
            for member, mean in zip(pool.members, means, strict=True)
        ]
