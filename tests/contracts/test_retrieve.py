"""What `germane/tasks/retrieve/_task.py` promises, held against every registered method."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import retrievers
import zoo

from germane import method as registry
from germane.core.errors import GermaneError, RecordsError, SettingError
from germane.recipe import Recipe, check, run, run_task
from germane.retrieval import Passage, Passages, load_index, make_index
from germane.tasks.retrieve._task import Retrieve

NAMES = registry.names("retrieve")
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return retrievers.make(tmp_path_factory.mktemp("collection"))


def retrieve(name: str, places, out: Path, **changes):
    arguments = places.arguments(**changes)
    return run_task("retrieve", name.split("/")[1], arguments, places.settings(name), out)


def check_one(name: str, places, **changes):
    step = {"task": "retrieve", "method": name.split("/")[1], "settings": places.settings(name)}
    check(Recipe(steps=[{**step, **places.arguments(**changes)}]))


@pytest.fixture(scope="module")
def results(places, tmp_path_factory):
    """Each method's result, made once."""
    made = {}

    def get(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name.replace("/", "-")) / "out"
            made[name] = retrieve(name, places, out)
        return made[name]

    return get


def hits_of(folder: Path) -> dict[str, list[str]]:
    rows = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return {row["_id"]: [hit["id"] for hit in row["hits"]] for row in rows}


@each
def test_scores_come_with_queries_and_interval(name, results):
    scores = [score for score in results(name).scores if score.subject == "result"]
    assert [score.metric for score in scores] == ["nDCG@10", "recall@10", "MRR@10", "MAP"]
    assert all(score.n == 8 and score.low <= score.value <= score.high for score in scores)


@each
def test_the_two_run_files_say_the_same(name, results):
    folder = results(name).folder
    lines = [line.split() for line in (folder / "run.trec").read_text().splitlines()]
    assert {line[5] for line in lines} == {name.split("/")[1]}
    for query, ids in hits_of(folder).items():
        mine = [line for line in lines if line[0] == query]
        assert [line[2] for line in mine] == ids
        assert [int(line[3]) for line in mine] == list(range(1, len(ids) + 1))
        scores = [(float(line[4]), line[2]) for line in mine]
        assert scores == sorted(scores, reverse=True)  # equal scores by id, as trec_eval has them


@each
def test_the_same_request_gives_the_same_ranking(name, places, results, tmp_path):
    again = retrieve(name, places, tmp_path / "out")
    assert (again.folder / "run.trec").read_bytes() == (results(name).folder / "run.trec").read_bytes()


@pytest.mark.parametrize(
    "names", [["retrieve/bm25"], pytest.param(NAMES, marks=pytest.mark.slow)], ids=["bm25", "all"]
)
def test_indexes_opened_in_another_process_rank_as_before(names, places, results):
    queries = [json.loads(line)["text"] for line in places.queries.read_text().splitlines()]
    folders = [str(results(name).folder) for name in names]
    program = (
        "import json, sys\n"
        "from germane.tasks.retrieve import load_index\n"
        "folders, queries = json.loads(sys.argv[1])\n"
        "found = [[[hit.id for hit in hits] for hits in load_index(f).search(queries, 10)] for f in folders]\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-c", program, json.dumps([folders, queries])]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
    for name, found in zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert found == list(hits_of(results(name).folder).values()), name


@each
def test_an_index_made_earlier_is_searched_again_and_not_copied(name, places, results, tmp_path):
    folder = results(name).folder
    again = retrieve(name, places, tmp_path / "out", corpus=str(folder))
    assert (again.folder / "run.trec").read_bytes() == (folder / "run.trec").read_bytes()
    assert {file.name for file in again.folder.iterdir()} == {
        "run.trec", "run.jsonl", "evidence.json", "report.html",
    }  # fmt: skip
    other = next(known for known in NAMES if known != name)
    with pytest.raises(SettingError, match=f"was made by {name}"):
        check_one(other, places, corpus=str(folder))


@each
def test_passages_are_read_as_they_come(name, places, tmp_path, monkeypatch):
    alive: set[int] = set()
    most = 0

    def watched(source):
        nonlocal most
        for number, passage in enumerate(source):
            fresh = Passage(passage.id, passage.title, passage.text)
            alive.add(number)
            weakref.finalize(fresh, alive.discard, number)
            most = max(most, len(alive))
            yield fresh
            del fresh

    rows = retrievers.passage_rows(300)
    source = (Passage(row["_id"], row["title"], row["text"]) for row in rows)
    plain = Passages.__iter__
    monkeypatch.setattr(Passages, "__iter__", lambda self: watched(plain(self)))
    retriever = registry.build(name, places.settings(name))
    make_index(retriever, watched(source), tmp_path)
    assert 0 < most <= 66  # of 300: sixteen batches of two, those before them, and the one in hand


@each
def test_equal_scores_come_by_id_at_every_depth(name, places, tmp_path):
    rows = [{"_id": f"d{n}", "title": "w1", "text": "w2 w3"} for n in (3, 1, 4, 0, 2)]
    zoo.write_rows(tmp_path / "corpus.jsonl", [*rows, {"_id": "x", "title": "", "text": "w9 w8"}])
    made = retrieve(name, places, tmp_path / "out", corpus=str(tmp_path / "corpus.jsonl"), qrels="")
    index = load_index(made.folder)
    whole = index.search(["w2"], 6)[0]
    pairs = [(hit.score, hit.id) for hit in whole]
    assert pairs == sorted(pairs, reverse=True)
    assert [hits.id for hits in index.search(["w2"], 3)[0]] == [hit.id for hit in whole][:3]
    if name == "retrieve/bm25":  # an encoder may give equal texts vectors that differ in the last bit
        assert [hit.id for hit in whole] == ["d4", "d3", "d2", "d1", "d0"]


@each
def test_a_passage_with_the_id_of_the_query_is_the_query_itself(name, places, tmp_path):
    queries = zoo.write_rows(tmp_path / "queries.jsonl", [{"_id": "d0", "text": retrievers.passage_rows(1)[0]["text"]}])  # fmt: skip
    made = retrieve(name, places, tmp_path / "out", queries=str(queries), qrels="", depth=5)
    found = hits_of(made.folder)["d0"]
    assert found
    assert "d0" not in found


@each
def test_without_queries_there_is_an_index_alone(name, places, tmp_path):
    made = retrieve(name, places, tmp_path / "out", queries=None, qrels="")
    assert not list(made.folder.glob("run.*"))
    hit = load_index(made.folder).search(["w1 w2 w3"], 1)[0][0]
    row = next(row for row in retrievers.passage_rows(40) if row["_id"] == hit.id)
    assert (hit.title, hit.text) == (row["title"], row["text"])


BAD_CORPORA = {
    "": "holds no records",
    '{"_id": "a", "txt": "w1"}': "record 1: has no text in field 'text'; did you mean 'txt'",
    '{"id": "a", "text": "w1"}': "has no id in field '_id'; did you mean 'id'",
    '{"_id": "a", "text": "w1"}\n{"_id": "a", "text": "w2"}': "two passages have the id 'a'",
    '{"_id": "a b", "text": "w1"}': "must not be empty or hold spaces",
    '{"_id": "a", "title": 3, "text": "w1"}': "its title must be text",
    '{"_id": "a", "text": "w1"': "line 1: not JSON",
}  # fmt: skip


@each
def test_a_corpus_that_cannot_be_used_is_refused_before_work(name, places, tmp_path):
    file = tmp_path / "corpus.jsonl"
    for content, message in BAD_CORPORA.items():
        file.write_text(content)
        with pytest.raises(RecordsError, match=message):
            check_one(name, places, corpus=str(file))
    with pytest.raises(RecordsError, match="no such file"):
        check_one(name, places, corpus=str(tmp_path / "none.jsonl"))
    with pytest.raises(RecordsError, match="is no index"):
        check_one(name, places, corpus=str(tmp_path))


@each
def test_queries_and_judgements_at_odds_are_refused_before_work(name, places, tmp_path):
    file = tmp_path / "qrels.tsv"
    for content, message in {
        "query-id\tcorpus-id\tscore\nq0\tdx\t1\n": "ids of a passage that is not there, such as 'dx'",
        "qx\td1\t1\n": "ids of a query that is not there, such as 'qx'",
        "q0 0 d1 yes\n": "line 1: must be query, passage and relevance",
        "q0 d1\n": "line 1: must be query",
        "q0 0 d1 1\nq0 0 d1 2\n": "come twice",
        "": "holds no judgements",
    }.items():
        file.write_text(content)
        with pytest.raises(RecordsError, match=message):
            check_one(name, places, qrels=str(file))
    with pytest.raises(SettingError, match="need the queries"):
        check_one(name, places, queries=None)
    with pytest.raises(SettingError, match="retrieve scores on --queries"):
        check_one(name, places, evaluate=[str(places.queries)])
    for content, message in {
        '{"_id": "q0", "text": " "}': "its query is empty",
        '{"_id": "q0", "text": "w1"}\n{"_id": "q0", "text": "w2"}': "two queries have the id 'q0'",
    }.items():
        (tmp_path / "queries.jsonl").write_text(content)
        with pytest.raises(RecordsError, match=message):
            check_one(name, places, queries=str(tmp_path / "queries.jsonl"))


@each
def test_an_index_that_is_not_whole_is_refused(name, places, results, tmp_path):
    made = retrieve(name, places, tmp_path / "out", queries=None, qrels="")
    with (made.folder / "passages.jsonl").open("r+b") as file:
        file.truncate(50)
    with pytest.raises(RecordsError, match="is not whole"):
        load_index(made.folder)


@each
def test_a_step_searches_the_index_of_an_earlier_one(name, places, tmp_path):
    method = {"method": name.split("/")[1], "task": "retrieve", "settings": places.settings(name)}
    first = {**method, "name": "made", "corpus": str(places.corpus)}
    second = {**method, **places.arguments(corpus="step:made")}
    with pytest.raises(GermaneError, match="no such"):
        check(Recipe(steps=[first, {**second, "queries": str(tmp_path / "none.jsonl")}]))
    result = run(Recipe(steps=[first, second]), tmp_path / "out")
    assert (result.folder / "steps" / "made" / "index.json").exists()
    assert result.scores


def test_a_query_without_results_counts_nothing_and_is_told(places, tmp_path):
    queries = zoo.write_rows(
        tmp_path / "queries.jsonl", [{"_id": "q0", "text": "unheard"}, {"_id": "q1", "text": "w1"}]
    )
    (tmp_path / "qrels.tsv").write_text("q0\td0\t1\n")
    made = retrieve(
        "retrieve/bm25", places, tmp_path / "out", queries=str(queries), qrels=str(tmp_path / "qrels.tsv")
    )
    assert [(score.value, score.n) for score in made.scores] == [(0, 1)] * 4
    assert [finding.code for finding in made.findings] == ["queries-without-results"]
    assert "1 of 2 queries found nothing, such as 'q0'" in made.findings[0].message


def test_the_task_has_its_arguments():
    assert set(Retrieve.paths) <= set(Retrieve.model_fields)
    for name in NAMES:
        assert not set(Retrieve.model_fields) & set(registry.load(name).model_fields), "flags would clash"
