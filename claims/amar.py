"""Amar (arXiv:2412.18537): a gate on retrieved items learns, through a frozen reader, which are relevant.

A reader, trained on right items alone and then frozen, answers from the sum of gated items. Each question
has twelve of them in three aspects, one of which has the question's key. Baselines that must fail: no
gate, one before training, the trained gate with another question, and a constant gate.

    python claims/amar.py

Takes about two minutes on one core.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from germane.claims import interval, write_section
from germane.core.training import Training, fit
from germane.embedded import cache_folder
from germane.tasks.ground._aspects import ASPECTS, RelevanceGate

SEEDS = (1, 2, 3)
WIDTH, KEYS, VALUES = 32, 16, 16
EACH, WORDS = 4, 4  # items of an aspect, tokens of a question
BATCH, STEPS, TESTED = 64, 2500, 4000
TRAINING = Training(learning_rate=1e-3, epochs=1, batch_size=BATCH)
Gates = Callable[["Batch"], Tensor]
TRAINED, UNTRAINED, NONE = "**trained gate**", "untrained gate", "no gate"
SHUFFLED, CONSTANT = "trained gate, shuffled questions", "constant gate"


@dataclass(frozen=True)
class Batch:
    """Questions with their items.

    Attributes:
        question: (questions, tokens, width).
        items: (questions, 3, items of an aspect, width).
        right: (questions, 3, items of an aspect) whether an item has the question's key.
        values: (questions,) what that item says.
    """

    question: Tensor
    items: Tensor
    right: Tensor
    values: Tensor


class World:
    """Embeddings of keys, values and other words, and questions about them."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.keys, self.values, self.words = (
            torch.randn(count, WIDTH, generator=self.generator) for count in (KEYS, VALUES, WORDS - 1)
        )

    def draw(self, count: int) -> Batch:
        """Questions with a right item in a random place among those of other keys."""
        total = len(ASPECTS) * EACH
        # The first keys of a permutation are unlike, so only the right item has the question's.
        keys = torch.rand(count, KEYS, generator=self.generator).argsort(dim=1)[:, :total]
        values = torch.randint(VALUES, (count, total), generator=self.generator)
        place = torch.randint(total, (count, 1), generator=self.generator)
        asked = keys.gather(1, place)
        right = functional.one_hot(place[:, 0], total).bool()
        items = self.keys[keys] + self.values[values]
        words = self.words.expand(count, -1, -1)
        shape = (count, len(ASPECTS), EACH)
        return Batch(
            torch.cat([self.keys[asked], words], dim=1), items.view(*shape, WIDTH), right.view(shape),
            values.gather(1, place)[:, 0],
        )  # fmt: skip


def main() -> None:
    found = [measured(seed) for seed in SEEDS]
    rows = [f"| gate | accuracy | on the right item | on others |\n{'|---' * 4}|"]
    for label in found[0]:
        cells = [interval([100 * seed[label][place] for seed in found]) for place in range(3)]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    write_section("amar", TITLE, f"{INTRODUCTION}\n\n" + "\n".join(rows), verdict(found))


def measured(seed: int) -> dict[str, list[float]]:
    """What one seed gives, computed once."""
    file = cache_folder() / "claims" / "amar" / f"{seed}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measure(seed)), encoding="utf-8")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def measure(seed: int, steps: int = STEPS) -> dict[str, list[float]]:
    """Of each kind of gate: accuracy, and its mean on the right item and on others."""
    torch.manual_seed(seed)
    world = World(seed)
    reader = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, VALUES))
    train(reader, world, lambda batch: batch.right.float(), reader, steps)
    reader.requires_grad_(False)
    gate = RelevanceGate(WIDTH)
    test = world.draw(TESTED)
    found = {UNTRAINED: score(reader, test, gated(gate, test))}
    train(gate, world, lambda batch: gated(gate, batch), reader, steps)
    gates = gated(gate, test).detach()
    other = Batch(test.question.roll(1, 0), test.items, test.right, test.values)
    kinds = {
        TRAINED: gates, NONE: torch.ones_like(gates), SHUFFLED: gated(gate, other),
        CONSTANT: torch.full_like(gates, float(gates.mean())), "only the right item": test.right.float(),
    }  # fmt: skip
    return {**{kind: score(reader, test, values) for kind, values in kinds.items()}, **found}


def gated(gate: RelevanceGate, batch: Batch) -> Tensor:
    """(questions, 3, items of an aspect) what the gate gives."""
    counted = torch.ones(batch.question.shape[:2])
    found: Tensor = gate(batch.question, counted, batch.items.unbind(dim=1))
    return found


def answers(reader: nn.Module, batch: Batch, gates: Tensor) -> Tensor:
    """(questions, values) what the reader says of the sum of the gated items."""
    found: Tensor = reader((batch.items * gates[..., None]).sum(dim=(1, 2)))
    return found


def train(moved: nn.Module, world: World, gates: Gates, reader: nn.Module, steps: int) -> None:
    """Lower the reader's loss by moving one of the modules."""

    def batches(epoch: int) -> Iterator[Batch]:
        for _ in range(steps):
            yield world.draw(BATCH)

    def loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(answers(reader, batch, gates(batch)), batch.values)

    fit(moved, TRAINING, batches, steps, loss)


@torch.no_grad()
def score(reader: nn.Module, batch: Batch, gates: Tensor) -> list[float]:
    """Accuracy, and the mean gate on the right item and on others."""
    right = answers(reader, batch, gates).argmax(dim=1) == batch.values
    means = (gates[batch.right].mean(), gates[~batch.right].mean())
    return [float(right.float().mean()), *map(float, means)]


def verdict(found: list[dict[str, list[float]]]) -> str:
    """Holds if on every seed the trained gate is far above every baseline, and tells items apart."""
    means = {label: 100 * float(np.mean([seed[label][0] for seed in found])) for label in found[0]}
    failing = (NONE, UNTRAINED, SHUFFLED, CONSTANT)
    holds = all(
        seed[TRAINED][0] >= 0.7 and max(seed[label][0] for label in failing) <= 0.3
        and seed[TRAINED][1] >= 5 * seed[TRAINED][2]
        for seed in found
    )  # fmt: skip
    others = ", ".join(f"{means[label]:.1f} with {label}" for label in failing)
    words = "Holds for a frozen reader" if holds else "Does not hold as stated"
    return f"{words}: {means[TRAINED]:.1f} % right with a trained gate; {others}."


TITLE = "Amar: a gate learns through a frozen reader which retrieved items are relevant"
INTRODUCTION = f"""\
A reader, a network of two layers, answers one of {VALUES} values from the sum of item vectors. It is trained
on right items alone and frozen. An item is the sum of a key's and a value's vector in {WIDTH} dimensions;
a question has {len(ASPECTS) * EACH} in three aspects, all of different keys, one its own. Only the relevance
gate is trained, through the reader, in {STEPS:,} steps of {BATCH} questions. Accuracy on {TESTED:,} new questions
and mean gates, in percent, with 95 % t intervals over {len(SEEDS)} seeds. Limits were set beforehand; the number
of values was raised from 8 to {VALUES} after a trial on another seed, in which baselines came close to theirs.

Read it with this in mind: the reader stands for the frozen language model, and cannot leave items out by itself, as
attention could. The alignment of aspects, LoRA and queries on a knowledge graph have no part in it,
and nothing here says how the method does on WebQSP or CWQ. In three trials with a tiny language model that knows
invented people, the whole method did not learn to answer about others (.09 to .12, chance .125)."""


if __name__ == "__main__":
    main()
