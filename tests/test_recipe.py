"""Recipes: checked whole, run step by step, chained, taken up again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
import zoo
from zoo import weights

from germane import recipe as recipes
from germane.core.errors import EffectError, GermaneError, SettingError
from germane.recipe import Recipe, check, plan, read_recipe, run


def content(llama, **changes) -> dict:
    """Average of two members, and then of that and the third."""
    pool = [str(member) for member in llama.members]
    first = {
        "task": "merge",
        "method": "average",
        "name": "first",
        "base": str(llama.base),
        "pool": pool[:2],
    }
    second = {
        "task": "merge",
        "method": "merge/task-arithmetic",
        "base": str(llama.base),
        "pool": ["step:first", pool[2]],
        "settings": {"scale": 0.5},
    }
    return {"title": "two", "steps": [first, second], **changes}


def write(tmp_path: Path, value: object) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return file


def test_two_merges_in_a_chain(llama, tmp_path):
    result = run(read_recipe(write(tmp_path, content(llama))), tmp_path / "out")
    base, *members = [weights(folder) for folder in (llama.base, *llama.members)]
    ours, first = weights(result.folder), weights(result.folder / "steps" / "first")
    for name in base:
        mean = (members[0][name] + members[1][name]) / 2
        torch.testing.assert_close(first[name], mean)
        torch.testing.assert_close(
            ours[name], base[name] + 0.5 * (mean + members[2][name] - 2 * base[name])
        )
    step = result.evidence.steps[1]
    assert step.job["pool"] == ["step:first", str(llama.members[2])]
    assert [share.member for share in step.shares] == ["first", "m2"]
    assert "step:first/model.safetensors" in step.inputs
    assert str(tmp_path) not in json.dumps(step.inputs).replace(str(llama.members[2].parents[2]), "")
    assert not (tmp_path / "out.partial").exists()
    assert not list(result.folder.rglob("step.json"))


def test_the_evidence_can_be_read_again(llama, tmp_path):
    result = run(Recipe(**content(llama)), tmp_path / "out")
    again = json.loads((result.folder / "evidence.json").read_text())
    assert again["title"] == "two"
    assert again["recipe"]["steps"] == content(llama)["steps"]
    assert {"report.html", "README.md", "config.json"} <= {file.name for file in result.folder.iterdir()}
    run(Recipe(**again["recipe"]), tmp_path / "again")
    assert zoo.same_bytes(weights(tmp_path / "again"), weights(result.folder))


REFUSED = {
    "no steps": ({"steps": []}, "recipe.yaml.steps: list should have at least 1 item"),
    "unknown key": ({"step": []}, "recipe.yaml.step: unknown setting; did you mean 'steps'"),
    "no task": ({"steps": [{"method": "ties"}]}, "steps[0].task: required, but not given"),
    "no method": ({"steps": [{"task": "merge"}]}, "steps[0].method: required, but not given"),
    "unknown task": (
        {"steps": [{"task": "merg", "method": "ties"}]},
        "no task 'merg'; did you mean 'merge'",
    ),
    "another task's method": (
        {"steps": [{"task": "merge", "method": "route/ties", "base": "a", "pool": ["b"]}]},
        "no method 'merge/route/ties'",
    ),
    "missing argument": (
        {"steps": [{"task": "merge", "method": "ties", "pool": []}]},
        "steps[0].base: required",
    ),
    "unknown argument": (
        {"steps": [{"task": "merge", "method": "ties", "base": "a", "pool": [], "pol": 1}]},
        "steps[0].pol: unknown setting; did you mean 'pool'",
    ),
    "settings": (
        {"steps": [{"task": "merge", "method": "ties", "base": "a", "pool": [], "settings": {"scal": 1}}]},
        "steps[0].settings.scal: unknown setting; did you mean 'scale'",
    ),
    "settings, no mapping": (
        {"steps": [{"task": "merge", "method": "ties", "base": "a", "pool": [], "settings": [1]}]},
        "steps[0].settings: must be a mapping; got [1]",
    ),
    "reference": (
        {"steps": [{"task": "merge", "method": "ties", "base": "step:b", "pool": ["x"]}]},
        "steps[0]: 'step:b' names no earlier step. Earlier: none.",
    ),
    "names": (
        {"steps": [{"task": "merge", "method": "ties", "base": "a", "pool": ["b"], "name": "x"}] * 2},
        "two steps have the same name",
    ),
    "a name that is a path": (
        {"steps": [{"task": "merge", "method": "ties", "base": "a", "pool": ["b"], "name": "../x"}]},
        "steps[0].name: must be letters, digits, _ and -; got '../x'",
    ),
    "text": ("just words", "must hold a mapping with `steps`"),
    "no YAML": ("steps: [", "recipe.yaml: not YAML"),
    "data": (
        {"steps": [{"task": "merge", "method": "ties"}], "evaluate": [{"name": "a"}]},
        "recipe.yaml.evaluate[0].path: required",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(kind, tmp_path):
    value, message = REFUSED[kind]
    file = write(tmp_path, value)
    with pytest.raises(GermaneError) as caught:
        plan(read_recipe(file))
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == [file]


def test_no_such_recipe(tmp_path):
    with pytest.raises(SettingError, match=r"nowhere\.yaml: no such recipe"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_keys_can_be_set(llama, tmp_path):
    file = write(tmp_path, content(llama))
    changed = read_recipe(
        file,
        {
            "steps.1.settings.scale": 0.1,
            "steps.0.settings.weights": [1, 2],
            "seed": 3,
            "card.license": "mit",
        },
    )
    assert changed.steps[1]["settings"] == {"scale": 0.1}
    assert changed.steps[0]["settings"] == {"weights": [1, 2]}
    assert (changed.seed, changed.card) == (3, {"license": "mit"})
    empty = content(llama)
    empty["steps"][0]["settings"] = None
    assert read_recipe(write(tmp_path, empty), {"steps.0.settings.weights": [1]}).steps[0]["settings"] == {
        "weights": [1]
    }


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("steps.5.method", "there is no item 5; the list has 2"),
        ("steps.x.method", "there is no item x"),
        ("steps.9", "there is no item 9"),
        ("title.a", "'a' is sought in 'two', which holds no keys"),
        ("sed", "unknown setting; did you mean 'seed'"),
    ],
)
def test_keys_that_cannot_be_set(key, message, llama, tmp_path):
    with pytest.raises(SettingError, match=message):
        read_recipe(write(tmp_path, content(llama)), {key: 1})


def test_a_check_opens_files_and_writes_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [step.name for step in check(Recipe(**content(llama)))] == ["first", "2-merge"]
    bad = content(llama)
    bad["steps"][0]["pool"] = [str(tmp_path / "nothing")]
    with pytest.raises(GermaneError, match="no such folder"):
        check(Recipe(**bad))
    assert not list(tmp_path.iterdir())


def waiting(llama, tmp_path: Path, kind: str) -> dict:
    """A recipe whose second step waits for the first and has a fault of its own."""
    value = content(llama)
    step = value["steps"][1]
    missing = str(tmp_path / "none.jsonl")
    if kind == "its data":
        step |= {"method": "frank-wolfe", "data": [f"count={missing}"]}
        step.pop("settings")
    elif kind == "no data":
        step |= {"method": "frank-wolfe"}
        step.pop("settings")
    elif kind == "records scored":
        value["evaluate"] = [{"name": "count", "path": missing}]
    elif kind == "fields":
        file = zoo.write_rows(tmp_path / "bad.jsonl", [{"txt": "w1"}])
        step["evaluate"] = [f"bad={file}"]
    elif kind == "a member":
        step["pool"] = ["step:first", str(tmp_path / "nowhere")]
    elif kind == "an adapter":
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
        step["pool"] = ["step:first", str(folder)]
    elif kind == "the base":
        step["base"] = str(tmp_path / "nowhere")
    else:
        step |= {"method": "slerp", "pool": ["step:first", *map(str, llama.members)], "settings": {}}
    return value


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("its data", "none.jsonl: no such file"),
        ("no data", "frank-wolfe: needs data: --data NAME=FILE"),
        ("records scored", "none.jsonl: no such file"),
        ("fields", "record 1: has no text in field 'text'; did you mean 'txt'"),
        ("a member", "nowhere: no such folder"),
        ("an adapter", "a IA3 adapter; only LoRA is a sum"),
        ("the base", "nowhere: no such folder"),
        ("the number of members", "slerp"),
    ],
)
def test_a_step_that_waits_is_checked_before_the_first(kind, message, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.job_class("merge"), "run", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(GermaneError) as caught:
        run(Recipe(**waiting(llama, tmp_path, kind)), tmp_path / "out")
    assert message in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_what_hangs_on_an_earlier_step_is_left_to_its_turn(llama, tmp_path):
    """Its base and head are results too; they cannot be opened yet, and are no fault."""
    value = content(llama)
    value["steps"][1] |= {"base": "step:first", "pool": [str(llama.members[2]), "step:first"]}
    data = {"name": "count", "path": llama.data.partition("=")[2], "head": "step:first"}
    value["steps"][1]["evaluate"] = [data]
    assert [step.name for step in check(Recipe(**value))] == ["first", "2-merge"]


def test_no_place_for_the_result(llama):
    with pytest.raises(SettingError, match="out: say where the result goes"):
        run(Recipe(**content(llama)))


def test_fail_on_keeps_the_result(llama, tmp_path):
    value = content(llama, fail_on=["no-effect"])
    value["steps"][1]["settings"] = {"scale": 0}
    with pytest.raises(EffectError, match="no-effect: the merged weights equal the base's") as caught:
        run(Recipe(**value), tmp_path / "out")
    assert caught.value.exit_code == 3
    assert (tmp_path / "out" / "evidence.json").exists()


# Stopped and taken up again.


@pytest.fixture
def stopped(llama, tmp_path, monkeypatch):
    """A run that dies in its second step; what ran is in the list."""
    ran: list[str] = []
    original = recipes.job_class("merge").run

    def counted(job, method, *arguments):
        ran.append(method.name)
        return original(job, method, *arguments)

    monkeypatch.setattr(recipes.job_class("merge"), "run", counted)

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("germane.tasks.merge.task_arithmetic.TaskArithmetic.combine", dies)
        with pytest.raises(KeyboardInterrupt):
            run(Recipe(**content(llama)), tmp_path / "out")
    assert ran == ["merge/average", "merge/task-arithmetic"]
    assert not (tmp_path / "out").exists()
    assert sorted(e.name for e in (tmp_path / "out.partial").iterdir()) == [".lock", "first"]
    ran.clear()
    return ran


def test_a_resumed_run_does_not_do_the_first_step_again(stopped, llama, tmp_path):
    result = run(Recipe(**content(llama)), tmp_path / "out", resume=True)
    assert stopped == ["merge/task-arithmetic"]
    run(Recipe(**content(llama)), tmp_path / "whole")
    assert zoo.same_bytes(weights(result.folder), weights(tmp_path / "whole"))
    assert [step.method for step in result.evidence.steps] == ["merge/average", "merge/task-arithmetic"]


def test_without_resume_it_starts_clean(stopped, llama, tmp_path):
    run(Recipe(**content(llama)), tmp_path / "out")
    assert len(stopped) == 2


@pytest.mark.parametrize("change", ["settings", "seed", "pool"])
def test_a_changed_step_is_done_again_and_those_after_it(change, llama, tmp_path, monkeypatch):
    """Both steps are finished, the run dies before the end; the first is changed."""
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(Recipe(**content(llama)), tmp_path / "out")
    value = content(llama)
    if change == "seed":
        value["seed"] = 1
    elif change == "settings":
        value["steps"][0]["settings"] = {"weights": [3, 1]}
    else:
        value["steps"][0]["pool"] = value["steps"][0]["pool"][::-1][:1]
    result = run(Recipe(**value), tmp_path / "out", resume=True)
    run(Recipe(**value), tmp_path / "whole")
    assert zoo.same_bytes(weights(result.folder), weights(tmp_path / "whole"))


def test_a_finished_run_is_not_run_over(llama, tmp_path):
    run(Recipe(**content(llama)), tmp_path / "out")
    before = zoo.digest([tmp_path / "out"])
    with pytest.raises(GermaneError, match="is there already"):
        run(Recipe(**content(llama)), tmp_path / "out", resume=True)
    assert zoo.digest([tmp_path / "out"]) == before
    shutil.rmtree(tmp_path / "out")
