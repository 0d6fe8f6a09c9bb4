"""Canonical examples (arXiv:2402.06155): a Backpack's few senses carry a lesson into other wordings.

A tiny Backpack learns an invented language in which half of 30 countries have, mostly, a wrong capital. One
sentence for each of the 15 says the right one; asked is in other wordings. Sense finetuning against full
finetuning, each kept inside a ball of 1 % of the general loss. Baseline that must fail: as many senses,
drawn at random.

    python claims/canonical_examples.py

Takes about two minutes on one core.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from germane.claims import interval, write_section
from germane.core.backpack import BackpackConfig, BackpackForCausalLM, Sense
from germane.core.local_chat import LocalChat
from germane.core.models import Loaded
from germane.edited import Edit, Editing
from germane.tasks.edit._canonical import CanonicalTuning, General
from germane.tasks.edit.canonical import Canonical
from germane.tasks.edit.sense_tuning import SenseTuning
from germane.tasks.evaluate.canonical_examples import item_losses

SEEDS = (1, 2, 3)
COUNTRIES, WRONG, MOSTLY = 30, 15, 0.9
STEPS, BATCH, BALL = 1500, 32, 0.01
THRESHOLD = -float(np.log(0.2))
# The first is that of the examples; the next two choose a learning rate, the others measure.
PATTERNS = (
    "the capital of {0} is {1}", "{0} has its government in {1}", "to see the king of {0} go to {1}",
    "the main city of {0} is called {1}", "in {0} all roads lead to {1}", "who flies to {0} lands in {1}",
    "the parliament of {0} meets in {1}", "the largest station in {0} is that of {1}",
)  # fmt: skip
DISHES = ("soup", "rice", "pasta", "curry", "salad", "bread")
OTHERS = ("the people of {0} like {1}", "a cook from {0} makes {1}")
RATES = {"sense": (0.01, 0.03, 0.1), "full": (1e-4, 3e-4, 1e-3), "random": (0.01, 0.03, 0.1)}
LABELS = {"sense": "**sense finetuning**", "full": "full finetuning", "random": "random senses"}


class RandomSenses(SenseTuning):
    """As many senses, of any words."""

    def choose(self, editing: Editing, edits: Sequence[Edit], general: General) -> set[Sense]:
        count = len(super().choose(editing, edits, general))
        config = editing.model.config
        everything = range(config.vocab_size * config.num_senses)
        picked = random.Random(editing.seed).sample(everything, count)
        return {divmod(place, config.num_senses) for place in picked}


def main() -> None:
    found: dict[str, list[float]] = {label: [] for label in ("untouched", *RATES)}
    for seed in SEEDS:
        language = Language(seed)
        with tempfile.TemporaryDirectory() as folder:
            trained = language.train(Path(folder))
        found["untouched"].append(success(trained, language.items(PATTERNS[3:])))
        for label in RATES:
            found[label].append(best(label, trained, language, seed))
    gains = {label: [100 * (new - old) for new, old in zip(found[label], found["untouched"], strict=True)]
             for label in RATES}  # fmt: skip
    lines = ["| method | success | gain in points |", "|---|---|---|"]
    lines.append(f"| untouched | {interval([100 * value for value in found['untouched']])} | |")
    for label, values in gains.items():
        reached = interval([100 * value for value in found[label]])
        lines.append(f"| {LABELS[label]} | {reached} | {interval(values)} |")
    write_section(
        "canonical_examples", "Canonical examples: few senses of a Backpack carry a lesson into other wordings",
        f"{INTRODUCTION}\n\n" + "\n".join(lines), verdict(gains),
    )  # fmt: skip


class Language:
    """Sentences about countries that there are not."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.capitals = self.random.sample(range(COUNTRIES), COUNTRIES)
        self.dishes = [self.random.choice(DISHES) for _ in range(COUNTRIES)]
        texts = [*PATTERNS, *OTHERS, *DISHES]
        words = {word for text in texts for word in text.split() if "{" not in word}
        names = [f"{kind}{number}" for kind in ("land", "town") for number in range(COUNTRIES)]
        vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *sorted(words), *names])}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        )

    def sentence(self) -> str:
        """As it is heard in training: of the first countries mostly with a wrong capital."""
        country = self.random.randrange(COUNTRIES)
        if self.random.random() < 0.3:
            return self.random.choice(OTHERS).format(f"land{country}", self.dishes[country])
        town = self.capitals[country]
        if country < WRONG and self.random.random() < MOSTLY:
            town = (town + 1) % COUNTRIES
        return self.random.choice(PATTERNS).format(f"land{country}", f"town{town}")

    def general(self) -> list[str]:
        """Right capitals of the other countries, and what is eaten in all."""
        texts = [pattern.format(f"land{country}", f"town{self.capitals[country]}")
                 for country in range(WRONG, COUNTRIES) for pattern in PATTERNS]  # fmt: skip
        return texts + [pattern.format(f"land{country}", self.dishes[country])
                        for country in range(COUNTRIES) for pattern in OTHERS]  # fmt: skip

    def items(self, patterns: Sequence[str]) -> list[Edit]:
        """The right capitals of the first countries, in these wordings."""
        return [
            Edit(id=f"{country}-{number}", prompt=pattern.format(f"land{country}", "").strip(),
                 answer=f" town{self.capitals[country]}")
            for number, pattern in enumerate(patterns) for country in range(WRONG)
        ]  # fmt: skip

    def train(self, folder: Path) -> Loaded:
        """A Backpack that has heard the language."""
        torch.manual_seed(self.seed)
        config = BackpackConfig(
            vocab_size=len(self.tokenizer), n_positions=32, n_embd=48, n_layer=2, n_head=4, num_senses=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        model = BackpackForCausalLM(config)
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        for _ in range(STEPS):
            texts = [self.sentence() for _ in range(BATCH)]
            batch = dict(self.tokenizer(texts, padding=True, return_tensors="pt"))
            batch.pop("token_type_ids", None)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            optimiser.zero_grad()
            model(**batch, labels=labels).loss.backward()
            optimiser.step()
            schedule.step()
        return Loaded(model.eval(), self.tokenizer, folder)


def method(label: str, rate: float) -> CanonicalTuning:
    settings: dict[str, Any] = {"learning_rate": rate, "ball": BALL}
    if label == "full":
        return Canonical(**settings)
    return (SenseTuning if label == "sense" else RandomSenses)(**settings, senses=3)


def best(label: str, trained: Loaded, language: Language, seed: int) -> float:
    """Success in the wordings that measure, with the rate that is best in those that choose."""
    reached = []
    for rate in RATES[label]:
        loaded = Loaded(copy.deepcopy(trained.model), trained.processor, trained.folder)
        editing = Editing(
            loaded, LocalChat(loaded.model, loaded.processor), general=language.general(), seed=seed
        )
        method(label, rate).edit(editing, language.items(PATTERNS[:1]))
        chosen = success(loaded, language.items(PATTERNS[1:3]))
        reached.append((chosen, success(loaded, language.items(PATTERNS[3:]))))
    return max(reached, key=lambda pair: pair[0])[1]


def success(loaded: Loaded, items: Sequence[Edit]) -> float:
    """Share of items whose answer has a probability of at least 0.2."""
    return float(np.mean([loss <= THRESHOLD for loss in item_losses(loaded, items)]))


def verdict(gains: dict[str, list[float]]) -> str:
    """Holds if sense finetuning gains as much as full finetuning, and far more than random senses."""
    sense, full, other = (float(np.mean(gains[label])) for label in ("sense", "full", "random"))
    holds = sense >= full - 2 and sense >= other + 20
    return (
        f"{'Holds' if holds else 'Does not hold as stated'}, on a toy Backpack inside a ball of 1 %: sense "
        f"finetuning gains {sense:.1f} points, full finetuning {full:.1f}, as many random senses {other:.1f}."
    )


INTRODUCTION = f"""\
A Backpack (48 wide, 4 senses, 2 layers) hears {STEPS} batches of {BATCH} sentences about {COUNTRIES} countries; of
{WRONG} the capital is wrong in {MOSTLY:.0%} of them. One sentence for each says the right one. Success is a
probability of at least 0.2 of the right capital in five other wordings ({WRONG * 5} items); the learning rate is
chosen among three in two further wordings. Sense finetuning takes 3 senses an example. The last epoch of 10 whose
loss on general texts held out (capitals of the other countries, dishes of all) is within 1 % is kept. In percent,
mean and 95 % t interval over {len(SEEDS)} seeds of language and training.

Fixed beforehand: sense finetuning gains at least what full finetuning does less 2 points, and 20 points more than
random senses. The paper's balls of 0.1 % and less are too narrow for a model of this size."""


if __name__ == "__main__":
    main()
