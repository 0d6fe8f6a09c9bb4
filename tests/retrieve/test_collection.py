"""Collections in BEIR's form: read, and made of 20 Newsgroups."""

from __future__ import annotations

import json

import pytest
import zoo

from germane.core.errors import RecordsError
from germane.core.records import Data
from germane.embedded import passages
from germane.tasks.retrieve._collection import (
    passage_ids,
    read_judgements,
    read_queries,
    stream_passages,
)


def test_both_forms_of_judgements_say_the_same(tmp_path):
    (tmp_path / "beir.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n\nq2\td1\t1\n")
    (tmp_path / "trec.txt").write_text("q1 0 d1 2\nq1 0 d2 0\nq2 0 d1 1\n")
    expected = {"q1": {"d1": 2, "d2": 0}, "q2": {"d1": 1}}
    assert read_judgements(str(tmp_path / "beir.tsv")) == expected
    assert read_judgements(str(tmp_path / "trec.txt")) == expected
    with pytest.raises(RecordsError, match="cannot be read"):
        read_judgements(str(tmp_path / "none.tsv"))


def test_passages_come_from_jsonl_and_parquet_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"_id": "1", "title": "t", "text": "a b"}, {"_id": "2", "title": None, "text": "c"}]
    zoo.write_rows(tmp_path / "c.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    read = [list(stream_passages(str(tmp_path / name))) for name in ("c.jsonl", "c.parquet")]
    assert read[0] == read[1]
    assert [(p.id, p.title, p.whole) for p in read[0]] == [("1", "t", "t a b"), ("2", "", "c")]


def test_a_fault_is_met_only_when_its_record_is_reached(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text('{"_id": "1", "text": "a"}\n{"_id": 2, "text": "b"}\n{"_id": "3"}\n')
    stream = stream_passages(str(file))
    assert [next(stream).id, next(stream).id] == ["1", "2"]
    with pytest.raises(RecordsError, match=r"record 3: has no text in field 'text'"):
        next(stream)
    with pytest.raises(RecordsError, match="record 3"):
        passage_ids(str(file))


def test_queries_may_be_limited_and_have_their_text_elsewhere(tmp_path):
    file = zoo.write_rows(tmp_path / "q.jsonl", [{"_id": f"q{n}", "claim": f"w{n}"} for n in range(4)])
    found = read_queries(Data(name="q", path=str(file), text="claim", limit=2))
    assert [(query.id, query.text) for query in found] == [("q0", "w0"), ("q1", "w1")]


def test_newsgroups_become_a_collection_whose_queries_open_their_passages(tmp_path):
    made = passages.write(tmp_path, passages=300, queries=40, seed=2)
    corpus = {passage.id: passage for passage in stream_passages(str(made.corpus))}
    queries = read_queries(Data(name="queries", path=str(made.queries)))
    judgements = read_judgements(str(made.qrels))
    assert len(corpus) == 300
    assert [query.id for query in queries] == list(judgements)
    assert {name for found in judgements.values() for name in found} <= set(corpus)
    assert all(len(query.text.split()) == 6 for query in queries)
    assert not any(corpus[p].text.startswith(q.text) for q in queries for p in judgements[q.id])
    assert all("." in passage.title or passage.title for passage in corpus.values())
    again = passages.write(tmp_path / "again", passages=300, queries=40, seed=2)
    assert again.queries.read_text() == made.queries.read_text()
    assert json.loads(made.corpus.read_text().splitlines()[0]).keys() == {"_id", "title", "text"}
