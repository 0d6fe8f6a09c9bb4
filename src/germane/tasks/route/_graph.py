"""A pool as a graph: workers that answer, masters that send a query on to a neighbour.

A graph is a YAML or JSON file, data only:

    workers:
      law:     {description: Contracts, courts and statutes., model: models/law}
      maths:   {description: Proofs and sums., endpoint: "http://localhost:8000/v1", model: maths-7b}
      general: {description: Everything else., model: smollm2}
    masters:                      # may be left out: then one master knows every worker
      start:    {neighbours: [law, sciences]}
      sciences: {description: Natural sciences and maths., router: routers/sciences, neighbours: [maths]}
    entry: start                  # default: the first master
    default: general              # who answers what no router can place; default: general, or the first

A master's neighbours are the graph's edges. A master may be another's neighbour, and a cycle is
allowed: a walk stops at its limit of steps.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from germane.core.chat import ChatModel
from germane.core.endpoint_chat import EndpointChat
from germane.core.errors import SettingError, nearest
from germane.core.local_chat import LocalChat
from germane.core.settings import Settings, validate
from germane.embedded import model_folder

ROOT = "router"
GENERAL = "general"


class Worker(Settings):
    """A model that answers."""

    description: str = Field(min_length=1, description="what it knows: routers without labels read this")
    model: str = Field(default="", description="a folder, a hub id, or the model's name at the endpoint")
    endpoint: str = Field(default="", description="address of an OpenAI-compatible server")
    key: str = Field(default="OPENAI_API_KEY", description="environment variable with the server's key")
    system: str = Field(default="", description="system message put before every query")

    def chat(self, name: str) -> ChatModel:
        """The model, local or at its endpoint."""
        if not self.model:
            raise SettingError(f"workers.{name}: has no model, so it cannot answer; give it `model`.")
        if self.endpoint:
            return EndpointChat(self.endpoint, self.model, key=self.key)
        return LocalChat.load(str(model_folder(self.model)))


class Master(Settings):
    """A router and the nodes that it knows."""

    neighbours: list[str] = Field(min_length=1, description="workers and masters it may send a query to")
    description: str = Field(default="", description="what lies behind it; needed where it is a neighbour")
    router: str = Field(default="", description="folder of its trained router")


class Graph(Settings):
    """Workers, masters and the edges between them."""

    workers: dict[str, Worker] = Field(min_length=1, description="name -> worker")
    masters: dict[str, Master] = Field(default={}, description="name -> master")
    entry: str = Field(default="", description="the master that gets a query first")
    default: str = Field(default="", description="the worker for what cannot be placed")

    @property
    def edges(self) -> list[tuple[str, str]]:
        """(master, neighbour) of every edge."""
        return [(name, other) for name, master in self.masters.items() for other in master.neighbours]

    def description(self, name: str) -> str:
        """What a node knows."""
        node = self.workers.get(name) or self.masters[name]
        return node.description

    def require_models(self) -> None:
        """Raise `SettingError` unless every worker has a model to answer with."""
        for name, worker in self.workers.items():
            if not worker.model:
                raise SettingError(f"workers.{name}: has no model, so it cannot answer; give it `model`.")


def read_graph(file: str | os.PathLike[str]) -> Graph:
    """A graph from a YAML or JSON file, checked whole.

    Folders that it names are looked for beside the file first, then in the working directory.

    Raises:
        SettingError: No such file, no YAML, or a graph that does not hang together.
    """
    path = Path(file).expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"{path}: no such graph.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingError(f"{path}: must hold a mapping with `workers`.")
    return parse_graph(_beside(content, path.absolute().parent), path.name)


def parse_graph(content: dict[str, Any], where: str) -> Graph:
    """A graph from plain values, with what was left out filled in.

    Raises:
        SettingError: With the path to what is wrong.
    """
    graph = validate(Graph, content, where)
    masters = graph.masters or {ROOT: Master(neighbours=list(graph.workers))}
    general = GENERAL if GENERAL in graph.workers else next(iter(graph.workers))
    graph = graph.model_copy(
        update={
            "masters": masters,
            "entry": graph.entry or next(iter(masters)),
            "default": graph.default or general,
        }
    )
    _check(graph, where)
    return graph


def _beside(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The content with the folders that lie beside the graph's file named in full."""
    named = {"workers": "model", "masters": "router"}
    changed = dict(content)
    for kind, key in named.items():
        nodes = content.get(kind)
        if isinstance(nodes, dict):
            changed[kind] = {name: _resolve(node, key, folder) for name, node in nodes.items()}
    return changed


def _resolve(node: Any, key: str, folder: Path) -> Any:
    value = node.get(key) if isinstance(node, dict) else None
    if not isinstance(value, str) or not value or node.get("endpoint"):
        return node
    place = folder / value
    return {**node, key: str(place)} if place.is_dir() else node


def _check(graph: Graph, where: str) -> None:
    nodes = [*graph.workers, *graph.masters]
    both = sorted(set(graph.workers) & set(graph.masters))
    if both:
        raise SettingError(f"{where}: {both[0]!r} is a worker and a master; name one of them otherwise.")
    for name in (name for name in nodes if not name.strip()):
        raise SettingError(f"{where}: a node is named {name!r}; give it a name.")
    for name, worker in graph.workers.items():
        if worker.endpoint and not worker.model:
            raise SettingError(f"{where}.workers.{name}: has an endpoint but no `model` to ask for there.")
    for name, master in graph.masters.items():
        _check_master(graph, name, master, nodes, where)
    if graph.entry not in graph.masters:
        raise SettingError(_unknown(f"{where}.entry", graph.entry, list(graph.masters), "master"))
    if graph.default not in graph.workers:
        raise SettingError(_unknown(f"{where}.default", graph.default, list(graph.workers), "worker"))
    _check_reach(graph, where)


def _check_master(graph: Graph, name: str, master: Master, nodes: list[str], where: str) -> None:
    place = f"{where}.masters.{name}.neighbours"
    for other in master.neighbours:
        if other not in nodes:
            raise SettingError(_unknown(place, other, nodes, "node"))
        if not graph.description(other):
            raise SettingError(
                f"{where}.masters.{other}: is a neighbour of {name!r}, so it needs a `description`."
            )
    if len(set(master.neighbours)) < len(master.neighbours):
        raise SettingError(f"{place}: names a node twice.")


def _check_reach(graph: Graph, where: str) -> None:
    """Every node can be reached from the entry, the default worker also by falling back."""
    reached, waiting = {graph.entry, graph.default}, [graph.entry]
    while waiting:
        master = graph.masters.get(waiting.pop())
        new = set(master.neighbours if master else ()) - reached
        reached |= new
        waiting += sorted(new)
    lost = [name for name in (*graph.workers, *graph.masters) if name not in reached]
    if lost:
        raise SettingError(
            f"{where}: {', '.join(lost)} cannot be reached from {graph.entry!r}; "
            "make each a neighbour of a master that can be reached, or leave it out."
        )


def _unknown(place: str, name: str, known: list[str], kind: str) -> str:
    return f"{place}: no {kind} {name!r}{nearest(name, known)} Known here: {', '.join(known)}."
