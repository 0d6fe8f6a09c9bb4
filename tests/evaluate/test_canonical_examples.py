"""The suite of canonical examples: summed losses against thresholds, worked out token by token."""

from __future__ import annotations

import zoo  # first: sets the environment before transformers is imported

# isort: split
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from germane.core.errors import RecordsError
from germane.core.evidence import Step
from germane.core.models import load_model
from germane.core.records import Data
from germane.method import build
from germane.tasks.evaluate.canonical_examples import suffix_loss

ITEMS = [
    {"prefix": "w1 w2 w3", "suffix": " w4 w5"},
    {"prompt": "w1 w2 w3", "answer": " w50", "loss": "bad"},
    {"prefix": "w1 w2 w3", "suffix1": " w4", "suffix2": " w50", "loss": "good-v-bad"},
    {"prefix": "w1 w2 w3", "suffix1": " w4", "suffix2": " w50", "loss": "balance"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = zoo.make(transformers.LlamaForCausalLM, zoo.llama_config())
    folder = zoo.save(zoo.train_language(made, zoo.language_rows(1), 60), tmp_path_factory.mktemp("m"))
    return load_model(str(folder))


def by_hand(model: Any, prompt: str, answer: str) -> float:
    """The summed NLL, one token at a time."""
    seen = model.processor(prompt)["input_ids"]
    total = 0.0
    for token in model.processor(answer, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            logs = model.model(torch.tensor([seen])).logits[0, -1].log_softmax(-1)
        total -= float(logs[token])
        seen = [*seen, token]
    return total


def measure(model: Any, folder: Path, items: list[dict[str, Any]], **settings: Any) -> Any:
    suite = build("evaluate/canonical-examples", settings)
    records = {"examples": Data(name="examples", path=str(zoo.write_rows(folder / "items.jsonl", items)))}
    records["hard-negatives"] = records["examples"].model_copy(update={"name": "hard-negatives"})
    general = zoo.write_rows(folder / "general.jsonl", zoo.language_rows(1))
    records["general"] = Data(name="general", path=str(general))
    suite.check_records(records)
    return suite.score("result", model, records, None, Step(task="evaluate", method=""))


def test_the_loss_of_a_suffix_is_summed_over_its_tokens(model):
    wanted = by_hand(model, "w1 w2 w3", " w4 w5")
    assert float(suffix_loss(model, ("w1 w2 w3", " w4 w5"))) == pytest.approx(wanted, abs=1e-5)


def test_items_are_scored_by_the_loss_that_each_asks_for(model, tmp_path):
    found = measure(model, tmp_path, ITEMS)
    likely, rare = by_hand(model, "w1 w2 w3", " w4"), by_hand(model, "w1 w2 w3", " w50")
    wanted = [by_hand(model, "w1 w2 w3", " w4 w5"), -rare, likely - rare, abs(likely - rare)]
    items = [item for item in found.items if item["role"] == "examples"]
    assert [item["score"] for item in items] == pytest.approx(wanted, abs=1e-5)
    scores = {score.metric: score.value for score in found.scores}
    negatives = [wanted[0], rare, likely, likely]
    assert scores["NLL of hard negatives"] == pytest.approx(sum(negatives) / 4, abs=1e-5)
    assert scores["general loss"] > 0


def test_success_is_a_loss_at_most_the_threshold_of_its_kind(model, tmp_path):
    loss = by_hand(model, "w1 w2 w3", " w4 w5")
    for shift, share in ((1e-3, 1.0), (-1e-3, 0.0)):
        found = measure(model, tmp_path, ITEMS[:1], good=loss + shift)
        assert found.scores[0].value == share
    found = measure(model, tmp_path, ITEMS, good=99.0, bad=-99.0, good_v_bad=99.0, balance=0.0)
    right = [item["success"] for item in found.items if item["role"] == "examples"]
    assert right == [True, False, True, False]


def test_one_loss_can_be_asked_of_all_items(model, tmp_path):
    found = measure(model, tmp_path, ITEMS[:2], loss="bad")
    assert [item["loss"] for item in found.items if item["role"] == "examples"] == ["bad", "bad"]
    assert all(item["score"] < 0 for item in found.items if item["role"] == "examples")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "w1"}, "answer.*needs a prompt and an answer"),
        ({"prompt": "w1", "answer": "w2", "loss": "odd"}, "loss.*should be"),
        ({"prompt": "w1", "answer": "w2", "loss": "balance"}, "needs a field 'other'"),
        ({"prompt": 3, "answer": "w2"}, "prompt.*valid string"),
    ],
)
def test_records_without_what_their_loss_needs_are_refused(row, reason, tmp_path):
    file = zoo.write_rows(tmp_path / "items.jsonl", [row])
    suite = build("evaluate/canonical-examples", {})
    with pytest.raises(RecordsError, match=f"record 1.*{reason}"):
        suite.check_records({"examples": Data(name="examples", path=str(file))})


def test_the_published_thresholds_are_the_defaults():
    suite: Any = build("evaluate/canonical-examples", {})
    found = SimpleNamespace(**suite.model_dump())
    assert (found.good, found.bad, found.good_v_bad, found.balance) == pytest.approx(
        (1.6094379, -6.9077553, -2.7725887, 0.4054651)
    )
