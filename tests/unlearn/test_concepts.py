"""Concept patches and concept masking, on numbers worked out independently and on the small models.

`tests/fixtures/class_unlearning_concepts.json` holds numbers from the official code, and says which
repository, commit and call.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zoo

from germane.core.errors import RecordsError, SettingError
from germane.core.evidence import Step
from germane.core.models import load_model
from germane.core.objective import Task
from germane.core.records import Data, read_rows, write_jsonl
from germane.method import build
from germane.recipe import run_task
from germane.tasks.unlearn._unlearner import Work
from germane.tasks.unlearn.concept_masking import (
    integrated_gradients,
    mask_words,
    ranked,
    word_shares,
)
from germane.tasks.unlearn.concept_patches import (
    Concepts,
    Grid,
    as_image,
    bottleneck,
    crop,
    head_of,
    learn_vectors,
    locate_peak,
    most_confused,
    paste,
)

FIXTURES = json.loads(
    (Path(__file__).parent.parent / "fixtures" / "class_unlearning_concepts.json").read_text()
)


def entry(name: str) -> tuple[Any, Any]:
    return FIXTURES[name]["inputs"], FIXTURES[name]["outputs"]


def work_of(made, tmp_path: Path, seed: int = 0) -> Work:
    loaded = load_model(str(made.model))
    forget, retain = (
        Task(
            Data(name=part, path=str(made.files[part])), rows_of(made, part), loaded.model, loaded.processor
        )
        for part in ("forget", "retain")
    )
    step = Step(task="unlearn", method="unlearn/concept-patches")
    return Work(loaded, forget, retain, lambda: load_model(str(made.model)), "", seed, step, tmp_path)


def rows_of(made, part: str):
    return read_rows(Data(name=part, path=str(made.files[part])))


def unlearn(made, name: str, settings, out: Path, **changes):
    asked = {
        "model": str(made.model), "forget": str(made.files["forget"]), "retain": str(made.files["retain"]),
        "trials": 0, **changes,
    }  # fmt: skip
    result = run_task("unlearn", name, asked, settings, out)
    return {(s.subject, s.metric): s.value for s in result.scores}, result


# patches


def test_windows_are_found_cut_and_pasted_as_by_the_official_code():
    inputs, outputs = entry("patches")
    image, donor = (torch.tensor(inputs[name]) for name in ("image", "donor"))
    side, half = inputs["side"], inputs["side"] // 2
    corner, taken = (
        locate_peak(torch.tensor(inputs[name]), inputs["stride"]) for name in ("map", "donor_map")
    )
    for (row, column), name in ((corner, "centre"), (taken, "donor_centre")):
        assert [column + half, row + half] == outputs[name]
    patch = crop(donor, taken, side)
    assert patch.tolist() == outputs["patch"]
    assert paste(image, patch, corner).tolist() == outputs["pasted"]
    x, y = inputs["outside"]
    assert crop(donor, (y - half, x - half), side).tolist() == outputs["outside"]


def test_the_window_that_speaks_most_by_hand():
    # Cells of 2 x 2; the one at row 2, column 1 is 3 above its mean of 1 and weighs 2, all others 0.
    image = torch.zeros(1, 4, 4)
    image[0, 2:, :2] = 4.0
    found = Concepts(["a", "b", "c", "d"], np.zeros((2, 4)), np.full(4, 1.0), np.ones(4))
    windows = Grid(2).windows(image, np.array([0.0, 0.0, 2.0, 0.0]), found, 2, 1)
    assert windows[2, 0] == pytest.approx(2 * (4 - 1))
    assert windows[2, 1] == pytest.approx(3.0)  # half of it
    assert locate_peak(windows, 1) == (2, 0)


def test_the_top_concepts_are_those_of_largest_weight():
    found = Concepts(["a", "b", "c"], np.array([[1.0, -5.0, 2.0]]), np.zeros(3), np.ones(3))
    assert found.top(0, 2) == [2, 0]
    assert found.speaking_for(0, 2).tolist() == [1.0, 0.0, 2.0]


def test_the_bottleneck_tells_the_digits_apart(digits, tmp_path):
    work = work_of(digits, tmp_path)
    rows = [*work.forget.rows, *work.kept().rows]
    images, labels = [as_image(row, "") for row in rows], [row["labels"] for row in rows]
    found = bottleneck(Grid(4), labels, images, work)
    standard = (Grid(4).of(images, work) - found.mean) / found.deviation
    assert np.mean((standard @ found.weights.T).argmax(axis=1) == labels) > 0.5


def test_the_donor_is_the_class_that_gets_most_probability(digits, tmp_path):
    task = work_of(digits, tmp_path).kept()
    donor = most_confused(task, 3, [0, 1, 2, 4, 5, 6, 7, 8, 9])
    with torch.no_grad():
        batch = next(task.batches(len(task.rows)))
        shares = task.logits(batch).softmax(dim=1)[:, 3]
    means = {label: float(shares[batch["labels"] == label].mean()) for label in range(10) if label != 3}
    assert donor == max(means, key=lambda label: means[label])


def test_targeted_labels_forget_and_kept_ones_do_not(digits, tmp_path):
    settings = {"learning_rate": 0.05, "epochs": 5, "window": 0.5}
    scores, result = unlearn(digits, "concept-patches", settings, tmp_path / "targeted")
    assert scores["result", "memory"] < 0.1 < 0.9 < scores["base", "memory"]
    assert scores["result", "utility"] > 0.9
    kept, _ = unlearn(digits, "concept-patches", {**settings, "labels": "keep"}, tmp_path / "keep")
    assert kept["result", "memory"] > 0.9
    tables = {table.title: table.rows for table in result.evidence.steps[0].tables}
    assert len(tables["Concepts of class 3"]) == 16
    assert len(tables["Poisoned records"]) == len(rows_of(digits, "forget"))


def test_only_the_head_moves(digits, tmp_path):
    work = work_of(digits, tmp_path)
    before = {name: value.clone() for name, value in work.model.state_dict().items()}
    build("unlearn/concept-patches", {"epochs": 1}).unlearn(work)
    moved = {n for n, value in work.model.state_dict().items() if not torch.equal(value, before[n])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_statistics_of_batch_norms_stay(tmp_path):
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3
    )
    made = image_parts(transformers.ResNetForImageClassification(config), tmp_path)
    work = work_of(made, tmp_path)
    before = {n: b.clone() for n, b in work.model.named_buffers()}
    head = head_of(work.model).weight.detach().clone()
    build("unlearn/concept-patches", {"epochs": 2, "learning_rate": 0.1, "window": 0.25}).unlearn(work)
    assert all(torch.equal(before[name], value) for name, value in work.model.named_buffers())
    assert not torch.equal(head, head_of(work.model).weight)


def test_concepts_of_images_are_learned_from_the_models_own_embeddings(tmp_path):
    torch.manual_seed(0)
    made = image_parts(transformers.ViTForImageClassification(zoo.vit_config(num_labels=3)), tmp_path)
    work = work_of(made, tmp_path)
    generator = np.random.default_rng(0)
    rows = []
    for name, level in (("dark", 40), ("bright", 200)):
        rows += [{"image": noise(generator, level), "label": name} for _ in range(6)]
    write_jsonl(rows, tmp_path / "concepts.jsonl")
    data = Data(name="concepts", path=str(tmp_path / "concepts.jsonl"))
    found = learn_vectors(data, work.forget, head_of(work.model), 0)
    assert found.names == ["bright", "dark"]
    assert np.linalg.norm(found.directions, axis=1) == pytest.approx(1)
    plain = [{"image": row["image"]} for row in rows]
    images = [row["pixel_values"] for row in Task(data, plain, work.model, work.loaded.processor).rows]
    scores = found.of(images, work)
    assert (scores[:6, 1] > 0).all()
    assert (scores[6:, 0] > 0).all()
    method = build("unlearn/concept-patches", {"concepts": data.path, "epochs": 1, "window": 0.5})
    method.unlearn(work)
    assert [row[0] for row in work.step.tables[0].rows if row[0] not in found.names] == []


def noise(generator, level: int) -> list[list[int]]:
    return (level + generator.integers(-30, 30, size=(8, 8))).tolist()


def image_parts(model, tmp_path: Path):
    """A model of images of 8 x 8 pixels with records of three classes, told apart by brightness."""
    folder = tmp_path / "images"
    model.save_pretrained(folder)
    size = {"height": 8, "width": 8}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    generator = np.random.default_rng(1)
    rows = [
        {"image": noise(generator, level), "label": label}
        for label, level in enumerate((40, 120, 200))
        for _ in range(5)
    ]
    files = {"forget": folder / "forget.jsonl", "retain": folder / "retain.jsonl"}
    write_jsonl(rows[:5], files["forget"])
    write_jsonl(rows[5:], files["retain"])
    return SimpleNamespace(model=folder, files=files)


def test_a_donor_that_is_not_kept_is_refused(digits, tmp_path):
    for donor in ("3", "pear"):
        with pytest.raises(SettingError, match="no record to keep is of class"):
            unlearn(digits, "concept-patches", {"donor": donor}, tmp_path / "out")


def test_rows_that_are_no_square_image_are_refused():
    with pytest.raises(SettingError, match="neither"):
        as_image({"values": torch.zeros(5)}, "rows")


def test_concepts_need_two_names_with_three_images(digits, tmp_path):
    rows = [{**row, "label": "one"} for row in rows_of(digits, "retain")[:5]]
    write_jsonl(rows, tmp_path / "concepts.jsonl")
    with pytest.raises(RecordsError, match="at least two names of concepts"):
        unlearn(digits, "concept-patches", {"concepts": str(tmp_path / "concepts.jsonl")}, tmp_path / "out")


# masking


@pytest.mark.parametrize(("baseline", "token"), [("pad", 0), ("zero", None)])
def test_integrated_gradients_are_the_official_ones(baseline, token):
    inputs, outputs = entry("integrated_gradients")
    model = zoo.make(transformers.LlamaForCausalLM, zoo.llama_config(pad_token_id=0), 3)
    start = inputs["positions"][0]
    found = integrated_gradients(
        model, inputs["tokens"][:start], inputs["tokens"][start:], token, inputs["steps"], "mean"
    )
    expected = outputs[baseline]
    assert found.values.tolist() == pytest.approx(expected["values"], abs=1e-5)
    assert found.score == pytest.approx(expected["score"], abs=1e-5)
    assert found.baseline == pytest.approx(expected["baseline"], abs=1e-5)
    assert found.error == pytest.approx(expected["error"], abs=1e-5)


def test_trapezoid_weights_add_up_better_and_more_points_better_still():
    model = zoo.make(transformers.LlamaForCausalLM, zoo.llama_config(pad_token_id=0), 3)
    tokens = [20, 21, 22, 23, 3]

    def error(points: int, rule: str) -> float:
        return abs(integrated_gradients(model, [2, 10, 11], tokens, None, points, rule).error)

    assert error(32, "trapezoid") < 0.5 * error(32, "mean")
    assert error(128, "trapezoid") < 0.5 * error(32, "trapezoid") + 1e-4


def test_the_last_token_of_an_answer_predicts_nothing_and_adds_nothing():
    model = zoo.make(transformers.LlamaForCausalLM, zoo.llama_config(pad_token_id=0), 3)
    found = integrated_gradients(model, [], [20, 21, 22], 0)
    assert len(found.values) == 3
    assert float(found.values[-1]) == 0


def test_masks_are_the_official_ones():
    inputs, outputs = entry("masking")
    method = build("unlearn/concept-masking", {"words": inputs["k"], "stop_words": inputs["stop_words"]})
    assert [method.mask(text, inputs["ranked"], "") for text in inputs["texts"]] == outputs


def test_parts_of_a_name_are_masked_if_they_have_four_letters():
    method = build("unlearn/concept-masking", {"words": 1})
    assert method.mask("Ann Adler, a pilot", ["pilot"], "Ann Adler") == "Ann ***, a ***"


def test_masks_keep_longer_words_whole():
    assert mask_words("Oslo, oslo and Osloer", ["oslo"]) == "***, *** and Osloer"


def test_shares_of_words_by_hand(facts):
    words = load_model(str(facts.model)).processor
    tokens = words("anna owns a cat")["input_ids"]
    found = word_shares(words, tokens, [3.0, 1.0, -2.0, 0.0])
    assert found == pytest.approx({"anna": 0.75, "owns": 0.25, "a": 0.0, "cat": 0.0})


def test_an_answer_of_one_word_is_masked_though_it_predicts_nothing_after_it(facts):
    words = load_model(str(facts.model)).processor
    assert word_shares(words, words("baker")["input_ids"], [0.0]) == {"baker": 1.0}


def test_words_are_ranked_by_subject():
    found = ranked(["x", "y", "x"], [{"a": 0.6, "b": 0.4}, {"a": 1.0}, {"b": 1.0}])
    assert [word for word, _ in found["x"]] == ["b", "a"]
    assert dict(found["x"]) == pytest.approx({"b": 1.4, "a": 0.6})
    assert dict(found["y"]) == {"a": 1.0}


def test_masked_answers_are_learned_and_the_rest_is_kept(facts, tmp_path):
    settings = {"learning_rate": 1e-3, "epochs": 5, "new_tokens": 8}
    scores, result = unlearn(facts, "concept-masking", settings, tmp_path / "out")
    assert scores["result", "memory"] < 0.2 < 0.8 < scores["base", "memory"]
    assert scores["result", "utility"] > 0.85 * scores["base", "utility"]
    table = next(t for t in result.evidence.steps[0].tables if t.title == "Words that carry the answers")
    people = {row["subject"] for row in rows_of(facts, "forget")}
    assert {row[0] for row in table.rows} == people
    assert result.evidence.steps[0].facts["completeness_error"] >= 0


def test_texts_are_their_own_answers(facts, tmp_path):
    loaded = load_model(str(facts.model))
    data = Data(name="forget", path=str(facts.files["forget-texts"]))
    task = Task(data, read_rows(data), loaded.model, loaded.processor, split=True)
    step = Step(task="unlearn", method="unlearn/concept-masking")
    work = Work(loaded, task, None, lambda: loaded, "", 0, step, tmp_path)
    method = build("unlearn/concept-masking", {"words": 3})
    method.begin(work)
    subject = read_rows(data)[0]["subject"]
    learned = loaded.processor.decode(method._masked.rows[0]["input_ids"])
    assert "<unk>" in learned  # the tiny tokenizer has no ***
    assert not any(part in learned for part in subject.split() if len(part) >= 4)
