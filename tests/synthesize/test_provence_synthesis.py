"""Labels from citations: parsed as the official scripts do, and read by the pruner's training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from transformers import BertForSequenceClassification

from germane.core.chat import Reply
from germane.core.errors import CheckpointError, RecordsError, SettingError
from germane.core.evidence import Step
from germane.core.records import Data, write_jsonl
from germane.method import build
from germane.tasks.ground._pruner import read_labelled_passages
from germane.tasks.synthesize.provence import TITLE_ONLY, UNCITED, read_citations

OFFICIAL = json.loads((Path(__file__).parents[1] / "fixtures" / "provence.json").read_text())


@pytest.mark.parametrize("case", OFFICIAL["citations"], ids=lambda case: case["reply"] or "nothing")
def test_citations_are_read_as_the_official_scripts_read_them(case):
    cited, reason = read_citations(case["reply"], case["count"], titled=True)
    assert (None if reason else cited) == case["out"]


def test_why_a_reply_is_discarded():
    assert read_citations("Rome [0].", 3, titled=True) == ([0], TITLE_ONLY)
    assert read_citations("Rome [0].", 3, titled=False) == ([0], "")
    assert read_citations("Rome.", 3, titled=False) == ([], UNCITED)
    assert read_citations("Rome [7].", 3, titled=False) == ([], UNCITED)


class Citing:
    """Cites the sentences that hold the last word of the question; without one, it says so."""

    def __init__(self):
        self.asked, self.settings = [], None

    def answer(self, conversations, settings=None):
        self.settings = settings
        self.asked += [messages[0]["content"] for messages in conversations]
        return [Reply(self._reply(messages[0]["content"]), "stop", 1, 1, 0.0) for messages in conversations]

    def _reply(self, prompt: str) -> str:
        lines = prompt.split("\n")
        word = lines[0].split()[-1]
        cited = [line[1] for line in lines if line.startswith("[") and word in line]
        return f"Because [{', '.join(cited)}]." if cited else "No answer"


QUESTIONS = [
    {
        "id": "a", "question": "what is w1",
        "passages": [
            {"id": "x", "title": "w1", "text": "In w3, w4. In w1, w5. It is w6, too."},
            {"id": "y", "title": "w1", "text": "w3 is w4."},
            {"id": "z", "text": "w3 is w4.\n\nw1 is w2."},
        ],
    },
    {"id": "b", "question": "what is w2", "passages": ["w2 is \"w7\". And w8.", "w9 is w9.", " "]},
]  # fmt: skip


def make(tmp_path, chat, seed=0, **settings):
    write_jsonl(QUESTIONS, tmp_path / "questions.jsonl")
    records = {"questions": Data(name="questions", path=str(tmp_path / "questions.jsonl"))}
    method, step = build("synthesize/provence", settings), Step(task="synthesize", method="provence")
    method.check_records(records)
    return method.make(chat, records, seed, step), step


def test_labels_are_what_training_reads(tmp_path):
    chat = Citing()
    made, step = make(tmp_path, chat)
    rows = {row["id"]: row for row in made["labelled"]}
    assert {name: row["cited"] for name, row in rows.items()} == {
        "a/x": [0, 2], "a/z": [1], "b/1": [0], "b/2": [],
    }  # fmt: skip
    assert rows["a/x"]["sentences"] == ["In w3, w4.", "In w1, w5.", "It is w6, too."]
    assert [(row["id"], row["reason"]) for row in made["discarded"]] == [("a/y", TITLE_ONLY)]
    assert all(row["origin"] for file in made.values() for row in file)
    assert chat.settings.max_tokens == 256
    assert chat.settings.temperature == 0
    counts = {row[0]: row[1] for row in step.tables[0].rows}
    assert counts == {"with sentences cited": 3, "no answer in them": 1, TITLE_ONLY: 1}
    write_jsonl(made["labelled"], tmp_path / "labelled.jsonl")
    read = read_labelled_passages(str(tmp_path / "labelled.jsonl"), scored=False)
    texts = {each.question: each for each in read if each.text.titled}
    assert texts["what is w1"].text.sentences == ("w1", "In w3, w4.", "In w1, w5.", "It is w6, too.")
    assert texts["what is w1"].cited == {0, 2}


def test_sentences_are_numbered_from_the_title_and_quoted(tmp_path):
    chat = Citing()
    make(tmp_path, chat)
    assert any(
        '\n[0] "w1"\n[1] "In w3, w4."\n[2] "In w1, w5."\n[3] "It is w6, too."\n' in p for p in chat.asked
    )
    assert any('\n[0] "w3 is w4."\n[1] "w1 is w2."\n' in prompt for prompt in chat.asked)
    assert any('\n[0] "w2 is \\"w7\\"."\n[1] "And w8."\n' in prompt for prompt in chat.asked)
    assert len(chat.asked) == 5  # not the empty one


def test_the_order_is_drawn_with_the_seed(tmp_path):
    orders = [[row["id"] for row in make(tmp_path, Citing(), seed)[0]["labelled"]] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_a_model_that_cannot_cite_leaves_a_warning(tmp_path):
    chat = Citing()
    chat._reply = lambda prompt: "I do not know."
    made, step = make(tmp_path, chat)
    assert set(made) == {"discarded"}
    assert {row["reason"] for row in made["discarded"]} == {UNCITED}
    assert [finding.code for finding in step.findings] == ["no-citations"]


def teacher(folder, **changes):
    config = zoo.bert_config(num_labels=1, **changes)
    return zoo.save(zoo.make(BertForSequenceClassification, config), folder)


def test_the_teachers_scores_are_raw_logits(tmp_path):
    folder = teacher(tmp_path / "teacher")
    made, step = make(tmp_path, Citing(), teacher=str(folder))
    row = next(row for row in made["labelled"] if row["id"] == "a/x")
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    given = zoo.tokenizer()("what is w1", "w1 In w3, w4. In w1, w5. It is w6, too.", return_tensors="pt")
    with torch.no_grad():
        assert row["score"] == pytest.approx(float(model(**given).logits[0, 0]), abs=1e-5)
    assert all(isinstance(row["score"], float) for row in made["labelled"])
    assert step.facts["passages longer than the teacher reads"] == 0


def test_what_cannot_be_labelled_or_scored_is_refused_before_work(tmp_path):
    method = build("synthesize/provence", {})
    with pytest.raises(SettingError, match="needs questions with passages: --data questions=FILE"):
        method.check_records({})
    write_jsonl([{"question": "a?", "passages": [" "]}], tmp_path / "bare.jsonl")
    with pytest.raises(RecordsError, match="record 1: has no passages to label"):
        method.check_records({"questions": Data(name="questions", path=str(tmp_path / "bare.jsonl"))})
    config = zoo.bert_config(num_labels=3)
    zoo.save(zoo.make(BertForSequenceClassification, config), tmp_path / "three")
    with pytest.raises(CheckpointError, match="must be a sequence classifier with one score"):
        make(tmp_path, Citing(), teacher=str(tmp_path / "three"))
