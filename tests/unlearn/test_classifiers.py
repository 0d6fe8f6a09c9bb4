"""Methods of unlearning for classifiers, on numbers worked out independently and on the digits.

`tests/fixtures/unlearn_classifiers.json` holds numbers from the official code, and says which
repository, commit and call. Not held to them, and why: boundary expanding, whose row begins at random;
and random labels, which the official code draws from all classes and goes through in another order.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from germane.core.errors import RecordsError, SettingError
from germane.core.evidence import Step
from germane.core.models import Loaded, load_model
from germane.core.objective import Task
from germane.core.records import Data, read_rows
from germane.core.rows import RowClassifier, RowConfig
from germane.method import build
from germane.recipe import run_task
from germane.tasks.unlearn._unlearner import Work
from germane.tasks.unlearn.boundary_shrink import BoundaryShrink
from germane.tasks.unlearn.influence import gradient_sum, influence_gradient, woodfisher
from germane.tasks.unlearn.l1_sparse import l1_norm
from germane.tasks.unlearn.prune_first import largest
from germane.tasks.unlearn.salun import SalUn, saliency, top_share

FIXTURES = json.loads((Path(__file__).parent.parent / "fixtures" / "unlearn_classifiers.json").read_text())
FAST = {"optimiser": "sgd", "learning_rate": 0.05, "weight_decay": 5e-4, "epochs": 3}


def entry(name: str) -> tuple[Any, Any]:
    return FIXTURES[name]["inputs"], FIXTURES[name]["outputs"]


def classifier(weights) -> RowClassifier:
    """The network of the fixtures."""
    inputs, hidden = len(weights["layers.0.weight"][0]), len(weights["layers.0.weight"])
    features = [f"x{number}" for number in range(inputs)]
    model = RowClassifier(RowConfig(features=features, hidden=[hidden], num_labels=3))
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return model.eval()


def task_of(model: RowClassifier, values, labels=None) -> Task:
    rows = [dict(zip(model.config.features, row, strict=True)) for row in values]
    if labels is not None:
        rows = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
    return Task(Data(name="rows", path="rows"), rows, model, None)


def small_work(tmp_path: Path, retain: bool = True, labels=True) -> Work:
    inputs, _ = entry("Wfisher")
    model = classifier(inputs["weights"])
    forget = task_of(model, inputs["forget"], inputs["forget_labels"] if labels else None)
    kept = task_of(model, inputs["retain"], inputs["retain_labels"]) if retain else None
    loaded = Loaded(model, None, tmp_path)
    return Work(loaded, forget, kept, lambda: loaded, "", 3, new_step(), tmp_path)


def digit_work(digits, tmp_path: Path, seed: int = 0) -> Work:
    loaded = load_model(str(digits.model))
    forget, retain = (
        Task(data, read_rows(data), loaded.model, None)
        for data in (Data(name=part, path=str(digits.files[part])) for part in ("forget", "retain"))
    )
    return Work(
        loaded, forget, retain, lambda: load_model(str(digits.model)), "", seed, new_step(), tmp_path
    )


def new_step() -> Step:
    return Step(task="unlearn", method="unlearn/salun")


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_every_entry_says_where_it_comes_from():
    for name, item in FIXTURES.items():
        assert {"repository", "commit", "call", "inputs", "outputs"} <= item.keys(), name


# random labels


def test_a_drawn_label_is_never_the_right_one_and_every_other_is_as_likely():
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(30_000)
    drawn = build("unlearn/random-labels", {}).draw(labels, 4)
    counts = torch.zeros(4, 4).index_put((labels, drawn), torch.ones(len(labels)), accumulate=True)
    assert counts.diagonal().eq(0).all()
    others = counts[~torch.eye(4, dtype=torch.bool)]
    assert (others / 10_000 - 1).abs().max() < 0.05


def test_the_released_form_draws_the_right_label_too():
    torch.manual_seed(0)
    labels = torch.full((20_000,), 2)
    drawn = build("unlearn/random-labels", {"any_label": True}).draw(labels, 4)
    assert drawn.bincount(minlength=4).float().div(5_000).sub(1).abs().max() < 0.05


def test_labels_are_drawn_anew_in_every_epoch(tmp_path, monkeypatch):
    method = build("unlearn/random-labels", {"epochs": 2, "batch_size": 10})
    drawn, draw = [], type(method).draw
    monkeypatch.setattr(type(method), "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    method.unlearn(small_work(tmp_path))
    assert len(drawn) == 2
    assert not torch.equal(*drawn)


def test_random_labels_do_without_records_to_keep_but_not_without_labels(tmp_path):
    build("unlearn/random-labels", {"epochs": 1}).unlearn(small_work(tmp_path, retain=False))
    with pytest.raises(RecordsError, match="no label is wrong"):
        build("unlearn/random-labels", {}).unlearn(small_work(tmp_path, labels=False))


# salun


@pytest.mark.parametrize("share", ["0.1", "0.3", "0.5", "0.9"])
def test_the_mask_is_the_official_one(share):
    inputs, outputs = entry("save_gradient_ratio")
    task = task_of(classifier(inputs["weights"]), inputs["forget"], inputs["forget_labels"])
    mask = top_share(saliency(task, inputs["batch_size"]), float(share))
    assert {name: value.int().tolist() for name, value in mask.items()} == outputs[share]


def test_the_mask_is_exactly_the_top_share_of_all_parameters_together():
    generator = np.random.default_rng(0)
    values = {"a": generator.random((7, 11)), "b": generator.random(13), "c": np.zeros((3, 3))}
    mask = top_share({name: torch.tensor(value) for name, value in values.items()}, 0.25)
    threshold = np.sort(np.concatenate([value.ravel() for value in values.values()]))[-24]  # 24 of 99
    assert {n: m.tolist() for n, m in mask.items()} == {
        n: (v >= threshold).tolist() for n, v in values.items()
    }
    assert sum(int(m.sum()) for m in top_share({"c": torch.zeros(9)}, 0.5).values()) == 4


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_weights_outside_the_mask_stay_to_the_bit(tmp_path, optimiser):
    work = small_work(tmp_path)
    before = weights_of(work.model)
    settings = {**FAST, "optimiser": optimiser, "momentum": 0.9, "weight_decay": 0.1, "share": 0.3}
    method = build("unlearn/salun", settings)
    mask = method.mask(work)
    method.unlearn(work)
    for name, after in weights_of(work.model).items():
        assert torch.equal(after[~mask[name]], before[name][~mask[name]])
        assert (after[mask[name]] != before[name][mask[name]]).all()


def test_with_all_weights_salun_is_random_labels(tmp_path):
    moved = []
    for name, more in (("unlearn/salun", {"share": 1.0}), ("unlearn/random-labels", {})):
        work = small_work(tmp_path)
        build(name, {**FAST, **more}).unlearn(work)
        moved.append(weights_of(work.model))
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[0])


def test_adapters_and_masks_do_not_go_together():
    with pytest.raises(SettingError, match="lora_rank"):
        build("unlearn/salun", {"lora_rank": 4})


class RandomMask(SalUn):
    """As many weights, but any: what must fail."""

    def mask(self, work: Work) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(work.seed)
        noise = {n: torch.rand(p.shape, generator=generator) for n, p in work.model.named_parameters()}
        return top_share(noise, self.share)


class Complement(SalUn):
    """All weights but the salient ones: what must fail too."""

    def mask(self, work: Work) -> dict[str, torch.Tensor]:
        return {name: ~value for name, value in super().mask(work).items()}


def test_two_percent_of_salient_weights_forget_a_digit_and_other_weights_do_not(digits, tmp_path):
    wrong, kept = {}, {}
    for name, kind, share in (
        ("salient", SalUn, 0.02),
        ("random", RandomMask, 0.02),
        ("rest", Complement, 0.5),
    ):
        scores = []
        for seed in (0, 1, 2):
            work = digit_work(digits, tmp_path, seed)
            kind.model_validate({**FAST, "share": share, "batch_size": 64}).unlearn(work)
            scores.append([task.score("result").value for task in (work.forget, work.kept())])
        wrong[name], kept[name] = (1 - np.array(scores)[:, 0], np.array(scores)[:, 1])
    assert wrong["salient"].min() > 0.95
    assert wrong["random"].mean() < 0.6
    assert wrong["rest"].max() < 0.1
    assert kept["salient"].mean() > 0.93


# retrain


def test_retrain_starts_from_the_initial_weights_and_never_sees_the_forget_records(digits, tmp_path):
    work = digit_work(digits, tmp_path)
    work.initial = str(digits.model / "initial")
    build("unlearn/retrain", {"epochs": 0}).unlearn(work)
    initial = weights_of(load_model(work.initial).model)
    assert all(torch.equal(value, initial[name]) for name, value in weights_of(work.model).items())
    work.forget.rows = []
    build("unlearn/retrain", {"epochs": 10}).unlearn(work)
    assert work.kept().score("result").value > 0.97
    holdout = Data(name="holdout", path=str(digits.files["holdout"]))
    assert Task(holdout, read_rows(holdout), work.model, None).score("result").value < 0.05


def test_retrain_from_nothing_depends_on_the_seed_alone(digits, tmp_path):
    made = []
    for seed in (1, 1, 2):
        work = digit_work(digits, tmp_path, seed)
        build("unlearn/retrain", {"epochs": 0}).unlearn(work)
        made.append(weights_of(work.model)["classifier.weight"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_retrain_is_run_once_however_many_trials_are_allowed(digits, tmp_path):
    asked = {
        "model": str(digits.model), "forget": str(digits.files["forget"]),
        "retain": str(digits.files["retain"]), "trials": 3,
    }  # fmt: skip
    result = run_task("unlearn", "retrain", asked, {"epochs": 5}, tmp_path / "out", seed=1)
    assert not result.evidence.steps[0].tables
    assert "no-search" not in {finding.code for finding in result.findings}


# influence


def test_the_influence_step_against_numpy():
    """The recursion and the gradient's weighting, written out again in numpy."""
    generator = np.random.default_rng(1)
    forget, retain = generator.normal(size=(3, 6)), generator.normal(size=(9, 6))
    begin = forget.sum(0) / 12 - 3 / (12 * 9) * retain.sum(0)
    ours = influence_gradient(torch.tensor(forget.sum(0)), torch.tensor(retain.sum(0)), 3, 9)
    np.testing.assert_allclose(ours.numpy(), begin, atol=1e-12)
    samples = 4
    o, k = retain[0], begin
    for g in retain[1 : samples + 2]:
        tau = o @ g
        k, o = k - (k @ g) / (samples + tau) * o, o - tau / (samples + tau) * o
    result = woodfisher(ours, iter(torch.tensor(retain)), samples)
    np.testing.assert_allclose(result.numpy(), k, atol=1e-12)


def test_gradients_are_summed_over_records_whatever_the_batch(tmp_path):
    task = small_work(tmp_path).forget
    sums = [gradient_sum(task, size) for size in (1, 4, 10)]
    for value in sums[1:]:
        torch.testing.assert_close(value, sums[0])


def test_the_recursion_is_the_official_one():
    inputs, outputs = entry("woodfisher")
    task = task_of(classifier(inputs["weights"]), inputs["retain"], inputs["retain_labels"])
    singles = (gradient_sum(one, 1) for one in one_by_one(task))
    result = woodfisher(torch.tensor(inputs["v"]), singles, 1000)
    np.testing.assert_allclose(result.numpy(), outputs["result"], atol=1e-5)


def one_by_one(task: Task):
    rows = task.rows
    for row in rows:
        task.rows = [row]
        yield task


def test_the_whole_influence_step_is_the_official_one(tmp_path):
    inputs, outputs = entry("Wfisher")
    work = small_work(tmp_path)
    build("unlearn/influence", {"alpha": inputs["alpha"], "batch_size": 4}).unlearn(work)
    for name, value in weights_of(work.model).items():
        np.testing.assert_allclose(value.numpy(), outputs["weights"][name], atol=1e-5)


# boundaries


def test_the_image_a_step_away_is_the_official_one():
    inputs, outputs = entry("FGSM_perturb")
    images, labels = torch.tensor(inputs["images"]), torch.tensor(inputs["labels"])
    moving = images.clone().requires_grad_(True)
    logits = classifier(inputs["weights"])(moving).logits
    gradient = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), moving)[0]
    method = build("unlearn/boundary-shrink", {"bound": inputs["bound"]})
    assert isinstance(method, BoundaryShrink)
    plain = SimpleNamespace(processor=SimpleNamespace(do_normalize=False))
    ours = method._away(plain, images[:, None, None], gradient.sign()[:, None, None])
    np.testing.assert_allclose(ours[:, 0, 0].numpy(), outputs["images"], atol=1e-5)
    normal = SimpleNamespace(do_normalize=True, image_mean=[0.5], image_std=[0.25])
    scaled = (images[:, None, None] - 0.5) / 0.25
    ours = method._away(SimpleNamespace(processor=normal), scaled, gradient.sign()[:, None, None])
    np.testing.assert_allclose((ours * 0.25 + 0.5)[:, 0, 0].numpy(), outputs["images"], atol=1e-5)


def test_boundary_labels_are_the_likeliest_wrong_class_a_step_away(digits, tmp_path):
    """The gradient written out for a linear classifier, whose loss falls along W^T (p - y)."""
    generator = np.random.default_rng(2)
    weight, bias = generator.normal(size=(3, 4)), generator.normal(size=3)
    values, labels, scales = generator.normal(size=(8, 4)), generator.integers(3, size=8), np.arange(1, 5)
    config = RowConfig(features=list("abcd"), hidden=[], scales=scales.tolist(), num_labels=3)
    model = RowClassifier(config).eval()
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor(weight))
        model.classifier.bias.copy_(torch.tensor(bias))
    task = task_of(model, values.tolist(), labels.tolist())
    ours = build("unlearn/boundary-shrink", {"bound": 0.3}).neighbours(task, next(task.batches(8)))

    logits = values / scales @ weight.T + bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    step = 0.3 * scales * np.sign((p - np.eye(3)[labels]) @ weight / scales)
    away = (values + step) / scales @ weight.T + bias
    away[np.arange(8), labels] = -np.inf
    assert ours.tolist() == away.argmax(1).tolist()
    assert not (ours.numpy() == labels).any()


def test_boundary_shrink_gives_records_to_the_neighbours_of_the_untouched_model(digits, tmp_path):
    work = digit_work(digits, tmp_path)
    method = build("unlearn/boundary-shrink", {"learning_rate": 1e-3})
    batch = next(work.forget.batches(len(work.forget.rows)))
    neighbours = method.neighbours(work.forget, batch)
    method.unlearn(work)
    with torch.no_grad():
        assert (work.forget.logits(batch).argmax(1) == neighbours).float().mean() > 0.9


def test_boundary_expand_trains_a_further_class_and_leaves_the_model_its_form(digits, tmp_path):
    work = digit_work(digits, tmp_path)
    shapes = {name: value.shape for name, value in work.model.state_dict().items()}
    method = build("unlearn/boundary-expand", {"learning_rate": 1e-3})
    method.unlearn(work)
    assert {name: value.shape for name, value in work.model.state_dict().items()} == shapes
    batch = next(work.forget.batches(len(work.forget.rows)))
    with torch.no_grad():
        expanded, plain = method.expanded(work.forget, batch), work.forget.logits(batch)
    assert expanded.shape[1] == 11
    assert torch.equal(expanded[:, :10], plain)
    assert (expanded.argmax(1) == 10).float().mean() > 0.95


# l1-sparse


def test_the_price_falls_linearly_to_the_plain_epochs():
    method = build("unlearn/l1-sparse", {"gamma": 0.8, "epochs": 6, "plain_epochs": 2})
    assert [method.price(epoch) for epoch in range(6)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])
    assert build("unlearn/l1-sparse", {"gamma": 0.8, "epochs": 2, "plain_epochs": 2}).price(1) == 0.8


def test_the_norm_is_the_official_one():
    inputs, outputs = entry("l1_regularization")
    assert l1_norm(classifier(inputs["weights"])).item() == pytest.approx(outputs["norm"], abs=1e-5)


def test_a_step_of_l1_is_that_of_the_loss_and_the_sign_of_the_weights(tmp_path):
    """One batch, one step of plain gradient descent."""
    work = small_work(tmp_path)
    before = weights_of(work.model)
    parts = gradient_sum(work.kept(), 12).div(12).split([value.numel() for value in before.values()])
    settings = {"gamma": 0.2, "epochs": 1, "plain_epochs": 0, "batch_size": 12, "momentum": 0.0}
    build("unlearn/l1-sparse", {**settings, "learning_rate": 0.1}).unlearn(work)
    for (name, after), gradient in zip(weights_of(work.model).items(), parts, strict=True):
        expected = before[name] - 0.1 * (gradient.view_as(after) + 0.2 * before[name].sign())
        torch.testing.assert_close(after, expected)


# prune-first


def test_the_smallest_weights_of_all_layers_are_zero_and_stay_so(tmp_path):
    work = small_work(tmp_path)
    before = weights_of(work.model)
    matrices = {name: value.abs().numpy() for name, value in before.items() if name.endswith("weight")}
    threshold = np.sort(np.concatenate([value.ravel() for value in matrices.values()]))[-14]  # 0.4 of 35
    kept = largest(work.model, 0.4)
    assert {n: m.tolist() for n, m in kept.items()} == {
        n: (v >= threshold).tolist() for n, v in matrices.items()
    }
    settings = {"sparsity": 0.6, "optimiser": "sgd", "learning_rate": 0.05, "weight_decay": 0.1}
    build("unlearn/prune-first", {**settings, "epochs": 3}).unlearn(work)
    after = weights_of(work.model)
    for name, mask in kept.items():
        assert (after[name][~mask] == 0).all()
        assert (after[name][mask] != before[name][mask]).any()
    assert not torch.equal(after["classifier.bias"], before["classifier.bias"])
