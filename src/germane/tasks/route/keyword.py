"""Route by the words a query shares with a description."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from germane.method import method
from germane.tasks.route._graph import Graph
from germane.tasks.route._router import Card, Guess, RouteMethod, Router, Training

_WORD = re.compile(r"[^\W_]+")
# English words that say nothing of a topic.
_EMPTY_TEXT = """a about all also am an and any are as at be been but by can could did do does for from had
    has have he her him his how i if in into is it its just like me more my no not of on one or other our
    out s she should so some t than that the their them then there these they this to up us was we
    were what when where which who why will with would you your"""
_EMPTY = frozenset(_EMPTY_TEXT.split())


@method("route/keyword")
class Keyword(RouteMethod):
    """Send a query to the node whose description has most of its words.

    The score of a node is the share of the query's different words, empty words like "the" left
    out, that its description has; of equal nodes the first in the graph is taken. Learns nothing.

    It has no paper: it is the baseline that a router must beat to be worth its training.

    Use it when descriptions are rich and queries use their very words, or as the baseline.
    Not when queries are put in other words than the descriptions.
    """

    def train(self, training: Training) -> Router:
        return self.open(training.card, training.graph, training.folder)

    def open(self, card: Card, graph: Graph, folder: Path) -> Router:
        return KeywordRouter(card, graph, self.threshold)


class KeywordRouter(Router):
    """Word overlap with the descriptions of the nodes."""

    def __init__(self, card: Card, graph: Graph, threshold: float) -> None:
        super().__init__(card, graph, threshold)
        self._words = [words(graph.description(node)) for node in card.nodes]

    def guess(self, queries: Sequence[str]) -> list[Guess]:
        return [self._guess(query) for query in queries]

    def _guess(self, query: str) -> Guess:
        scores = [overlap(words(query), known) for known in self._words]
        if not any(scores):
            return Guess(scores, None, query, fault="no word of it is in any description")
        return Guess(scores, scores.index(max(scores)), query)


def words(text: str) -> set[str]:
    """The different words of a text in lower case, without empty ones."""
    return set(_WORD.findall(text.lower())) - _EMPTY


def overlap(query: set[str], known: set[str]) -> float:
    """Share of the query's words that are known."""
    return len(query & known) / len(query) if query else 0.0
