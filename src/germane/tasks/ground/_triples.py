"""Queries as S-expressions, on triples in memory.

    ( JOIN relation set )       what has the relation to something in the set
    ( JOIN ( R relation ) set ) what something in the set has the relation to
    ( AND set set )             what is in both
    ( COUNT set )               how many there are
    ( ARGMAX set relation )     those in the set with the largest value of the relation; ARGMIN the smallest
    ( LT relation [value] )     what has a smaller value of the relation; LE, GT and GE likewise

Names of entities and relations stand in square brackets, as in `( JOIN ( R [place of birth] ) [Ada] )`;
a set may be one entity, and ( JOIN relation relation ) is one relation after the other. Text becomes a
tree by this grammar alone; nothing in it is run.
"""

from __future__ import annotations

import heapq
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from germane.core.embedding import Encoder
from germane.core.errors import RecordsError
from germane.core.records import Data, open_rows

Pairs = set[tuple[str, str]]
Found = frozenset[str]
_TOKEN = re.compile(r"\s*(?:(?P<mark>[()])|\[(?P<name>[^\[\]]*)\]|(?P<word>[A-Za-z]+))")
_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge,
}  # fmt: skip
_VALUE = re.compile(r"(-?\d+(?:\.\d+)?)(?:-(\d\d))?(?:-(\d\d))?$")
_DEEPEST = 32


class QueryError(Exception):
    """A text is no query."""


@dataclass(frozen=True)
class Name:
    """A name in a query; its kind is "entity", "relation" or "value"."""

    kind: str
    text: str


@dataclass(frozen=True)
class Call:
    """An operation with its arguments."""

    word: str
    parts: tuple[Node, ...]


Node = Name | Call


@dataclass
class Triples:
    """Facts: subject, relation, object.

    Attributes:
        relations: Name -> its pairs of subject and object.
        names: Kind -> name without case and spare blanks -> name.
    """

    relations: dict[str, Pairs] = field(default_factory=lambda: defaultdict(set))
    names: dict[str, dict[str, str]] = field(default_factory=lambda: {"entity": {}, "relation": {}})

    @classmethod
    def read(cls, path: str) -> Triples:
        """The facts of a file of records with `subject`, `relation` and `object`.

        Raises:
            RecordsError: A record lacks one of them.
        """
        made = cls()
        for number, row in enumerate(open_rows(Data(name="triples", path=path)), 1):
            parts = [str(row.get(name) or "").strip() for name in ("subject", "relation", "object")]
            if not all(parts):
                raise RecordsError(
                    f"{path}, record {number}: needs 'subject', 'relation' and 'object'. "
                    f"Fields: {', '.join(row)}."
                )
            made.add(*parts)
        return made

    def add(self, subject: str, relation: str, target: str) -> None:
        """Another fact."""
        self.relations[relation].add((subject, target))
        self.names["relation"].setdefault(plain(relation), relation)
        for entity in (subject, target):
            self.names["entity"].setdefault(plain(entity), entity)

    def find(self, query: Node) -> Found:
        """What a query asks for; the count of nothing is nothing."""
        if isinstance(query, Name):
            known = self.names["entity"].get(plain(query.text))
            return frozenset() if known is None else frozenset([known])
        if query.word == "JOIN":
            wanted = self.find(query.parts[1])
            return frozenset(left for left, right in self.pairs(query.parts[0]) if right in wanted)
        if query.word == "AND":
            return self.find(query.parts[0]) & self.find(query.parts[1])
        if query.word == "COUNT":
            found = self.find(query.parts[0])
            return frozenset([str(len(found))] if found else [])
        if query.word in _COMPARISONS:
            return self._compare(query)
        return self._extreme(query)

    def pairs(self, relation: Node) -> Pairs:
        """The pairs that a relation, its reverse, or one after the other hold between."""
        if isinstance(relation, Name):
            known = self.names["relation"].get(plain(relation.text), relation.text)
            return self.relations.get(known, set())
        if relation.word == "R":
            return {(right, left) for left, right in self.pairs(relation.parts[0])}
        after = defaultdict(set)
        for left, right in self.pairs(relation.parts[1]):
            after[left].add(right)
        return {(left, end) for left, right in self.pairs(relation.parts[0]) for end in after[right]}

    def _compare(self, query: Call) -> Found:
        relation, limit = query.parts
        assert isinstance(limit, Name)
        border, holds = value(limit.text), _COMPARISONS[query.word]
        if border is None:
            return frozenset()
        pairs = ((left, value(right)) for left, right in self.pairs(relation))
        return frozenset(left for left, known in pairs if known is not None and holds(known, border))

    def _extreme(self, query: Call) -> Found:
        among = self.find(query.parts[0])
        pairs = [(left, value(right)) for left, right in self.pairs(query.parts[1]) if left in among]
        known = [(left, number) for left, number in pairs if number is not None]
        if not known:
            return frozenset()
        best = (max if query.word == "ARGMAX" else min)(number for _, number in known)
        return frozenset(left for left, number in known if number == best)


def plain(name: str) -> str:
    """A name without case and spare blanks."""
    return " ".join(name.casefold().split())


def value(text: str) -> tuple[float, int, int] | None:
    """A number, year or date as what can be compared; None for other texts."""
    found = _VALUE.match(text.strip())
    return None if found is None else (float(found[1]), int(found[2] or 0), int(found[3] or 0))


def parse(text: str) -> Node:
    """The query of a text.

    Raises:
        QueryError: With what is wrong.
    """
    parser = _Parser(_tokens(text))
    query = parser.set(0)
    if parser.tokens:
        raise QueryError(f"has more after its end: {parser.tokens[0][1]!r}")
    return query


def _tokens(text: str) -> list[tuple[str, str]]:
    found, place, text = [], 0, text.strip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise QueryError(f"cannot be read from {text[place : place + 20]!r} on")
        found.append((str(match.lastgroup), str(match[str(match.lastgroup)]).strip()))
        place = match.end()
    return found


@dataclass
class _Parser:
    """Recursive descent over the tokens that are left."""

    tokens: list[tuple[str, str]]

    def set(self, depth: int) -> Node:
        """A set: an entity, or an operation that gives one."""
        if self._is_name():
            return Name("entity", self._take("name"))
        word = self._open(depth)
        if word == "JOIN":
            parts = (self.relation(depth + 1), self.set(depth + 1))
        elif word == "AND":
            parts = (self.set(depth + 1), self.set(depth + 1))
        elif word in ("ARGMAX", "ARGMIN"):
            parts = (self.set(depth + 1), self.relation(depth + 1))
        elif word in _COMPARISONS:
            parts = (self.relation(depth + 1), Name("value", self._take("name")))
        elif word == "COUNT":
            return self._close(Call(word, (self.set(depth + 1),)))
        else:
            raise QueryError(f"{word!r} is no operation on sets")
        return self._close(Call(word, parts))

    def relation(self, depth: int) -> Node:
        """A relation: its name, R, or JOIN of two."""
        if self._is_name():
            return Name("relation", self._take("name"))
        word = self._open(depth)
        if word == "R":
            return self._close(Call(word, (self.relation(depth + 1),)))
        if word == "JOIN":
            return self._close(Call(word, (self.relation(depth + 1), self.relation(depth + 1))))
        raise QueryError(f"{word!r} is no operation on relations")

    def _is_name(self) -> bool:
        return bool(self.tokens) and self.tokens[0][0] == "name"

    def _open(self, depth: int) -> str:
        if depth > _DEEPEST:
            raise QueryError("is too deep")
        if self._take("mark") != "(":
            raise QueryError("has a bracket too many")
        return self._take("word").upper()

    def _close(self, call: Call) -> Call:
        if self._take("mark") != ")":
            raise QueryError(f"{call.word} has too many parts")
        return call

    def _take(self, kind: str) -> str:
        if not self.tokens or self.tokens[0][0] != kind:
            raise QueryError(f"lacks a {kind}" + (f" before {self.tokens[0][1]!r}" if self.tokens else ""))
        return self.tokens.pop(0)[1]


def written(query: Node) -> str:
    """The text of a query."""
    if isinstance(query, Name):
        return f"[{query.text}]"
    return f"( {' '.join([query.word, *map(written, query.parts)])} )"


def names_in(query: Node) -> Iterator[Name]:
    """The names in a query, in their order, values left out."""
    if isinstance(query, Call):
        for part in query.parts:
            yield from names_in(part)
    elif query.kind != "value":
        yield query


def renamed(query: Node, names: Iterator[str]) -> Node:
    """The query with other names, in their order."""
    if isinstance(query, Call):
        return Call(query.word, tuple([renamed(part, names) for part in query.parts]))
    return query if query.kind == "value" else Name(query.kind, next(names))


@dataclass
class Answering:
    """Texts that may be queries, answered from triples.

    Attributes:
        triples: The facts.
        encoder: Says how alike two names are.
        alternatives: Names that are tried in the place of one.
        limit: Queries that are tried for one text.
    """

    triples: Triples
    encoder: Encoder
    alternatives: int
    limit: int
    _alike: dict[Name, list[tuple[float, str]]] = field(default_factory=dict)
    _vectors: dict[str, Any] = field(default_factory=dict)

    def first(self, texts: Sequence[str]) -> tuple[str, Found]:
        """The first query that finds something, as it is or else with names that are alike.

        Returns:
            It and what it finds; two empty values where none finds anything.
        """
        queries = [query for query in map(_parsed, texts) if query is not None]
        for tried in (lambda query: [query], self.candidates):
            for query in queries:
                for candidate in tried(query):
                    found = self.triples.find(candidate)
                    if found:
                        return written(candidate), found
        return "", frozenset()

    def candidates(self, query: Node) -> Iterator[Node]:
        """The query with names that are known, those most alike in sum first, at most `limit`."""
        choices = [self.alike(name) for name in names_in(query)]
        first = tuple(0 for _ in choices)
        waiting, seen = [(-_likeness(choices, first), first)], {first}
        for _ in range(self.limit):
            if not waiting:
                return
            _, places = heapq.heappop(waiting)
            yield renamed(query, iter([c[place][1] for c, place in zip(choices, places, strict=True)]))
            for slot, place in enumerate(places):
                following = (*places[:slot], place + 1, *places[slot + 1 :])
                if place + 1 < len(choices[slot]) and following not in seen:
                    seen.add(following)
                    heapq.heappush(waiting, (-_likeness(choices, following), following))

    def alike(self, name: Name) -> list[tuple[float, str]]:
        """Known names of the same kind with their cosine, the most alike first."""
        if name not in self._alike:
            known = sorted(self.triples.names[name.kind].values())
            if name.kind not in self._vectors:
                self._vectors[name.kind] = self.encoder(known)
            likeness = (self._vectors[name.kind] @ self.encoder([name.text])[0]).tolist()
            exact = self.triples.names[name.kind].get(plain(name.text))
            pairs = [
                (2.0 if text == exact else like, text) for like, text in zip(likeness, known, strict=True)
            ]
            self._alike[name] = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[: self.alternatives]
        return self._alike[name]


def _likeness(choices: Sequence[Sequence[tuple[float, str]]], places: Sequence[int]) -> float:
    return sum(choice[place][0] for choice, place in zip(choices, places, strict=True))


def _parsed(text: str) -> Node | None:
    try:
        return parse(text)
    except QueryError:
        return None
