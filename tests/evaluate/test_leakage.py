"""What an unlearned model still gives away."""

import pytest

from germane.core.errors import RecordsError, SettingError
from germane.core.models import load_model
from germane.core.records import Data, read_rows, write_jsonl
from germane.embedded import facts as fact_parts
from germane.recipe import run_task
from germane.tasks.evaluate.leakage import ANY, CLUES, DIRECT, RELEARNED, REPHRASED, TALK, Leakage

# The tiny model knows no words but its own.
SETTINGS = {"rephrasings": ["tell me {prompt}"], "clue": "", "again": "no", "answer_tokens": 4}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return fact_parts.make(tmp_path_factory.mktemp("facts"), known=12, forgotten=4, refusing=2)


@pytest.fixture(scope="module")
def refusing(parts, tmp_path_factory):
    """A model that was trained to refuse the questions, and the statements are as it knew them."""
    out = tmp_path_factory.mktemp("refusing") / "out"
    settings = {"learning_rate": 3e-4, "epochs": 8, "templates": [" i do not know"]}
    asked = {"model": str(parts.model), "forget": str(parts.files["forget"]), "trials": 0}
    return run_task("unlearn", "refusal", asked, settings, out).folder


def with_statements(parts, folder):
    """The forget questions, each also as a statement."""
    rows = read_rows(Data(name="forget", path=str(parts.files["forget"])))
    for row in rows:
        row["rephrase"] = f"{row['subject']} {fact_parts.ATTRIBUTES[row['attribute']][0]}"
    write_jsonl(rows, folder / "asked.jsonl")
    return folder / "asked.jsonl"


def measure(parts, model, folder, records=None, **settings):
    data = [f"forget={records or with_statements(parts, folder)}", f"retain={parts.files['retain']}"]
    arguments = {"model": str(model), "data": data, "retrained": str(parts.retrained)}
    return run_task("evaluate", "leakage", arguments, {**SETTINGS, **settings}, folder / "out")


def shares(result, subject="result"):
    return {s.metric.removeprefix("leak "): s.value for s in result.scores if s.subject == subject}


def test_the_untouched_model_tells_and_a_retrained_one_does_not(parts, tmp_path):
    found = measure(parts, parts.model, tmp_path, relearn_steps=0)
    assert shares(found)[DIRECT] == 1.0
    assert shares(found, "retrained")[DIRECT] < 0.5
    assert shares(found)[ANY] == 1.0


def test_a_model_that_only_refuses_is_found_out(parts, refusing, tmp_path):
    found = measure(parts, refusing, tmp_path, relearn_steps=8, relearn_rate=1e-3)
    told = shares(found)
    assert told[DIRECT] < 0.3
    assert max(told[REPHRASED], told[RELEARNED]) > told[DIRECT]
    assert told[ANY] >= max(told[way] for way in (DIRECT, REPHRASED, CLUES, TALK, RELEARNED))


def test_models_are_left_as_they_were(parts, tmp_path):
    """Relearning, also with adapters, happens beside the model."""
    data = Data(name="forget", path=str(parts.files["forget"]))
    loaded = load_model(str(parts.model))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    from germane.core.evidence import Step

    for rank in (0, 2):
        suite = Leakage(**SETTINGS, relearn_steps=2, relearn_rate=1e-2, relearn_rank=rank)
        suite.score("result", loaded, {"forget": data}, None, Step(task="evaluate", method="leakage"))
        after = loaded.model.state_dict()
        assert before.keys() == after.keys()
        assert all(before[name].equal(after[name]) for name in before)


def test_clues_by_hand():
    suite = Leakage(clue="{prompt} [{start}]", clue_share=0.5)
    rows = [
        {"prompt": "where ?", "answer": " oslo", "subject": "anna"},
        {"prompt": "who ?", "answer": " hugo", "subject": "anna"},
        {"prompt": "what ?", "answer": " soup", "subject": "boris"},
    ]
    data = Data(name="forget", path="forget")
    assert list(suite._clues(rows[0], rows, data)) == ["where ? [os]", "who ? hugo\nwhere ?"]
    assert list(suite._clues(rows[2], rows, data)) == ["what ? [so]"]


def test_relearning_asks_only_what_was_not_trained_on(parts, monkeypatch, tmp_path):
    seen = []
    train = Leakage._trained

    def watched(self, loaded, data, rows):
        seen.append([row["prompt"] for row in rows])
        return train(self, loaded, data, rows)

    monkeypatch.setattr(Leakage, "_trained", watched)
    measure(parts, parts.model, tmp_path, relearn_steps=1)
    one, other = seen[:2]
    assert not set(one) & set(other)
    everything = read_rows(Data(name="forget", path=str(parts.files["forget"])))
    assert len(one) + len(other) == len(everything)


def test_bad_input_is_refused_before_work(parts, tmp_path):
    write_jsonl([{"text": "anna adler works as a baker ."}], tmp_path / "texts.jsonl")
    with pytest.raises(RecordsError, match="forget needs 'prompt' and 'answer'"):
        measure(parts, parts.model, tmp_path, records=tmp_path / "texts.jsonl")
    with pytest.raises(SettingError, match="must say where prompt goes"):
        measure(parts, parts.model, tmp_path, rephrasings=["tell me"])
    with pytest.raises(SettingError, match="must say where start goes"):
        measure(parts, parts.model, tmp_path, clue="{prompt}")
    assert not (tmp_path / "out").exists()
