"""The search for worst-case forget sets, on numbers worked out independently and on the digits.

`tests/fixtures/worst_case_forget.json` holds numbers from the official code, and says which
repository, commit and call.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from germane.core.errors import RecordsError, SettingError, UnknownName
from germane.core.models import load_model
from germane.core.objective import Task
from germane.core.records import Data, read_rows, write_jsonl
from germane.method import build
from germane.recipe import run_task
from germane.tasks.evaluate.worst_case_forget import Units, largest, move_weights, project, sign_step

FIXTURES = json.loads((Path(__file__).parent.parent / "fixtures" / "worst_case_forget.json").read_text())
QUICK = {"size": 30, "random_sets": 2, "rounds": 5, "unlearner": "fine-tune"}
NOTHING = {"epochs": 0}  # an unlearner that leaves the model as it is


def entry(name: str) -> tuple[Any, Any]:
    return FIXTURES[name]["inputs"], FIXTURES[name]["outputs"]


def train_task(digits) -> Task:
    loaded = load_model(str(digits.model))
    data = Data(name="train", path=str(digits.files["retain"]))
    return Task(data, read_rows(data), loaded.model, None)


def measure(digits, out: Path, settings):
    data = [f"train={digits.files['retain']}", f"test={digits.files['test']}"]
    arguments = {"model": str(digits.model), "data": data}
    return run_task("evaluate", "worst-case-forget", arguments, {**QUICK, **settings}, out)


@pytest.fixture(scope="module")
def measured(digits, tmp_path_factory):
    return measure(digits, tmp_path_factory.mktemp("worst") / "out", {"unlearner_settings": NOTHING})


def items_of(result) -> list[dict[str, Any]]:
    lines = (result.folder / "items-result.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def members(items, name: str) -> list[dict[str, Any]]:
    return [item for item in items if name in item["set"]]


# projection


def test_a_projection_worked_out_by_hand():
    # With m = 0.4: 0.9 - 0.4, 0.6 - 0.4, and 1.7 - 0.4 clipped to 1 sum to 1.7; the last stays at 0.
    found = project(torch.tensor([0.9, 0.6, 1.7, -3.0], dtype=torch.float64), 1.7)
    assert found.tolist() == pytest.approx([0.5, 0.2, 1.0, 0.0], abs=1e-12)


def test_projections_are_the_official_ones():
    inputs, outputs = entry("bisection")
    for case, expected in zip(inputs, outputs, strict=True):
        found = project(torch.tensor(case["values"], dtype=torch.float64), case["total"])
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_projection_sums_to_the_total_where_the_official_one_misses_it():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(project(values, 500).sum()) == pytest.approx(500, abs=1e-9)


def test_a_projection_leaves_what_is_inside():
    inside = torch.tensor([0.25, 0.75, 0.5, 0.5], dtype=torch.float64)
    assert project(inside, 2).tolist() == pytest.approx(inside.tolist(), abs=1e-12)


# steps


def test_moves_of_the_weights_are_the_official_ones():
    inputs, outputs = entry("optimize_select")
    weights = torch.tensor(inputs["weights"], dtype=torch.float64)
    for name, sign in (("forward", 1), ("reverse", -1)):
        found = move_weights(
            weights,
            torch.tensor(inputs["losses"]),
            sign * inputs["step"],
            inputs["penalty"],
            inputs["size"],
        )
        assert found.tolist() == pytest.approx(outputs[name], abs=1e-5), name


def test_sign_steps_are_the_official_ones():
    inputs, outputs = entry("SignSGD")
    layer = torch.nn.Linear(3, 2)
    layer.load_state_dict({name: torch.tensor(inputs[name]) for name in ("weight", "bias")})
    losses = torch.nn.functional.cross_entropy(
        layer(torch.tensor(inputs["values"])), torch.tensor(inputs["labels"]), reduction="none"
    )
    sign_step(layer, (torch.tensor(inputs["kept"]) * losses).sum(), inputs["learning_rate"])
    for name, expected in outputs.items():
        assert torch.allclose(getattr(layer, name), torch.tensor(expected), atol=1e-6)


def test_a_weight_without_a_gradient_stays():
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    sign_step(layer, layer(torch.tensor([[1.0, 0.0]])).sum(), 0.5)
    assert (layer.weight - before)[0].tolist() == pytest.approx([-0.5, 0.0])


def test_a_record_leaves_a_set_only_if_the_step_times_the_losses_reaches_one():
    weights, losses = torch.tensor([1.0, 0.0]), torch.tensor([0.3, 0.1])
    assert largest(move_weights(weights, losses, 4.9, 0.0, 1), 1) == [0]  # 4.9 * 0.2 < 1
    assert largest(move_weights(weights, losses, 5.1, 0.0, 1), 1) == [1]


def test_classes_weigh_the_mean_of_their_records():
    units = Units(torch.tensor([0, 1, 0, 1, 1]), 2)
    assert units.mean(torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0])).tolist() == [2.0, 4.0]
    assert units.records([1]) == [1, 3, 4]


def test_of_equal_weights_the_first_are_taken():
    assert largest(torch.tensor([0.5, 1.0, 0.5, 0.5]), 2) == [0, 1]


# the search


def test_worst_sets_have_low_losses_and_easiest_ones_high(digits):
    task = train_task(digits)
    suite = build("evaluate/worst-case-forget", QUICK)
    units = Units(torch.arange(len(task.rows)), len(task.rows))
    worst, easiest = suite.search(task, units, 1.0), suite.search(task, units, -1.0)
    assert len(worst.chosen) == len(easiest.chosen) == 30
    assert float(worst.weights.sum()) == pytest.approx(30)
    assert worst.losses[-1] < 0.2 * worst.losses[0] < worst.losses[0] < 0.5 * easiest.losses[-1]


def test_a_step_too_short_moves_nothing(digits):
    task = train_task(digits)
    units = Units(torch.arange(len(task.rows)), len(task.rows))
    suite = build("evaluate/worst-case-forget", {**QUICK, "step_size": 1e-6})
    assert suite.search(task, units, 1.0).changed == [0.0] * 5


def test_the_search_leaves_the_model_as_it_was(digits):
    task = train_task(digits)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    units = Units(torch.arange(len(task.rows)), len(task.rows))
    build("evaluate/worst-case-forget", {**QUICK, "rounds": 1}).search(task, units, 1.0)
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())


def test_a_round_forgets_what_has_no_weight_in_its_loss(digits):
    task = train_task(digits)
    suite = build("evaluate/worst-case-forget", {**QUICK, "steps": 1})
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    suite.unlearn(task, torch.zeros(len(task.rows)), 1)
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())


# the suite


def test_an_unlearner_that_does_nothing_scores_what_the_model_did(measured, digits):
    items = items_of(measured)
    scores = {score.metric: score.value for score in measured.scores}
    assert scores["unlearning accuracy, worst case"] == scores["unlearning accuracy, lowest loss"] == 0
    lowest = members(items, "lowest loss")
    highest = members(items, "highest loss")
    assert max(item["score"] for item in lowest) <= min(
        item["score"] for item in items if item not in lowest
    )
    assert scores["unlearning accuracy, highest loss"] == pytest.approx(
        sum(item["score"] > 0.6932 for item in highest) / 30, abs=0.1
    )


def test_every_set_has_its_size_and_random_ones_are_pooled(measured):
    items = items_of(measured)
    names = {name for item in items for name in item["set"]}
    assert names == {"worst case", "easiest", "lowest loss", "highest loss", "random 1", "random 2"}
    assert {name: len(members(items, name)) for name in names} == dict.fromkeys(names, 30)
    assert {s.n for s in measured.scores if s.metric == "unlearning accuracy, random"} == {60}


def test_the_overlap_is_what_the_items_say(measured):
    shared = [i for i in members(items_of(measured), "worst case") if "lowest loss" in i["set"]]
    overlap = next(s.value for s in measured.scores if s.metric == "overlap with lowest loss")
    assert overlap == pytest.approx(len(shared) / 30)


def test_classes_are_forgotten_whole_and_not_tested(digits, tmp_path):
    settings = {"level": "class", "size": 2, "unlearner": "random-labels", "rounds": 2, "random_sets": 1}
    result = measure(digits, tmp_path / "out", {**settings, "unlearner_settings": {"epochs": 1}})
    items = items_of(result)
    for name in ("worst case", "easiest", "random 1"):
        inside = {item["answer"] for item in members(items, name)}
        assert len(inside) == 2
        assert not inside & {item["answer"] for item in items if name not in item["set"]}
    tested = next(s.n for s in result.scores if s.metric == "test accuracy, worst case")
    assert tested < len(digits.files["test"].read_text().splitlines())


def test_what_cannot_work_is_refused_before_work(digits, tmp_path):
    for settings, error, text in (
        ({"size": 5000}, SettingError, "leaves nothing to keep"),
        ({"level": "class", "size": 9}, SettingError, "leaves nothing to keep"),
        ({"unlearner": "fine-tun"}, UnknownName, "fine-tune"),
        ({"unlearner_settings": {"epoch": 1}}, SettingError, "epochs"),
    ):
        with pytest.raises(error, match=text):
            measure(digits, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_records_without_a_class_are_refused(digits, tmp_path):
    rows = read_rows(Data(name="rows", path=str(digits.files["retain"])))
    write_jsonl([{k: v for k, v in row.items() if k != "label"} for row in rows], tmp_path / "bare.jsonl")
    data = [f"train={tmp_path / 'bare.jsonl'}", f"test={digits.files['test']}"]
    with pytest.raises(RecordsError, match="has no class"):
        run_task(
            "evaluate",
            "worst-case-forget",
            {"model": str(digits.model), "data": data},
            {},
            tmp_path / "out",
        )
