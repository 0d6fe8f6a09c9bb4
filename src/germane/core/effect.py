"""How far a model's weights moved, and where: the check that a run did something, and not everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from germane.core.checkpoint import Checkpoint, TensorInfo
from germane.core.evidence import Finding

_CHUNK = 1 << 22  # elements read at a time


@dataclass(frozen=True)
class Change:
    """The distance between two checkpoints of one form.

    Attributes:
        relative: Norm of the difference over the norm of the first.
        most: The tensors that changed most, each with its own relative change.
    """

    relative: float
    most: dict[str, float]

    @classmethod
    def of(cls, moved: Mapping[str, float], sizes: Mapping[str, float]) -> Change:
        """From each tensor's squared distance, and its squared norm before."""
        shares = {name: (moved[name] / max(sizes[name], 1e-30)) ** 0.5 for name in moved}
        total = (sum(moved.values()) / max(sum(sizes.values()), 1e-30)) ** 0.5
        return cls(total, {name: shares[name] for name in sorted(shares, key=lambda n: -shares[n])[:5]})


def weight_change(before: Checkpoint, after: Checkpoint) -> Change:
    """Compare the tensors that both have in the same shape, a few million elements at a time."""
    moved: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for name, info in before.tensors.items():
        other = after.tensors.get(name)
        if info.is_float and other is not None and other.shape == info.shape:
            moved[name], sizes[name] = _squares(before, after, info)
    return Change.of(moved, sizes)


def _squares(before: Checkpoint, after: Checkpoint, info: TensorInfo) -> tuple[float, float]:
    moved = size = 0.0
    for start in range(0, info.count, _CHUNK):
        stop = min(start + _CHUNK, info.count)
        old = before.read(info.name, start, stop).double()
        moved += float((after.read(info.name, start, stop).double() - old).square().sum())
        size += float(old.square().sum())
    return moved, size


def judge_change(change: Change, same: str = "the weights are the same as before") -> Finding:
    """`no-effect` where nothing moved, `destroyed` where the weights moved beyond their own size.

    Args:
        change: How far the weights moved.
        same: What is said where they did not.
    """
    if change.relative == 0:
        return _finding("no-effect", f"{same}: nothing was changed.")
    if not change.relative < 1:
        text = f"the weights moved {change.relative:.1f} times their own size: the model is hardly one."
        return _finding("destroyed", text)
    first = next(iter(change.most))
    text = f"the weights moved by {change.relative:.2%} of their size, most in {first}."
    return Finding(code="changed", severity="note", about="result", message=text)


def _finding(code: str, text: str) -> Finding:
    return Finding(code=code, severity="serious", about="result", message=text)
