"""What `germane/tasks/unlearn/_task.py` promises, held against every registered unlearn method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file

from germane import method as registry
from germane.core.errors import GermaneError, RecordsError, SettingError
from germane.core.models import load_model
from germane.core.records import read_rows, write_jsonl
from germane.embedded import digits as digit_parts
from germane.embedded import facts as fact_parts
from germane.recipe import run_task
from germane.tasks.unlearn._task import Unlearn

NAMES = registry.names("unlearn")
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A classifier and a language model to unlearn with."""
    folder = tmp_path_factory.mktemp("parts")
    return {
        "classifier": digit_parts.make(folder / "digits"),
        "language model": fact_parts.make(folder / "facts", known=12, forgotten=2, refusing=2),
    }


def kind_of(name: str) -> str:
    needs = registry.load(name).information.needs
    return "language model" if "language model" in needs else "classifier"


def arguments(name: str, parts, **changes):
    made = parts[kind_of(name)]
    return {
        "model": str(made.model), "initial": str(made.initial), "forget": str(made.files["forget"]),
        "retain": str(made.files["retain"]), "trials": 1, **changes,
    }  # fmt: skip


def unlearn(name: str, out: Path, arguments, settings=None, seed: int = 7):
    return run_task("unlearn", name.split("/")[1], arguments, settings or {}, out, seed=seed)


@pytest.fixture(scope="module")
def results(parts, tmp_path_factory):
    """Each method's result, made once."""
    made = {}

    def get(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name.replace("/", "-")) / "out"
            made[name] = unlearn(name, out, arguments(name, parts))
        return made[name]

    return get


@each
def test_the_result_is_a_model_of_the_same_form(name, results, parts):
    folder, model = results(name).folder, parts[kind_of(name)].model
    before, after = (load_file(place / "model.safetensors") for place in (model, folder))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    if kind_of(name) == "language model":
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(folder)
    load_model(str(folder))


@each
def test_memory_and_utility_are_measured_before_and_after(name, results):
    found = {(score.subject, score.metric) for score in results(name).scores}
    assert {(s, m) for s in ("base", "result") for m in ("memory", "utility")} <= found


@each
def test_it_forgets_within_the_budget_or_says_so(name, results):
    scores = {(s.subject, s.metric): s.value for s in results(name).scores}
    codes = {finding.code for finding in results(name).findings}
    if "over-budget" not in codes:
        assert scores["result", "utility"] >= 0.9 * scores["base", "utility"]
    if "no-effect" not in codes:
        assert scores["result", "memory"] < scores["base", "memory"]


@each
def test_same_seed_same_weights_and_inputs_untouched(name, results, parts, tmp_path):
    before = zoo.digest([parts[kind_of(name)].model])
    again = unlearn(name, tmp_path / "again", arguments(name, parts))
    first, second = (load_file(r.folder / "model.safetensors") for r in (results(name), again))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert zoo.digest([parts[kind_of(name)].model]) == before


@each
def test_nothing_but_the_result_is_left(name, results):
    assert not list(results(name).folder.glob(".*"))


def test_an_empty_forget_set_is_refused(parts, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(RecordsError, match="holds no records"):
        unlearn(NAMES[0], tmp_path / "out", arguments(NAMES[0], parts, forget=str(empty)))
    assert not (tmp_path / "out").exists()


def test_records_cannot_be_forgotten_and_kept(parts, tmp_path):
    made = parts["classifier"]
    rows = [*read_rows_of(made.files["retain"]), read_rows_of(made.files["forget"])[0]]
    write_jsonl(rows, tmp_path / "both.jsonl")
    with pytest.raises(RecordsError, match="cannot be in both forget and retain"):
        unlearn(
            "unlearn/gradient-ascent", tmp_path / "out",
            arguments("unlearn/gradient-ascent", parts, retain=str(tmp_path / "both.jsonl")),
        )  # fmt: skip


def read_rows_of(file: Path):
    from germane.core.records import Data

    return read_rows(Data(name="rows", path=str(file)))


def test_a_label_outside_the_classes_is_refused(parts, tmp_path):
    rows = [{**row, "label": 77} for row in read_rows_of(parts["classifier"].files["forget"])]
    write_jsonl(rows, tmp_path / "odd.jsonl")
    with pytest.raises(GermaneError, match="label 77 is none of the model's 10"):
        unlearn(
            "unlearn/gradient-ascent", tmp_path / "out",
            arguments("unlearn/gradient-ascent", parts, forget=str(tmp_path / "odd.jsonl")),
        )  # fmt: skip


def test_methods_that_need_records_to_keep_say_so(parts, tmp_path):
    with pytest.raises(SettingError, match="--retain"):
        unlearn("unlearn/fine-tune", tmp_path / "out", arguments("unlearn/fine-tune", parts, retain=None))


def test_without_records_to_keep_the_settings_are_used_as_they_are(parts, tmp_path):
    asked = arguments("unlearn/gradient-ascent", parts, retain=None, trials=3)
    result = unlearn("unlearn/gradient-ascent", tmp_path / "out", asked, {"epochs": 1})
    assert "no-search" in {finding.code for finding in result.findings}


def test_a_rate_that_gives_nan_costs_a_trial_and_says_at_which_step(parts, tmp_path):
    asked = arguments("unlearn/gradient-ascent", parts, trials=1)
    with pytest.raises(GermaneError, match=r"became (nan|-?inf) in epoch \d+, batch \d+"):
        unlearn("unlearn/gradient-ascent", tmp_path / "out", asked, {"learning_rate": 1e30, "epochs": 3})
    assert not (tmp_path / "out").exists()


def test_a_rate_far_too_high_is_brought_down_by_the_search(parts, tmp_path):
    asked = arguments("unlearn/gradient-ascent", parts, trials=6)
    result = unlearn("unlearn/gradient-ascent", tmp_path / "out", asked, {"learning_rate": 0.05})
    scores = {(s.subject, s.metric): s.value for s in result.scores}
    assert scores["result", "utility"] > 0.9 * scores["base", "utility"]
    assert len(result.evidence.steps[0].tables[0].rows) > 1


def test_privacy_is_measured_where_there_is_a_holdout(parts, tmp_path):
    made = parts["language model"]
    asked = {
        "model": str(made.model), "forget": str(made.files["forget"]), "retain": str(made.files["retain"]),
        "holdout": str(made.files["holdout"]), "retrained": str(made.retrained), "trials": 1,
    }  # fmt: skip
    result = unlearn("unlearn/gradient-ascent", tmp_path / "out", asked)
    leak = {s.subject: s.value for s in result.scores if s.metric == "privacy leak"}
    memory = {s.subject: s.value for s in result.scores if s.metric == "memory"}
    assert leak["retrained"] == pytest.approx(0)
    assert leak["base"] > 0.8
    assert memory["base"] > 2 * memory["retrained"]


def test_the_task_has_its_arguments():
    assert set(Unlearn.paths) <= set(Unlearn.model_fields)
