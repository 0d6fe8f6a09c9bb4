"""What `germane/tasks/attend/_task.py` promises, held against every registered method."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
import transformers
import zoo

from germane import method as registry
from germane.attention import Attention
from germane.core.chat import load_language_model
from germane.core.errors import CheckpointError, RecordsError
from germane.core.evidence import Evidence
from germane.core.records import Data
from germane.embedded import facts as fact_parts
from germane.recipe import Recipe, check, run_task
from germane.solver import Question
from germane.tasks.attend._task import Answered, Attend, orders_of, read_choices, scores_of

each = pytest.mark.parametrize("name", registry.names("attend"))
# Method -> settings that fit the tiny model.
SETTINGS: dict[str, dict[str, object]] = {}
FORMS = {"question_form": "{question}", "option_form": "{option}", "ending": "?"}
QUESTIONS = 12
UNORDERED = ("attend/set-based-prompting",)  # promise that order has no effect


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny model that knows twelve people, and questions about them with four options each."""
    folder = tmp_path_factory.mktemp("facts")
    made = fact_parts.make(folder, known=12, forgotten=4, refusing=2)
    generator = random.Random(0)
    rows = []
    for number, row in enumerate(fact_parts.people(0, 3).questions):
        right = row["answer"].strip()
        values = [value for value in fact_parts.ATTRIBUTES[row["attribute"]][2] if value != right]
        options = generator.sample([right, *generator.sample(values, 3)], 4)
        answer = right if number % 2 else options.index(right)
        rows.append({"question": row["prompt"], "options": options, "answer": answer})
    made.files["questions"] = zoo.write_rows(folder / "questions.jsonl", rows)
    return made


def arguments(parts, **changes):
    return {
        "model": str(parts.model), "questions": f"people={parts.files['questions']}", **FORMS, **changes,
    }  # fmt: skip


def attend(name: str, out: Path, arguments, seed: int = 0):
    return run_task("attend", name.split("/")[1], arguments, SETTINGS.get(name, {}), out, seed=seed)


@pytest.fixture(scope="module")
def results(parts, tmp_path_factory):
    """Each method's result, made once."""
    made = {}

    def get(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name.replace("/", "-")) / "out"
            made[name] = attend(name, out, arguments(parts))
        return made[name]

    return get


def items(folder: Path, subject: str):
    return [json.loads(line) for line in (folder / f"items-{subject}.jsonl").read_text().splitlines()]


@each
def test_every_question_is_asked_in_every_order_with_and_without_the_method(name, results):
    result = results(name)
    for subject in ("base", "result"):
        rows = items(result.folder, subject)
        assert len(rows) == QUESTIONS
        for row in rows:
            assert {tuple(order) for order in row["orders"]} == set(itertools.permutations(range(4)))
            assert row["orders"][0] == [0, 1, 2, 3]
            assert len(row["chosen"]) == 24
            assert all(math.isfinite(score) for scores in row["scores"] for score in scores)
    assert {score.subject for score in result.scores} == {"base", "result"}
    assert {score.n for score in result.scores} == {QUESTIONS}
    assert all(score.low - 1e-9 <= score.value <= score.high + 1e-9 for score in result.scores)


@each
def test_scores_are_those_of_the_items(name, results):
    scores = {(score.subject, score.metric): score.value for score in results(name).scores}
    for subject in ("base", "result"):
        rows = items(results(name).folder, subject)
        hits = [[row["options"][chosen] in row["answer"] for chosen in row["chosen"]] for row in rows]
        assert scores[subject, "accuracy"] == pytest.approx(sum(map(sum, hits)) / (24 * QUESTIONS))
        assert scores[subject, "accuracy, given order"] == sum(row[0] for row in hits) / QUESTIONS
        assert scores[subject, "accuracy, worst order"] == sum(map(all, hits)) / QUESTIONS
        assert scores[subject, "accuracy, best order"] == sum(map(any, hits)) / QUESTIONS


@each
def test_a_method_against_order_leaves_no_effect_of_it(name, results):
    if name not in UNORDERED:
        pytest.skip("promises nothing about order")
    scores = {(score.subject, score.metric): score.value for score in results(name).scores}
    assert scores["result", "largest effect of order (nats)"] < 1e-4
    assert scores["base", "largest effect of order (nats)"] > 1e-2
    assert scores["result", "answers that change with order"] == 0


@each
def test_a_model_is_to_the_bit_what_it_was_when_the_block_is_left(name, parts):
    model, tokenizer = load_language_model(str(parts.model))
    tokens = tokenizer("what is the job of anna adler ?", return_tensors="pt")["input_ids"]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(tokens).logits
        method = registry.build(name, SETTINGS.get(name, {}))
        assert isinstance(method, Attention)
        with method.applied(model, tokenizer) as attending:
            attending.generate([["what is the job of", ["anna adler", "boris brandt"], "?"]], 4)
        assert torch.equal(model(tokens).logits, before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)


@each
def test_no_model_is_written_and_the_same_seed_gives_the_same_scores(name, results, parts, tmp_path):
    before = zoo.digest([parts.model])
    again = attend(name, tmp_path / "again", arguments(parts))
    assert again.scores == results(name).scores
    assert zoo.digest([parts.model]) == before
    assert not list(again.folder.rglob("*.safetensors"))
    assert not list(again.folder.glob(".*"))
    assert Evidence.read(again.folder).steps[0].inputs


@each
def test_a_sample_of_orders_and_no_references(name, parts, tmp_path):
    result = attend(name, tmp_path / "out", arguments(parts, orders=5, references=False))
    assert {score.subject for score in result.scores} == {"result"}
    assert all(len(row["orders"]) == 5 for row in items(result.folder, "result"))
    assert not (result.folder / "items-base.jsonl").exists()


@each
def test_further_records_are_scored_in_the_block_and_outside(name, parts, tmp_path):
    given = arguments(parts, orders=1, evaluate=[f"kept={parts.files['retain']}"])
    result = attend(name, tmp_path / "out", given)
    assert [s.subject for s in result.scores if s.task == "kept"] == ["base", "result"]


BAD = [
    ({"options": ["a", "b"], "answer": 0}, "has no text in field 'question'"),
    ({"question": "q", "answer": 0}, "at least two texts"),
    ({"question": "q", "options": ["a"], "answer": 0}, "at least two texts"),
    ({"question": "q", "options": ["a", " "], "answer": 0}, "none of them empty"),
    ({"question": "q", "options": "ab", "answer": 0}, "must be a list"),
    ({"question": "q", "options": ["a", "b"], "answer": 2}, "answer 2 is none of its options: a, b"),
    ({"question": "q", "options": ["a", "b"], "answer": "c"}, "answer 'c' is none of its options"),
    ({"question": "q", "options": ["a", "b"], "answer": True}, "answer True is none"),
]


@each
@pytest.mark.parametrize(("row", "match"), BAD)
def test_bad_questions_are_refused_before_any_work(name, row, match, parts, tmp_path):
    good = {"question": "q", "options": ["a", "b"], "answer": "b"}
    file = zoo.write_rows(tmp_path / "bad.jsonl", [good, row])
    with pytest.raises(RecordsError, match=f"record 2: .*{match}"):
        attend(name, tmp_path / "out", arguments(parts, questions=str(file)))
    assert not (tmp_path / "out").exists()


@each
def test_an_empty_file_and_a_classifier_are_refused(name, parts, tmp_path):
    file = zoo.write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(RecordsError, match="holds no records"):
        attend(name, tmp_path / "out", arguments(parts, questions=str(file)))
    model = zoo.save(
        zoo.make(transformers.ViTForImageClassification, zoo.vit_config()), tmp_path / "v", words=None
    )
    with pytest.raises(CheckpointError, match="needs a language model"):
        attend(name, tmp_path / "out", arguments(parts, model=str(model)))


@each
def test_faults_are_found_while_an_earlier_step_is_missing(name, parts, tmp_path):
    first = {
        "task": "unlearn", "method": "gradient-ascent", "name": "before", "model": str(parts.model),
        "forget": str(parts.files["forget"]), "trials": 0,
    }  # fmt: skip
    second = {
        "task": "attend", "method": name.split("/")[1], "settings": SETTINGS.get(name, {}),
        **arguments(parts, model="step:before"),
    }  # fmt: skip
    check(Recipe(steps=[first, second]))
    bad = zoo.write_rows(tmp_path / "bad.jsonl", [{"question": "q"}])
    with pytest.raises(RecordsError, match="at least two texts"):
        check(Recipe(steps=[first, {**second, "questions": str(bad)}]))


def test_orders_are_all_or_a_sample_of_different_ones_with_the_given_one_first():
    assert sorted(orders_of(3, 6, random.Random(0))) == list(itertools.permutations(range(3)))
    sample = orders_of(5, 20, random.Random(0))
    assert len(set(sample)) == 20
    assert sample[0] == (0, 1, 2, 3, 4)
    assert sample == orders_of(5, 20, random.Random(0))
    assert orders_of(20, 1, random.Random(0)) == [tuple(range(20))]


def test_scores_by_hand():
    two = Question("1", "q", ("b",), ("a", "b"))
    orders = [(0, 1), (1, 0)]
    steady = Answered(two, orders, [[-2.0, -1.0], [-2.5, -1.25]])
    torn = Answered(two, orders, [[-1.0, -2.0], [-3.0, -2.0]])
    found = {score.metric: score.value for score in scores_of([steady, torn], "base", "t")}
    assert found == {
        "accuracy": 0.75,
        "accuracy, given order": 0.5,
        "accuracy, worst order": 0.5,
        "accuracy, best order": 1.0,
        "answers that change with order": 0.5,
        "largest effect of order (nats)": (0.5 + 2.0) / 2,
    }


def test_an_option_given_twice_is_right_both_times(tmp_path):
    row = {"question": "q", "options": ["b", "a", "b"], "answer": 2}
    question = read_choices(Data(name="t", path=str(zoo.write_rows(tmp_path / "q.jsonl", [row]))))[0]
    assert Answered(question, [(0, 1, 2)], [[-1.0, -2.0, -1.0]]).hits == [True]


def test_the_task_has_its_arguments():
    assert set(Attend.paths) <= set(Attend.model_fields)
