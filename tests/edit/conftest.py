from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import zoo

from germane.core.chat import open_chat
from germane.core.models import Loaded, load_model
from germane.core.records import Data, read_rows
from germane.edited import Editing
from germane.embedded import facts as fact_parts
from germane.recipe import run_task
from germane.tasks.edit._records import read_edits

ANSWERS = {"job": "miner", "city": "oslo", "pet": "cat", "dish": "stew"}
OTHER_ANSWERS = {"job": "judge", "city": "lima", "pet": "dog", "dish": "cake"}


def rows_of(file):
    return read_rows(Data(name="rows", path=str(file)))


def sines_model():
    """A small GPT-2 whose weights are sines, and statistics of its keys."""
    tokenizer = fact_parts.tokenizer()
    size = {"n_embd": 8, "n_layer": 3, "n_head": 2, "n_inner": 16, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), **size)).eval()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            steps = torch.arange(weight.numel(), dtype=torch.float64)
            weight.copy_((torch.sin(steps * (1 + number / 7) + number) * 0.4).view(weight.shape))
    moment = torch.sin(torch.arange(256, dtype=torch.float64)).view(16, 16)
    moment = (moment @ moment.T / 16 + torch.eye(16, dtype=torch.float64) * 0.1).float()
    editing = Editing(Loaded(model, tokenizer, Path()), SimpleNamespace(), general=["anna likes"])
    return editing, moment.double()


@pytest.fixture
def sines():
    """Makes the model of sines, on which the official codes were run, with the statistics of its keys."""
    return sines_model


@pytest.fixture(scope="session")
def facts(tmp_path_factory):
    """A tiny language model that knows sixteen people, four of whom are there to be edited."""
    return fact_parts.make(tmp_path_factory.mktemp("facts"), known=16, forgotten=4)


@pytest.fixture(scope="session")
def edits_file(facts):
    """Four edits of different people, each with a rephrasing and questions about others."""
    asked = rows_of(facts.files["forget"])
    rows = [asked[number] for number in (0, 5, 10, 15)]
    others = rows_of(facts.files["retain"])[:12]
    for row in rows:
        kind = row["attribute"]
        new = ANSWERS if row["answer"].strip() != ANSWERS[kind] else OTHER_ANSWERS
        row |= {
            "answer": new[kind],
            "rephrase": f"tell me what is the {kind} of {row['subject']} ?",
            "locality": [[other["prompt"], other["answer"]] for other in others],
        }
    return zoo.write_rows(facts.model.parent / "edits.jsonl", rows)


@pytest.fixture(scope="session")
def edit_with(facts, edits_file, tmp_path_factory):
    """Edit the tiny model with a method; gives the folder, and the scores of the result by metric."""

    def run(method, settings=None, file=edits_file, model=None):
        out = tmp_path_factory.mktemp("edited") / "out"
        arguments = {
            "model": str(model or facts.model), "edits": str(file),
            "general": str(facts.files["retain-texts"]),
        }  # fmt: skip
        result = run_task("edit", method, arguments, settings or {}, out)
        scores = {score.metric: score.value for score in result.scores if score.subject == "result"}
        return SimpleNamespace(folder=out, scores=scores, findings=result.findings)

    return run


@pytest.fixture
def editing(facts):
    """The tiny model, loaded afresh, with general texts."""
    loaded = load_model(str(facts.model))
    general = [row["text"] for row in rows_of(facts.files["retain-texts"])]
    return Editing(loaded, open_chat(str(facts.model), loaded), general=general)


@pytest.fixture(scope="session")
def edits(edits_file):
    return read_edits(Data(name="edits", path=str(edits_file)))
