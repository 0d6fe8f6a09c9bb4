"""What every router gives: a decision for each query, and the walk of a query through a graph.

A trained router is a folder with `router.json` (the card: method, settings, nodes, the graph) and
what its method needs besides. Nothing that a router or a worker says is ever executed.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from germane.core.chat import ChatModel, ChatSettings
from germane.core.errors import CheckpointError, SettingError, UnknownName
from germane.core.evidence import Step
from germane.core.settings import Settings, validate
from germane.method import Method, build
from germane.tasks.route._graph import Graph, parse_graph, read_graph

FILE_NAME = "router.json"


@dataclass(frozen=True)
class Example:
    """A query, the node it belongs to, and how it is put to that node (None: as it stands)."""

    query: str
    node: str
    rewritten: str | None = None


@dataclass(frozen=True)
class Guess:
    """What a method makes of a query, before threshold and fallback.

    Attributes:
        scores: A score between 0 and 1 for each node, in the order of the card's nodes.
        choice: Number of the node chosen, or None where there is none.
        rewritten: The query as the node should get it.
        output: What the router said, as it said it.
        fault: Why there is no choice.
    """

    scores: list[float]
    choice: int | None
    rewritten: str
    output: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Decision:
    """Where one master sends one query.

    Attributes:
        master: Who decided.
        worker: The node chosen: a worker, or the next master.
        score: The router's score of that node, between 0 and 1.
        query: The query as the node gets it.
        asked: The query as the master got it.
        scores: Node -> score, of every node the master knows.
        output: What the router said, token and argument, as it said it.
        fallback: Why the default worker was taken, or "".
    """

    master: str
    worker: str
    score: float
    query: str
    asked: str
    scores: dict[str, float]
    output: str = ""
    fallback: str = ""


@dataclass(frozen=True)
class Answer:
    """What became of a query.

    Attributes:
        query: The query as it was asked.
        worker: Who answered.
        rewritten: The query as the worker got it.
        text: The answer, or None where none was asked for.
        score: Product of the scores on the way.
        path: Every decision, in order.
        stopped: "worker" when a worker was reached, "step limit" when the default worker had to answer.
    """

    query: str
    worker: str
    rewritten: str
    text: str | None
    score: float
    path: list[Decision]
    stopped: str = "worker"


class Card(Settings):
    """What `router.json` says."""

    method: str = Field(description="the method that trained the router")
    settings: dict[str, Any] = Field(description="the method's settings")
    master: str = Field(description="the master of the graph it is")
    nodes: list[str] = Field(description="the nodes it knows, in the order of their tokens or scores")
    max_steps: int = Field(description="longest walk through the graph")
    graph: dict[str, Any] = Field(description="the whole graph")

    @property
    def pool(self) -> Graph:
        """The graph, checked."""
        return parse_graph(self.graph, FILE_NAME)


@dataclass(frozen=True)
class Training:
    """What a method gets to train a router.

    Attributes:
        card: What the router will say of itself; its nodes are what the router must know.
        graph: The pool it will route in.
        examples: Labelled queries; none for methods that learn nothing.
        folder: Where the method leaves what `open` needs; exists and holds nothing of it.
        step: Takes what there is to say.
        seed: Of everything random.
    """

    card: Card
    graph: Graph
    examples: Sequence[Example]
    folder: Path
    step: Step
    seed: int


class RouteMethod(Method):
    """Base of the ways to route: a method trains a router, and opens one it has trained."""

    threshold: float = Field(
        default=0.0, ge=0, le=1, description="below this score the default worker gets the query"
    )

    @property
    def needs_examples(self) -> bool:
        """Whether it cannot do without labelled queries."""
        return "labels" in self.information.needs

    def prepare(self) -> None:
        """Raise a `GermaneError` for a model or library that is not there."""

    @abstractmethod
    def train(self, training: Training) -> Router:
        """Make a router, and leave in its folder what `open` needs."""

    @abstractmethod
    def open(self, card: Card, graph: Graph, folder: Path) -> Router:
        """The router that `train` left in `folder`."""


class Router(ABC):
    """A trained router.

    Attributes:
        card: What it is.
        graph: The pool it routes in.
        threshold: Below this score the default worker gets the query.
        batch_size: Queries at a time.
    """

    batch_size: int = 32

    def __init__(self, card: Card, graph: Graph, threshold: float) -> None:
        self.card = card
        self.graph = graph
        self.threshold = threshold

    @abstractmethod
    def guess(self, queries: Sequence[str]) -> list[Guess]:
        """What the method makes of each query of one batch."""

    def route(self, query: str) -> Decision:
        """Where one query goes: always a node of the pool, with its score."""
        return self.route_all([query])[0]

    def route_all(self, queries: Sequence[str]) -> list[Decision]:
        """Where each query goes; batches are made of queries of like length."""
        order = sorted(range(len(queries)), key=lambda index: len(queries[index]))
        found: dict[int, Decision] = {}
        for start in range(0, len(order), self.batch_size):
            picked = order[start : start + self.batch_size]
            guesses = self.guess([queries[index] for index in picked])
            for index, guess in zip(picked, guesses, strict=True):
                found[index] = self._decide(queries[index], guess)
        return [found[index] for index in range(len(queries))]

    def _decide(self, query: str, guess: Guess) -> Decision:
        """The guess, or the default worker with the untouched query where the guess is no good."""
        scores = dict(zip(self.card.nodes, guess.scores, strict=True))
        fault = guess.fault
        if guess.choice is not None and not fault:
            score = guess.scores[guess.choice]
            if score >= self.threshold:
                node = self.card.nodes[guess.choice]
                return Decision(self.card.master, node, score, guess.rewritten, query, scores, guess.output)
            fault = f"score {score:.3f} is below the threshold {self.threshold:g}"
        node = self.graph.default
        return Decision(
            self.card.master, node, scores.get(node, 0.0), query, query, scores, guess.output,
            fault or "no node fits",
        )  # fmt: skip


def load_router(folder: str | os.PathLike[str], graph: str | os.PathLike[str] = "") -> Router:
    """A trained router from its folder.

    Args:
        folder: What `germane route` wrote.
        graph: A graph to use instead of the one it was trained in; it must have the same nodes at
            the router's master.

    Raises:
        CheckpointError: No router there.
        SettingError: The graph does not fit.
    """
    place = Path(folder)
    try:
        content = json.loads((place / FILE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{place}: has no {FILE_NAME}; is it what `germane route` wrote?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place / FILE_NAME}: cannot be read: {error}") from None
    card = validate(Card, content, FILE_NAME)
    pool = read_graph(graph) if graph else card.pool
    _check_fit(card, pool, str(graph or place))
    method = build(card.method, card.settings)
    if not isinstance(method, RouteMethod):
        raise UnknownName(f"{place / FILE_NAME}: {card.method} does not route.")
    return method.open(card, pool, place)


def _check_fit(card: Card, graph: Graph, where: str) -> None:
    master = graph.masters.get(card.master)
    if master is None or sorted(master.neighbours) != sorted(card.nodes):
        raise SettingError(
            f"{where}: the router was trained as master {card.master!r} of {', '.join(card.nodes)}, "
            "and the graph has no such master; train the router again, or mend the graph."
        )


def save_card(card: Card, folder: Path) -> None:
    """Write `router.json`."""
    text = json.dumps(card.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


@dataclass
class Network:
    """A graph ready to be asked: its routers and workers are loaded when first needed, and kept.

    Attributes:
        router: The router of the master where walks begin.
        max_steps: Longest walk; then the default worker answers.
        settings: How workers generate.
    """

    router: Router
    max_steps: int
    settings: ChatSettings = field(default_factory=ChatSettings)
    _routers: dict[str, Router] = field(default_factory=dict)
    _workers: dict[str, ChatModel] = field(default_factory=dict)

    def ask(self, query: str, generate: bool = True) -> Answer:
        """Walk a query to its worker and let that worker answer."""
        answer = self.walk(query)
        if not generate:
            return answer
        messages = [{"role": "user", "content": answer.rewritten}]
        worker = self.router.graph.workers[answer.worker]
        if worker.system:
            messages.insert(0, {"role": "system", "content": worker.system})
        reply = self.worker(answer.worker).answer([messages], self.settings)[0]
        return replace(answer, text=reply.text)

    def walk(self, query: str) -> Answer:
        """From master to master until a worker is reached, or the limit of steps."""
        graph = self.router.graph
        path: list[Decision] = []
        node, text = self.router.card.master, query
        while node in graph.masters and len(path) < self.max_steps:
            path.append(self.master(node).route(text))
            node, text = path[-1].worker, path[-1].query
        stopped = "worker" if node in graph.workers else "step limit"
        if node not in graph.workers:
            node, text = graph.default, query
        score = math.prod(decision.score for decision in path)
        return Answer(query, node, text, None, score, path, stopped)

    def master(self, name: str) -> Router:
        """The router of a master."""
        if name == self.router.card.master:
            return self.router
        if name not in self._routers:
            folder = self.router.graph.masters[name].router
            if not folder:
                raise SettingError(f"masters.{name}: has no `router`; train one with --master {name}.")
            router = load_router(folder)
            if router.card.master != name:
                raise SettingError(
                    f"masters.{name}.router: {folder} was trained as {router.card.master!r}."
                )
            router.graph = self.router.graph
            _check_fit(router.card, router.graph, folder)
            self._routers[name] = router
        return self._routers[name]

    def worker(self, name: str) -> ChatModel:
        """The model of a worker."""
        if name not in self._workers:
            self._workers[name] = self.router.graph.workers[name].chat(name)
        return self._workers[name]


def open_network(
    router: str | os.PathLike[str] | Router,
    graph: str | os.PathLike[str] = "",
    max_steps: int | None = None,
    settings: ChatSettings | None = None,
) -> Network:
    """A graph ready to be asked many times; see `ask` for the arguments."""
    opened = router if isinstance(router, Router) else load_router(router, graph)
    limit = opened.card.max_steps if max_steps is None else max_steps
    if limit < 1:
        raise SettingError(f"max_steps: must be at least 1; got {limit}.")
    return Network(opened, limit, settings or ChatSettings())


def ask(
    router: str | os.PathLike[str] | Router,
    query: str,
    *,
    graph: str | os.PathLike[str] = "",
    max_steps: int | None = None,
    generate: bool = True,
    settings: ChatSettings | None = None,
) -> Answer:
    """Send a query through the graph, and let the worker it reaches answer.

    Args:
        router: Folder of the router that gets the query first, or the router itself.
        query: What is asked.
        graph: A graph to use instead of the one the router was trained in.
        max_steps: Longest walk; default: what the router was trained with.
        generate: Whether the worker answers; else only the way is found.
        settings: How the worker generates.

    Returns:
        The answer, with every decision on the way: token, score and rewritten query.

    Raises:
        GermaneError: A router, graph or worker that is not there; a server that does not answer.
    """
    network = open_network(router, graph, max_steps, settings)
    if generate:
        network.router.graph.require_models()
    return network.ask(query, generate)
