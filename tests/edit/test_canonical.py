"""Canonical examples: losses, divergence and ball as the paper has them, on Backpacks and other models."""

from __future__ import annotations

import zoo  # first: sets the environment before transformers is imported

# isort: split
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from germane.core.backpack import BackpackConfig, BackpackForCausalLM
from germane.core.errors import CheckpointError, RecordsError, SettingError
from germane.core.models import load_model
from germane.core.objective import IGNORED, token_losses
from germane.core.records import Data
from germane.edited import Edit, Editing, load_edited
from germane.method import build
from germane.recipe import run_task
from germane.tasks.edit._canonical import Ball, General, divergence, example_losses, general_loss, padded
from germane.tasks.edit._records import read_edits
from germane.tasks.edit.backpack_ensemble import Shift
from germane.tasks.edit.sense_tuning import example_importance, importance

ORACLE = json.loads((Path(__file__).parents[1] / "fixtures" / "canonical_examples.json").read_text())
KINDS = ("good", "bad", "good-v-bad", "balance")
ROWS = [
    {"prompt": "w1 w2 w3", "answer": " w40"},
    {"prompt": "w7 w8", "answer": " w41", "other": " w9", "loss": "good-v-bad"},
]
EDITS = [Edit(id=str(number), **row) for number, row in enumerate(ROWS)]
SENSES = {"learning_rate": 0.5, "senses": 3, "background": 1.0, "ball": 0.5, "divergence_weight": 0.01}
FULL = {"learning_rate": 3e-3, "ball": 0.5, "divergence_weight": 0.01}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A Backpack and a Llama that learned to count, examples and general texts."""
    place = tmp_path_factory.mktemp("canonical")
    config = BackpackConfig(
        vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2, num_senses=4,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    backpack = zoo.train_language(zoo.make(BackpackForCausalLM, config), zoo.language_rows(1), 60)
    llama = zoo.make(transformers.LlamaForCausalLM, zoo.llama_config())
    zoo.train_language(llama, zoo.language_rows(1), 60)
    return SimpleNamespace(
        backpack=zoo.save(backpack, place / "backpack"),
        llama=zoo.save(llama, place / "llama"),
        edits=zoo.write_rows(place / "edits.jsonl", ROWS),
        general=zoo.write_rows(place / "general.jsonl", zoo.language_rows(1)),
    )


@pytest.fixture(scope="module")
def tuned(parts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The Backpack with its senses tuned."""
    return edit(parts, "sense-tuning", parts.backpack, SENSES, tmp_path_factory.mktemp("tuned") / "out")


def edit(parts: SimpleNamespace, method: str, model: Path, settings: dict[str, Any], out: Path) -> Any:
    asked = {"model": str(model), "edits": str(parts.edits), "general": str(parts.general)}
    return run_task("edit", method, asked, settings, out)


@torch.no_grad()
def losses(folder: Path) -> list[float]:
    _, opened = load_edited(str(folder))
    return example_losses(opened.model.eval(), opened.tokenizer, EDITS).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_official_code(kind):
    means, sums = [], []
    for tokens, logits in zip(ORACLE["tokens"], ORACLE["logits"], strict=True):
        labels = torch.tensor(tokens)
        labels[:, : ORACLE["prefix"]] = IGNORED
        found, counted = token_losses(torch.tensor(logits), labels)
        sums.append(found.sum())
        means.append(found.sum() / counted.sum())
    example = Edit(id="1", prompt="p", answer="a", other="b", loss=kind)
    assert float(example.weigh(*means)) == pytest.approx(ORACLE["losses"][kind]["mean"], abs=1e-5)
    assert float(example.weigh(*sums)) == pytest.approx(ORACLE["losses"][kind]["sum"], abs=1e-5)


def test_the_divergence_is_that_of_the_official_code():
    known = ORACLE["divergence"]
    before, after = torch.tensor(known["before"]), torch.tensor(known["after"])
    mask = torch.ones(before.shape[:2])
    assert float(known["weight"] * divergence(before, after, mask)) == pytest.approx(
        known["value"], abs=1e-5
    )
    longer = [torch.cat([part, torch.randn(1, 2, 7)], dim=1) for part in (before, after)]
    padding = torch.cat([mask, torch.zeros(1, 2)], dim=1)
    assert torch.allclose(divergence(*longer, padding), divergence(before, after, mask))


def test_the_general_loss_is_the_mean_over_tokens_however_they_are_padded(parts):
    loaded = load_model(str(parts.llama))
    texts = [[2, 5, 6, 7], [2, 9, 14]]
    total = 0.0
    for row in texts:
        logs = loaded.model(torch.tensor([row])).logits[0].log_softmax(-1).detach()
        total -= sum(float(logs[place, row[place + 1]]) for place in range(len(row) - 1))
    assert general_loss(loaded.model, texts) == pytest.approx(total / 5, abs=1e-5)


def test_the_last_epoch_inside_the_ball_is_kept_not_the_best(parts):
    model = load_model(str(parts.llama)).model.requires_grad_(False)
    weight = model.model.norm.weight.requires_grad_(True)
    start, held = weight.detach().clone(), [[2, 5, 6, 7], [2, 9, 14]]
    ball = Ball(model, held, 0.5)
    for epoch, scale in enumerate((1.001, 1.002, 60.0), 1):
        weight.data.copy_(start * scale)
        assert not ball.after_epoch(epoch)
    assert ball.rises[2] > 0.5 > max(ball.rises[:2])
    ball.restore()
    assert ball.kept == 2
    assert torch.equal(weight, start * 1.002)


def test_importance_sums_the_weights_of_each_words_senses(parts):
    loaded = load_model(str(parts.backpack))
    row = padded([[2, 5, 6, 5, 7]], "cpu")
    row["labels"][:, :3] = IGNORED  # predicted are the last two, from places 2 and 3
    weights = loaded.model.backpack.weights(row["input_ids"])[0].detach()
    found = importance(loaded.model, row)
    for word, places in ((5, (1, 3)), (6, (2,)), (7, (4,)), (9, ())):
        for sense in range(4):
            wanted = sum(float(weights[sense, i, j]) for i in (2, 3) for j in places)
            assert float(found[word, sense]) == pytest.approx(wanted, abs=1e-5)


def test_of_two_answers_importance_is_subtracted_or_added(parts):
    loaded = load_model(str(parts.backpack))
    pair = EDITS[1]
    one = example_importance(loaded.model, loaded.processor, pair.model_copy(update={"other": ""}))
    two = example_importance(
        loaded.model, loaded.processor, pair.model_copy(update={"answer": pair.other, "other": ""})
    )
    balanced = pair.model_copy(update={"loss": "balance"})
    assert torch.equal(one, two)  # answers of one token: both are predicted after the prompt
    assert torch.equal(example_importance(loaded.model, loaded.processor, pair), one)
    longer = pair.model_copy(update={"answer": " w41 w42"})
    first = example_importance(loaded.model, loaded.processor, longer.model_copy(update={"other": ""}))
    assert torch.allclose(
        example_importance(loaded.model, loaded.processor, longer), first - two, atol=1e-6
    )
    assert torch.allclose(
        example_importance(loaded.model, loaded.processor, balanced), one + two, atol=1e-6
    )


def test_the_most_important_senses_are_chosen_and_none_that_weighs_nothing(parts):
    loaded = load_model(str(parts.backpack))
    editing = Editing(loaded, SimpleNamespace(calls=[]), general=["w20 w21 w22", "w30 w31"])
    general = General.of(editing, 0.5)
    few = build("edit/sense-tuning", {"senses": 2, "background": 0.0}).choose(editing, EDITS[:1], general)
    raw = example_importance(loaded.model, loaded.processor, EDITS[0])
    best = raw.flatten().topk(2).indices.tolist()
    assert few == {divmod(place, 4) for place in best}
    many = build("edit/sense-tuning", {"senses": 999}).choose(editing, EDITS[:1], general)
    words = set(loaded.processor("w1 w2 w3")["input_ids"])
    assert {token for token, _ in many} <= words  # the answer itself is seen by no prediction


def test_sense_tuning_moves_nothing_but_senses_and_saves_a_plain_model(parts, tuned):
    before, after = losses(parts.backpack), losses(tuned.folder)
    assert all(new < old - 0.1 for new, old in zip(after, before, strict=True))
    weights = zoo.weights(tuned.folder)
    changes = {name: weights.pop(name) for name in list(weights) if "sense_changes" in name}
    assert zoo.same_bytes(zoo.weights(parts.backpack), weights)
    assert 0 < len(changes["backpack.sense_changes.places"]) <= 6
    plain = transformers.AutoModelForCausalLM.from_pretrained(tuned.folder)
    opened = load_model(str(tuned.folder))
    tokens = torch.tensor([[2, 5, 6, 7]])
    assert torch.equal(plain(tokens).logits, opened.model(tokens).logits)
    (table,) = [table for table in tuned.evidence.steps[0].tables if table.title == "Epochs"]
    kept = [row for row in table.rows if row[3] == "kept"]
    assert len(kept) == 1
    assert kept[0][2] <= SENSES["ball"]


def test_the_edits_of_a_tuned_folder_are_seen_by_no_untouched_model(parts, tuned):
    editor, _ = load_edited(str(tuned.folder))
    loaded = load_model(str(tuned.folder))
    editor.attach(Editing(loaded, SimpleNamespace(calls=[])), {})
    plain, tokens = load_model(str(parts.backpack)).model, torch.tensor([[2, 5, 6, 7]])
    assert torch.equal(loaded.model(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("extra", [{}, {"lora_rank": 4, "learning_rate": 0.02}])
def test_fine_tuning_lowers_the_examples_losses_and_leaves_a_plain_model(parts, tmp_path, extra):
    edit(parts, "canonical", parts.llama, {**FULL, **extra}, tmp_path / "out")
    before, after = losses(parts.llama), losses(tmp_path / "out")
    assert all(new < old - 0.1 for new, old in zip(after, before, strict=True))
    assert zoo.weights(tmp_path / "out").keys() == zoo.weights(parts.llama).keys()


def test_where_no_epoch_stays_inside_nothing_is_changed(parts, tmp_path):
    settings = {**FULL, "learning_rate": 0.3, "ball": 1e-9, "epochs": 2, "divergence_weight": 0}
    result = edit(parts, "canonical", parts.llama, settings, tmp_path / "out")
    assert zoo.same_bytes(zoo.weights(parts.llama), zoo.weights(tmp_path / "out"))
    assert "outside-ball" in {finding.code for finding in result.findings}


def test_general_texts_and_a_backpack_are_asked_for_before_work(parts, tmp_path):
    asked = {"model": str(parts.llama), "edits": str(parts.edits)}
    with pytest.raises(SettingError, match="--general"):
        run_task("edit", "canonical", asked, {}, tmp_path / "out")
    with pytest.raises(CheckpointError, match="edits Backpacks"):
        edit(parts, "sense-tuning", parts.llama, {}, tmp_path / "out")
    pair = {"edited": str(parts.llama), "original": str(parts.backpack)}
    with pytest.raises(CheckpointError, match="must be a Backpack"):
        edit(parts, "backpack-ensemble", parts.llama, pair, tmp_path / "out")
    one = zoo.write_rows(tmp_path / "one.jsonl", zoo.language_rows(1)[:1])
    with pytest.raises(SettingError, match="two texts"):
        run_task("edit", "canonical", {**asked, "general": str(one)}, {}, tmp_path / "out")


def test_the_published_form_is_read_and_a_loss_without_its_second_answer_refused(tmp_path):
    rows = [
        {"prefix": "The capital is", "suffix": " Kabul"},
        {"prefix": "The janitor said", "suffix1": " he", "suffix2": " she", "loss": "balance"},
        {"prefix": "The keys", "suffix1": " are", "suffix2": " is"},
    ]
    data = Data(name="x", path=str(zoo.write_rows(tmp_path / "x.jsonl", rows)))
    found = [(e.prompt, e.answer, e.other, e.loss) for e in read_edits(data)]
    assert found == [
        ("The capital is", " Kabul", "", "good"),
        ("The janitor said", " he", " she", "balance"),
        ("The keys", " are", " is", "good-v-bad"),
    ]
    for wrong, reason in (
        ({"loss": "balance"}, "needs a field 'other'"),
        ({"loss": "odd"}, "must be good"),
    ):
        zoo.write_rows(tmp_path / "x.jsonl", [{"prompt": "a", "answer": "b", **wrong}])
        with pytest.raises(RecordsError, match=reason):
            read_edits(data)


def test_the_ensemble_adds_the_backpacks_change_and_generates_alike_with_a_cache(parts, tuned, tmp_path):
    pair = {"edited": str(tuned.folder), "original": str(parts.backpack), "ball": 0.5}
    result = edit(parts, "backpack-ensemble", parts.llama, pair, tmp_path / "out")
    weight = result.evidence.steps[0].facts["weight"]
    assert 0 < weight <= 1
    _, opened = load_edited(str(tmp_path / "out"))
    llama, edited, original = (
        load_model(str(f)).model for f in (parts.llama, tuned.folder, parts.backpack)
    )
    tokens, mask = torch.tensor([[2, 5, 6, 7], [0, 2, 11, 12]]), torch.tensor([[1] * 4, [0, 1, 1, 1]])
    with torch.no_grad():
        logs = [m(tokens, attention_mask=mask).logits.log_softmax(-1) for m in (edited, original)]
        wanted = llama(tokens, attention_mask=mask).logits + weight * (logs[0] - logs[1])
        found = opened.model(input_ids=tokens, attention_mask=mask).logits
        assert torch.allclose(found[:, 1:], wanted[:, 1:], atol=1e-4)
        ways = [
            opened.model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=6, do_sample=False,
                                  use_cache=cached, eos_token_id=None).tolist()
            for cached in (True, False)
        ]  # fmt: skip
    assert ways[0] == ways[1]


def test_words_beyond_the_backpacks_positions_add_nothing(parts, tuned):
    shift = Shift(load_model(str(tuned.folder)).model, load_model(str(parts.backpack)).model, 1.0)
    tokens = torch.arange(4, 64).repeat(2)[None, :70]
    found = shift.difference(tokens, None)
    assert found.shape == (1, 70, 64)
    assert not found[:, :6].any()
    assert torch.equal(found[:, 6:], shift.difference(tokens[:, 6:], None))
