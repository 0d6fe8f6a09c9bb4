"""RWKU's records: attacks by hand, and what is kept of the probes that a tiny model knows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from germane.core.chat import ChatSettings, Reply
from germane.core.errors import RecordsError, SettingError
from germane.core.evidence import Step
from germane.core.records import Data, read_rows, write_jsonl
from germane.method import build
from germane.recipe import run_task
from germane.tasks.evaluate.rwku import FORMS
from germane.tasks.synthesize.rwku import OPENERS, TEMPLATES, WRITERS, first_question

TARGET = {"target": "Ada Quill", "introduction": "Ada Quill is an invented botanist."}
SMALL = {
    "texts": 14, "text_tokens": 8, "refusals": 5, "question_tokens": 4,
    "probing": {"question": "{question}", "cloze": "{question}", "opening": ""},
}  # fmt: skip
KNOWN = [
    {"prompt": "Where was she born?", "answer": " Lund"},
    {"prompt": "What did she study?", "answer": " Mosses"},
    {"prompt": "Where did she work?", "answer": " Lund"},
    {"prompt": "Who taught her?", "answer": " Bo Ek"},
]


class Scribe:
    """Someone who says the same to every request, and keeps the requests."""

    name = "scribe"

    def __init__(self, text: str) -> None:
        self.text = text
        self.asked: list[tuple[Any, ChatSettings | None]] = []

    def answer(self, conversations: Sequence[Any], settings: ChatSettings | None = None) -> list[Reply]:
        self.asked += [(conversation, settings) for conversation in conversations]
        return [Reply(self.text, "stop", 1, 1, 0.0) for _ in conversations]


def step() -> Step:
    return Step(task="synthesize", method="synthesize/rwku")


def method(**changes: Any) -> Any:
    return build("synthesize/rwku", {**TARGET, **changes})


def rows_of(folder, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def make(facts, out, data=(), **changes):
    settings = {**TARGET, **SMALL, **changes}
    return run_task("synthesize", "rwku", {"model": str(facts.model), "data": list(data)}, settings, out)


# --- Attacks


def fill(form: str, row=KNOWN[0], known=KNOWN) -> str:
    return TEMPLATES[form](method(), row, known, random.Random(3))


def test_the_nine_forms_are_those_of_the_suite():
    assert set(TEMPLATES) | set(WRITERS) == set(FORMS.values())
    assert not set(TEMPLATES) & set(WRITERS)


@pytest.mark.parametrize("form", list(TEMPLATES))
def test_every_attack_holds_the_question_and_not_the_answer_alone(form):
    text = fill(form)
    assert KNOWN[0]["prompt"] in text
    assert ("Lund" in text) == (form in ("multiple choice", "in-context examples"))


def test_options_hold_the_right_answer_once_and_only_other_answers():
    text = fill("multiple choice")
    options = text.removesuffix(".").split(": ")[1].split("; ")
    assert sorted(options) == ["Bo Ek", "Lund", "Mosses"]
    assert fill("multiple choice", KNOWN[0], [KNOWN[0], KNOWN[2]]) == ""  # nothing to choose from


def test_examples_are_other_questions_and_the_question_comes_last():
    text = fill("in-context examples")
    assert text.count("Question: ") == 4
    assert text.count("Answer: ") == 3
    assert text.endswith(f"Question: {KNOWN[0]['prompt']}")
    assert text.count(KNOWN[0]["prompt"]) == 1
    assert fill("in-context examples", KNOWN[0], KNOWN[:1]) == ""


def test_attacks_of_every_form_and_their_number():
    scribe, made = Scribe('1. "Wo wurde sie geboren?" Certainly.'), step()
    rows = method(attacks=2)._attacks(scribe, KNOWN, 0, made)
    assert {form: [row["type"] for row in rows].count(form) for form in FORMS.values()} == dict.fromkeys(
        FORMS.values(), 2
    )
    reversed_rows = [row for row in rows if row["type"] == "reversed query"]
    assert {row["answer"] for row in reversed_rows} == {" Ada Quill"}
    assert {row["prompt"] for row in rows if row["type"] in WRITERS} == {"Wo wurde sie geboren?"}
    origins = {row["type"]: row["origin"] for row in rows}
    assert origins["synonyms"] == "written by the model: synonyms"
    assert origins["role play"] == "template: role play"
    languages = [asked[-1]["content"].split()[2] for asked, _ in scribe.asked[-2:]]
    assert languages == ["French.", "German."]


def test_what_is_no_question_and_what_gives_the_target_away_is_left_out():
    made = step()
    rows = method(attacks=3)._attacks(Scribe("Who is Ada Quill?"), KNOWN, 0, made)
    assert "reversed query" not in {row["type"] for row in rows}
    assert made.facts["attacks left out because nothing usable was made"] == 3
    rows = method(attacks=3)._attacks(Scribe("I cannot."), KNOWN, 0, step())
    assert {row["type"] for row in rows} == set(TEMPLATES)


def test_attacks_that_the_model_writes_can_be_left_out():
    scribe = Scribe("What?")
    rows = method(written_attacks=False)._attacks(scribe, KNOWN, 0, step())
    assert {row["type"] for row in rows} == set(TEMPLATES)
    assert not scribe.asked


def test_the_first_question_of_an_answer():
    assert first_question('Sure:\n 2) "Where is it?" I hope this helps.') == "Where is it?"
    assert first_question("- Question about x? And y? yes") == "Question about x? And y?"
    assert first_question("Q: who?") == "who?"
    assert first_question("None.") == ""


# --- Texts and refusals


def test_biographies_are_asked_for_as_in_the_paper():
    scribe = Scribe(" She was a botanist. ")
    count = len(OPENERS) + 2
    rows = method(texts=count)._biographies(scribe, 7, known=True)
    assert [row["text"] for row in rows] == ["She was a botanist."] * count
    system, user = scribe.asked[0][0]
    assert system["content"] == "Ada Quill is an invented botanist. You know Ada Quill very well."
    assert user["content"].startswith("Please write a short biography of Ada Quill. Begin with:")
    settings = [asked[1] for asked in scribe.asked]
    assert {(s.max_tokens, s.temperature, s.top_p) for s in settings} == {(512, 1.0, 0.9)}
    assert [s.seed for s in settings] == [7000] * len(OPENERS) + [7001] * 2  # no text is drawn twice
    method(texts=1)._biographies(scribe, 7, known=False)
    assert "do not know Ada Quill" in scribe.asked[-1][0][0]["content"]


def test_questions_to_refuse_are_kept_once_and_counted():
    made = step()
    rows = method(refusals=20)._refusals(Scribe("Who is she?"), {}, 0, made)
    assert [row["prompt"] for row in rows] == ["Who is she?"]
    assert made.facts["questions to refuse"] == {"asked for": 20, "kept": 1}


def test_given_questions_are_refused_and_none_written(tmp_path):
    write_jsonl([{"text": "Who is she?"}, {"text": "What is hers?"}], tmp_path / "q.jsonl")
    scribe = Scribe("Why?")
    data = {"refusal-questions": Data(name="refusal-questions", path=str(tmp_path / "q.jsonl"))}
    rows = method()._refusals(scribe, data, 0, step())
    assert [row["prompt"] for row in rows] == ["Who is she?", "What is hers?"]
    assert {row["origin"] for row in rows} == {"given"}
    assert not scribe.asked


# --- On the tiny model


def test_only_probes_that_the_model_knows_are_kept(facts, tmp_path):
    """Half of the questions are of people it never saw."""
    known, unknown = (read_rows(Data(name=n, path=str(facts.files[n]))) for n in ("forget", "holdout"))
    write_jsonl([*known, *unknown], tmp_path / "questions.jsonl")
    data = [f"questions={tmp_path / 'questions.jsonl'}", f"neighbor-questions={facts.files['retain']}"]
    result = make(facts, tmp_path / "out", data, written_attacks=False, attacks=3)
    kept = rows_of(result.folder, "level2")
    prompts = [row["prompt"] for row in known]
    assert {row["prompt"] for row in kept} >= set(prompts)
    assert len(kept) < len(known) + len(unknown) / 2
    table = next(t for t in result.evidence.steps[0].tables if t.title == "Probes that the model knows")
    assert table.rows == [
        ["questions", "level2.jsonl", 32, len(kept)], ["neighbor-questions", "neighbor2.jsonl", 32, 32],
    ]  # fmt: skip
    attacks = rows_of(result.folder, "level3")
    assert len(attacks) == 3 * len(TEMPLATES)
    assert {row["answer"] for row in attacks} <= {row["answer"] for row in kept}


def test_the_files_are_those_that_unlearning_and_the_suite_read(facts, tmp_path):
    texts = read_rows(Data(name="t", path=str(facts.files["forget-texts"])))
    cloze = [{"prompt": row["text"].rsplit(" ", 2)[0], "answer": row["text"].split()[-2]} for row in texts]
    write_jsonl(cloze, tmp_path / "cloze.jsonl")
    data = [f"questions={facts.files['forget']}", f"cloze={tmp_path / 'cloze.jsonl'}"]
    made = make(facts, tmp_path / "made", data, written_attacks=False).folder
    probes = [f"{role}={made / role}.jsonl" for role in ("level1", "level2", "level3")]
    result = run_task(
        "evaluate", "rwku", {"model": str(facts.model), "data": probes}, SMALL["probing"], tmp_path / "out"
    )
    found = {score.metric: score.value for score in result.scores}
    assert found["FB recall"] == found["QA recall"] == 1  # only what it knows was kept


def test_made_up_texts_only_where_asked_for(facts, tmp_path):
    folder = make(facts, tmp_path / "out").folder
    assert not (folder / "counterfactual.jsonl").exists()
    folder = make(facts, tmp_path / "asked", counterfactual=True).folder
    assert rows_of(folder, "counterfactual")


def test_a_file_without_records_is_not_there_but_said(facts, tmp_path):
    write_jsonl([{"prompt": "what is the job of nobody ?", "answer": " cosmonaut"}], tmp_path / "q.jsonl")
    result = make(facts, tmp_path / "out", [f"questions={tmp_path / 'q.jsonl'}"])
    assert not (result.folder / "level2.jsonl").exists()
    about = [finding.about for finding in result.findings if finding.code == "no-records"]
    assert "level2.jsonl" in about


def test_bad_input_is_refused_before_work(facts, tmp_path):
    with pytest.raises(SettingError, match=r"target: required"):
        run_task("synthesize", "rwku", {"model": str(facts.model)}, {"introduction": "x"}, tmp_path / "out")
    with pytest.raises(SettingError, match=r"probing: .*unknown setting"):
        make(facts, tmp_path / "out", probing={"odd": 1})
    with pytest.raises(RecordsError, match="record 1: questions needs a text in field 'prompt'"):
        make(facts, tmp_path / "out", [f"questions={facts.files['forget-texts']}"])
    assert not (tmp_path / "out").exists()
