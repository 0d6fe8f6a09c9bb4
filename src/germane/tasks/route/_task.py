"""The route task: a pool and labelled queries make a router, which sends queries to the pool.

Promised for every method: each query gets a node of the pool, with a score between 0 and 1; what
cannot be placed goes to the default worker, and the decision says why; the same router decides the
same in another process; nothing is trained before graph and records have been checked; nothing a
router or a worker says is executed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from germane.core.checkpoint import digest
from germane.core.errors import RecordsError, SettingError, nearest
from germane.core.evidence import Finding, Score, Step, Table
from germane.core.progress import announce
from germane.core.records import Data, read_rows
from germane.core.statistics import bootstrap_mean, wilson
from germane.job import Job
from germane.method import Method
from germane.tasks.route._graph import Graph, read_graph
from germane.tasks.route._router import Card, Decision, Example, RouteMethod, Router, Training, save_card
from germane.tasks.route.keyword import KeywordRouter, words


class Route(Job):
    """Train a router that sends each query to the model of a pool that should answer it."""

    task: ClassVar[str] = "route"
    paths: ClassVar[tuple[str, ...]] = ("graph",)

    graph: str = Field(description="the pool: a YAML or JSON file with workers, masters and their edges")
    data: list[Data] = Field(
        default=[], description="labelled queries, as name=path: text, label (a node), answer (rewritten)"
    )
    master: str = Field(default="", description="the master to train; default: the graph's entry")
    max_steps: int = Field(default=8, gt=0, description="longest walk of a query through the graph")

    def check(self, method: Method) -> None:
        """Graph, records, labels, and what the method needs, before any work."""
        if not isinstance(method, RouteMethod):
            raise SettingError(f"{method.name}: is no way to route.")
        graph = read_graph(self.graph)
        card = self._card(method, graph)
        if method.needs_examples and not self.data:
            raise SettingError(f"{method.name}: needs labelled queries: --data NAME=FILE.")
        for data in (*self.data, *self.evaluate):
            read_examples(data, card.nodes, card.master)
        method.prepare()

    def run(self, method: Method, folder: Path, step: Step, seed: int) -> None:
        """Train the router into `folder`, which exists and is empty, and score it."""
        assert isinstance(method, RouteMethod)
        with step.stage("check"):
            graph = read_graph(self.graph)
            card = self._card(method, graph)
            named = [read_examples(data, card.nodes, card.master) for data in self.data]
            examples = [example for part in named for example in part]
            step.inputs = self._digests()
        with step.stage("train"):
            router = method.train(Training(card, graph, examples, folder, step, seed))
            save_card(card, folder)
        step.facts["nodes"] = card.nodes
        step.facts["examples"] = {node: sum(e.node == node for e in examples) for node in card.nodes}
        if self.evaluate:
            with step.stage("evaluate"):
                self._evaluate(router, step, seed)
            step.findings += judge(step.scores, len(card.nodes))

    def _card(self, method: RouteMethod, graph: Graph) -> Card:
        master = self.master or graph.entry
        if master not in graph.masters:
            known = list(graph.masters)
            raise SettingError(
                f"master: no master {master!r}{nearest(master, known)} Known: {', '.join(known)}."
            )
        return Card(
            method=method.name,
            settings=method.model_dump(mode="json"),
            master=master,
            nodes=graph.masters[master].neighbours,
            max_steps=self.max_steps,
            graph=graph.model_dump(mode="json"),
        )

    def _digests(self) -> dict[str, str]:
        files = [Path(self.graph), *(Path(data.path) for data in (*self.data, *self.evaluate))]
        return {str(file): digest(file) for file in files if file.is_file()}

    def _evaluate(self, router: Router, step: Step, seed: int) -> None:
        nodes = router.card.nodes
        for data in self.evaluate:
            announce(f"scoring {data.name}")
            examples = read_examples(data, nodes, router.card.master)
            queries, gold = [e.query for e in examples], [e.node for e in examples]
            decisions = router.route_all(queries)
            step.scores += [accuracy("result", data.name, [d.worker for d in decisions], gold)]
            step.scores += side_scores(data.name, decisions, examples)
            if self.references:
                step.scores += reference_scores(router, data.name, examples, seed)
            step.tables.append(confusion(data.name, decisions, gold, nodes))


def read_examples(data: Data, nodes: Sequence[str], master: str) -> list[Example]:
    """Labelled queries, every label a node the master knows.

    Raises:
        RecordsError: With the number of the first record that has none.
    """
    examples = []
    for number, row in enumerate(read_rows(data), 1):
        label = row.get(data.label)
        if label not in nodes:
            known = f"{nearest(str(label), nodes)} Nodes of {master!r}: {', '.join(nodes)}."
            raise RecordsError(
                f"{data.path}, record {number}: label {label!r} in field {data.label!r} is no node{known}"
            )
        rewritten = row.get(data.answer)
        if rewritten is not None and not isinstance(rewritten, str):
            raise RecordsError(f"{data.path}, record {number}: field {data.answer!r} holds no text.")
        query = row.get(data.text)
        if not isinstance(query, str):
            raise RecordsError(f"{data.path}, record {number}: has no text in field {data.text!r}.")
        examples.append(Example(query, str(label), rewritten or None))
    return examples


def accuracy(subject: str, task: str, chosen: Sequence[str], gold: Sequence[str]) -> Score:
    """Share of queries that went where they belong, with its Wilson interval."""
    right = sum(node == wanted for node, wanted in zip(chosen, gold, strict=True))
    return _share(subject, task, "accuracy", right, len(gold))


def side_scores(task: str, decisions: Sequence[Decision], examples: Sequence[Example]) -> list[Score]:
    """Share of decisions the router made without falling back; of rewritten queries, words kept."""
    made = sum(not decision.fallback for decision in decisions)
    scores = [_share("result", task, "parse rate", made, len(decisions))]
    pairs = zip(decisions, examples, strict=True)
    kept = [_kept(decision) for decision, example in pairs if example.rewritten]
    if kept:
        low, high = bootstrap_mean(np.array(kept))
        mean = float(np.mean(kept))
        scores.append(
            Score(
                subject="result",
                task=task,
                metric="words kept",
                value=mean,
                n=len(kept),
                low=low,
                high=high,
            )
        )
    return scores


def reference_scores(router: Router, task: str, examples: Sequence[Example], seed: int) -> list[Score]:
    """What a router must beat: a node at random, and words shared with the descriptions."""
    nodes, gold = router.card.nodes, [example.node for example in examples]
    picked = random.Random(seed).choices(nodes, k=len(gold))
    scores = [accuracy("random", task, picked, gold)]
    if router.card.method != "route/keyword":
        keyword = KeywordRouter(router.card, router.graph, 0.0)
        decisions = keyword.route_all([example.query for example in examples])
        scores.append(accuracy("keyword", task, [decision.worker for decision in decisions], gold))
    return scores


def _kept(decision: Decision) -> float:
    """Share of the query's words that the rewritten query still has."""
    asked = words(decision.asked)
    return len(asked & words(decision.query)) / len(asked) if asked else 1.0


def _share(subject: str, task: str, metric: str, count: int, n: int) -> Score:
    low, high = wilson(count, n)
    return Score(subject=subject, task=task, metric=metric, value=count / n, n=n, low=low, high=high)


def confusion(task: str, decisions: Sequence[Decision], gold: Sequence[str], nodes: Sequence[str]) -> Table:
    """Queries of each node (rows) by where they went (columns)."""
    columns = list(dict.fromkeys([*nodes, *(decision.worker for decision in decisions)]))
    counts = {node: dict.fromkeys(columns, 0) for node in nodes}
    for decision, wanted in zip(decisions, gold, strict=True):
        counts[wanted][decision.worker] += 1
    title = f"{task}: where the queries of each node went"
    return Table(
        title=title,
        columns=["belongs to", *columns],
        rows=[[node, *counts[node].values()] for node in nodes],
    )


def judge(scores: Sequence[Score], nodes: int) -> list[Finding]:
    """Findings on a router that is no better than chance, or hardly ever makes a decision."""
    findings = []
    by_key = {(s.task, s.subject, s.metric): s for s in scores}
    for task in dict.fromkeys(score.task for score in scores):
        result = by_key[task, "result", "accuracy"]
        if result.low <= 1 / nodes:
            text = (
                f"{task}: {result.value:.3f} of {result.n} queries went right, chance is {1 / nodes:.3f}."
            )
            findings.append(Finding(code="no-effect", severity="serious", about=task, message=text))
        made = by_key[task, "result", "parse rate"]
        if made.value < 0.5:
            text = f"{task}: only {made.value:.3f} of {made.n} queries got a decision; the rest fell back."
            findings.append(Finding(code="falls-back", severity="warning", about=task, message=text))
        keyword = by_key.get((task, "keyword", "accuracy"))
        if keyword and keyword.value >= result.value:
            text = (
                f"{task}: no better than counting words shared with the descriptions "
                f"({result.value:.3f} against {keyword.value:.3f})."
            )
            findings.append(
                Finding(code="no-better-than-keyword", severity="warning", about=task, message=text)
            )
    return findings
