"""Walks through a graph: over several masters, up to the limit, to a worker that answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from parts import TOPICS, Places, query_rows, train, written
from servers import ChatServer

from germane.core.errors import CheckpointError, SettingError
from germane.recipe import run_task
from germane.tasks.route import ask, load_router
from germane.tasks.route._graph import Graph, parse_graph
from germane.tasks.route._router import Card, Guess, Network, Router, open_network

TWO = {
    "workers": {"law": {"description": "courts"}, "maths": {"description": "sums"}},
    "masters": {
        "top": {"neighbours": ["law", "low"], "description": "all"},
        "low": {"neighbours": ["maths", "top"], "description": "sciences"},
    },
}


class Fixed(Router):
    """Sends every query to one node, with one score, and marks it."""

    def __init__(self, graph: Graph, master: str, node: str, score: float, threshold: float = 0.0) -> None:
        nodes = graph.masters[master].neighbours
        card = Card(
            method="x", settings={}, master=master, nodes=nodes, max_steps=8, graph=graph.model_dump()
        )
        super().__init__(card, graph, threshold)
        self.choice, self.score = nodes.index(node), score

    def guess(self, queries: Sequence[str]) -> list[Guess]:
        scores = [0.0] * len(self.card.nodes)
        scores[self.choice] = self.score
        return [Guess(scores, self.choice, f"{query}+{self.card.master}") for query in queries]


def network(top: str, low: str, max_steps: int = 8) -> Network:
    graph = parse_graph(TWO, "g")
    routers = {"top": Fixed(graph, "top", top, 0.5), "low": Fixed(graph, "low", low, 0.25)}
    return Network(routers["top"], max_steps, _routers=routers)


def test_two_masters_on_the_way_to_a_worker():
    answer = network("low", "maths").walk("q")
    assert (answer.worker, answer.rewritten, answer.score) == ("maths", "q+top+low", 0.125)
    assert [(d.master, d.worker, d.asked) for d in answer.path] == [
        ("top", "low", "q"),
        ("low", "maths", "q+top"),
    ]
    assert answer.stopped == "worker"


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_cycle_stops_at_the_step_limit(limit: int):
    answer = network("low", "top", limit).walk("q")
    assert len(answer.path) == limit
    assert (answer.worker, answer.rewritten, answer.stopped) == ("law", "q", "step limit")


def test_below_the_threshold_the_default_worker_gets_the_untouched_query():
    decision = Fixed(parse_graph(TWO, "g"), "top", "low", 0.4, threshold=0.5).route("q")
    assert (decision.worker, decision.query, decision.score) == ("law", "q", 0.0)
    assert decision.fallback == "score 0.400 is below the threshold 0.5"
    assert decision.scores == {"law": 0.0, "low": 0.4}


def test_order_is_kept_over_batches():
    router = Fixed(parse_graph(TWO, "g"), "top", "law", 1.0)
    router.batch_size = 2
    queries = ["ccc", "a", "bb", "dddd", ""]
    assert [d.query for d in router.route_all(queries)] == [f"{q}+top" for q in queries]
    assert router.route_all([]) == []


def test_a_limit_of_no_steps_is_refused():
    with pytest.raises(SettingError, match="max_steps: must be at least 1"):
        open_network(Fixed(parse_graph(TWO, "g"), "top", "law", 1.0), max_steps=0)


@pytest.fixture(scope="module")
def keyword(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("keyword") / "router"
    train(places, "keyword", out)
    return out


def test_a_worker_without_a_model_is_named_before_anything_is_asked(keyword: Path):
    with pytest.raises(SettingError, match=r"workers.red: has no model"):
        ask(keyword, "w1")
    assert ask(keyword, "w11 w12", generate=False).worker == "green"


def with_endpoints(server: ChatServer) -> dict[str, Any]:
    workers = {
        name: {
            "description": " ".join(words),
            "endpoint": server.url,
            "model": name,
            "system": f"You are {name}.",
        }
        for name, words in TOPICS.items()
    }
    return {"workers": workers}


def test_the_worker_answers_the_rewritten_query(keyword: Path, server: ChatServer, tmp_path: Path):
    graph = written(tmp_path, with_endpoints(server))
    answer = ask(keyword, "w21 w9", graph=graph)
    assert (answer.worker, answer.text) == ("blue", "blue: w21 w9")
    assert server.requests[0]["messages"] == [
        {"role": "system", "content": "You are blue."},
        {"role": "user", "content": "w21 w9"},
    ]


def test_with_look_up_workers_answers_are_as_right_as_routing(
    keyword: Path, server: ChatServer, tmp_path: Path
):
    """Each worker answers only its own queries: the whole is right as often as the routing is."""
    rows = query_rows(4, 0)
    known = {row["text"]: row["label"] for row in rows}

    def look_up(request: dict[str, Any]) -> str:
        query = request["messages"][-1]["content"]
        return "right" if known[query] == request["model"] else "wrong"

    server.answer = look_up
    found = open_network(keyword, written(tmp_path, with_endpoints(server)))
    # One query in four is spoilt: its topic words are gone, so that it goes to the default worker.
    asked = [row["text"] if n % 4 else f"w{50 + n}" for n, row in enumerate(rows)]
    known |= {query: row["label"] for query, row in zip(asked, rows, strict=True)}
    answers = [found.ask(query) for query in asked]
    routed = sum(a.worker == known[q] for a, q in zip(answers, asked, strict=True))
    assert 0 < sum(answer.text == "right" for answer in answers) == routed < len(rows)
    single = sum(label == "red" for label in known.values())
    assert routed > single / 2


def test_trained_routers_one_behind_the_other(places: Places, tmp_path: Path):
    workers = {name: {"description": " ".join(words)} for name, words in TOPICS.items()}
    masters: dict[str, Any] = {
        "top": {"neighbours": ["red", "low"]},
        "low": {"description": "w11 w12 w13 w21 w22 w23", "neighbours": ["green", "blue"]},
    }
    graph = written(tmp_path, {"workers": workers, "masters": masters})
    for master in masters:
        arguments = {"graph": str(graph), "master": master}
        run_task("route", "keyword", arguments, {}, tmp_path / master)
    with pytest.raises(SettingError, match=r"masters.low: has no `router`; train one with --master low"):
        ask(tmp_path / "top", "w21 w22", generate=False)
    masters["low"]["router"] = "low"
    graph = written(tmp_path, {"workers": workers, "masters": masters})
    answer = ask(tmp_path / "top", "w21 w22", graph=graph, generate=False)
    assert [decision.worker for decision in answer.path] == ["low", "blue"]
    masters["low"]["router"] = "top"
    graph = written(tmp_path, {"workers": workers, "masters": masters})
    with pytest.raises(SettingError, match="was trained as 'top'"):
        ask(tmp_path / "top", "w21 w22", graph=graph, generate=False)


def test_a_folder_that_is_no_router(tmp_path: Path, keyword: Path):
    with pytest.raises(CheckpointError, match=r"has no router.json; is it what `germane route` wrote\?"):
        load_router(tmp_path)
    other = written(tmp_path, {"workers": {"red": {"description": "r"}, "grey": {"description": "g"}}})
    with pytest.raises(SettingError, match="trained as master 'router' of red, green, blue"):
        load_router(keyword, other)
    (tmp_path / "router.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_router(tmp_path)
