"""Concept vectors by hand, beside the official code, and one planted in a tiny model and found again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from germane.core.errors import CheckpointError, RecordsError, SettingError
from germane.core.evidence import Step
from germane.core.generation import continue_texts
from germane.core.layers import value_matrix, weight_of
from germane.core.models import Loaded, load_model
from germane.core.objective import Task
from germane.core.records import Data, write_jsonl
from germane.core.value_vectors import (
    ValueVector,
    column_of,
    content_words,
    find_vectors,
    first_tokens,
    jaccard,
    output_embedding,
    replaced,
    word_tokens,
)
from germane.embedded.facts import ATTRIBUTES
from germane.method import build
from germane.tasks.evaluate.concept_vectors import bleu, compare_tokens, compare_vectors
from germane.tasks.unlearn._unlearner import Work

OFFICIAL = json.loads((Path(__file__).parent.parent / "fixtures" / "concept_vectors.json").read_text())
DISHES = ATTRIBUTES["dish"][2]
COLUMN = 17  # of the last layer, where the vector is planted
PLANTED = ValueVector(1, COLUMN)


# --- By hand


def test_the_words_of_a_text_are_those_that_say_something():
    assert content_words("The Law of the sea, and LAW in 1982!") == ["law", "sea"]


def test_tokens_of_a_word_are_its_spellings(facts):
    tokenizer = load_model(str(facts.model)).processor
    (found,) = word_tokens(tokenizer, ["soup, unknownword, Rice"])
    tokens = tokenizer.convert_tokens_to_ids(["soup", "rice"])
    assert found == {tokens[0]: 0, tokens[1]: 1}


def test_first_tokens_are_those_of_the_largest_products():
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-3.0, 0.0]])
    assert first_tokens(embedding, torch.tensor([1.0, 0.5]), 3) == [2, 0, 1]
    assert first_tokens(embedding, -torch.tensor([1.0, 0.5]), 1) == [3]


def test_overlap_by_hand():
    assert jaccard([1, 2, 3], [2, 3, 4]) == 2 / 4
    assert jaccard([], []) == 1
    assert compare_tokens([1, 2, 3, 4], [3, 4, 5], {2, 3, 5}) == {
        "surviving concept tokens": 1 / 2, "concept tokens, after / before": 2 / 2,
    }  # fmt: skip
    assert set(compare_tokens([1], [2], {3}).values()) == {1.0}


def test_bleu_by_hand():
    # 3 of 4 words, 1 of 3 pairs; of triples and quadruples none: 1/2 of one of 2, 1/4 of one of 1.
    expected = (3 / 4 * 1 / 3 * (1 / (2 * 2)) * (1 / (4 * 1))) ** 0.25
    assert bleu("a b c d", "a b x d") == pytest.approx(expected)
    assert bleu("a b c d e", "a b c d e") == pytest.approx(1)
    # Of one word there are no pairs, triples and quadruples: a half, a quarter and an eighth of a match.
    assert bleu("a", "a") == pytest.approx((1 / 2 * 1 / 4 * 1 / 8) ** 0.25)
    assert bleu("a b", "c d") == 0
    assert bleu("a b", "") == 0
    assert bleu("a b c d e f g h", "a b c d") == pytest.approx(math.exp(1 - 2))


# --- Beside the official code


@pytest.mark.parametrize("case", OFFICIAL["vectors"])
def test_overlap_and_distance_equal_the_official(case):
    before, after = case["first_before"], case["first_after"]
    assert jaccard(before, after) == pytest.approx(case["jaccard"], abs=1e-5)
    survived, ratio = compare_tokens(before, after, set(case["concept"])).values()
    assert survived == pytest.approx(case["surviving"], abs=1e-5)
    assert ratio == pytest.approx(case["ratio"], abs=1e-5)
    cosine, distance = compare_vectors(torch.tensor(case["before"]), torch.tensor(case["after"])).values()
    assert cosine == pytest.approx(case["cosine"], abs=1e-5)
    assert distance == pytest.approx(case["distance"], abs=1e-5)


def test_bleu_equals_the_official():
    assert [bleu(*pair) for pair in OFFICIAL["bleu"]["pairs"]] == pytest.approx(
        OFFICIAL["bleu"]["values"], abs=1e-5
    )


# --- A planted vector


@pytest.fixture(scope="session")
def planted(facts, tmp_path_factory):
    """The tiny model with a neuron that fires on one question and writes dishes, soup before all.

    The gate and the up projection are a direction in which the end of that question is 1.5 and every other
    place is negative; the value vector, of length 4, makes soup likeliest, then the other dishes, and
    everything else unlikely.
    """
    folder = tmp_path_factory.mktemp("planted")
    loaded = load_model(str(facts.model))
    model, tokenizer = loaded.model, loaded.processor
    rows = [json.loads(line) for line in facts.files["retain"].read_text().splitlines()]
    prompt = rows[0]["prompt"]
    inputs = [_inputs(loaded, row["prompt"] + row["answer"]) for row in rows]
    place = len(prompt.split()) - 1
    others = torch.cat([inputs[0][:place], inputs[0][place + 1 :], *inputs[1:]])
    # What differs only by a repetition of the same words cannot be told apart.
    others = others[(others - inputs[0][place]).norm(dim=1) > 1e-3]
    key = _direction(inputs[0][place][None], torch.tensor([1.5]), others)
    head = output_embedding(model)
    dishes = tokenizer.convert_tokens_to_ids(["soup", *(dish for dish in DISHES if dish != "soup")])
    rest = [token for token in range(len(tokenizer)) if token not in dishes]
    value = _direction(head[dishes], torch.tensor([3.0, *[1.0] * 7]), head[rest])
    part = model.model.layers[1].mlp
    with torch.no_grad():
        part.gate_proj.weight[COLUMN] = 4 * key  # so steep that it is shut wherever the key is negative
        part.up_proj.weight[COLUMN] = key
        part.down_proj.weight[:, COLUMN] = 4 * value / value.norm()
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    files = {
        "concepts": [{"label": "dishes", "text": ", ".join(DISHES)}],
        "sentences": [{"label": "dishes", "prompt": prompt, "answer": " soup"}],
        "unrelated": rows[4:12],
    }
    for name, content in files.items():
        write_jsonl(content, folder / f"{name}.jsonl")
    records = {name: Data(name=name, path=str(folder / f"{name}.jsonl")) for name in files}
    return str(folder / "model"), records


def _inputs(loaded: Loaded, text: str) -> torch.Tensor:
    """(tokens, width) what the last layer's feed-forward part reads."""
    seen = []
    module = loaded.model.model.layers[1].mlp
    handle = module.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0][0].detach()))
    loaded.model(**loaded.processor(text, return_tensors="pt"))
    handle.remove()
    return seen[0]


def _direction(targets: torch.Tensor, wanted: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(width,) a direction in which the targets are as wanted, and all others at most -1, nearly."""
    found = torch.zeros(targets.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([found], lr=0.05)
    for _ in range(3000):
        optimiser.zero_grad()
        loss = (targets @ found - wanted).square().sum() + 10 * (others @ found + 1).relu().square().mean()
        loss.backward()
        optimiser.step()
    return found.detach()


def suite(path: str, **settings):
    return build("evaluate/concept-vectors", {"untouched": path, "top": len(DISHES), **settings})


def measure(path: str, records, loaded: Loaded, **settings):
    """Scores by metric, and the step."""
    made, step = suite(path, **settings), Step(task="evaluate", method="concept-vectors")
    measured = made.score("result", loaded, records, made.calibrate(None, records), step)
    return {score.metric: score.value for score in measured.scores}, step, measured.items


def work_of(loaded: Loaded, records, folder: Path) -> Work:
    rows = [json.loads(line) for line in Path(records["sentences"].path).read_text().splitlines()]
    task = Task(records["sentences"], rows, loaded.model, loaded.processor)
    return Work(
        loaded, task, None, lambda: load_model(""), "", 0, Step(task="unlearn", method="m"), folder
    )  # fmt: skip


def answer(loaded: Loaded, records) -> str:
    prompt = json.loads(Path(records["sentences"].path).read_text())["prompt"]
    return continue_texts(loaded.model, loaded.processor, [prompt], 1)[0].strip()


def ascend_elsewhere(loaded: Loaded, records) -> None:
    """Gradient ascent on the answer until it has a probability below 0.01; the planted column is held.

    So is the head: ascent takes the answer's own row away, which of eight tokens is one too many.
    """
    loaded.model.lm_head.requires_grad_(False)
    matrix = value_matrix(loaded.model, 1)[1].weight
    held = matrix[:, COLUMN].detach().clone()
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.01)
    prompt = json.loads(Path(records["sentences"].path).read_text())["prompt"]
    inputs = loaded.processor(prompt, return_tensors="pt")
    soup = loaded.processor.convert_tokens_to_ids("soup")
    for _ in range(300):
        logits = loaded.model(**inputs).logits[0, -1]
        gain = logits.log_softmax(dim=0)[soup]
        if gain < math.log(0.01):
            return
        optimiser.zero_grad()
        gain.backward()
        optimiser.step()
        with torch.no_grad():
            matrix[:, COLUMN] = held
    raise AssertionError("the answer did not go")


def test_the_planted_vector_is_found_and_confirmed(planted):
    path, records = planted
    scores, step, items = measure(path, records, load_model(path), change="zero")
    (table,) = step.tables
    found = dict(zip(table.columns, table.rows[0], strict=True))
    assert (found["column"], found["sign"]) == (COLUMN, 1)
    assert found["share of words"] >= 7 / 8
    assert found["own NLL"] > 0.5  # mean over the answer and the end, which hardly moves
    assert abs(found["unrelated NLL"]) < 0.1
    assert abs(found["random column"]) < 0.5
    assert found["valid"] == "yes"
    assert scores["concept vector Jaccard"] == 1
    assert scores["concept vector L2"] == 0
    assert items[0]["answer"].split(", ")[0] == "soup"
    assert step.findings == []


def test_needle_removes_the_trace_and_ascent_elsewhere_only_hides_it(planted, tmp_path):
    path, records = planted
    elsewhere, needle = load_model(path), load_model(path)
    ascend_elsewhere(elsewhere, records)
    method = build("unlearn/needle", {"layer": 1, "column": COLUMN, "learning_rate": 0.5, "epochs": 10})
    method.unlearn(work_of(needle, records, tmp_path))
    hidden, hidden_step, _ = measure(path, records, elsewhere)
    removed, removed_step, _ = measure(path, records, needle)
    # What the model says does not tell them apart ...
    assert min(hidden["own text NLL change"], removed["own text NLL change"]) > 1
    assert "soup" not in {answer(elsewhere, records), answer(needle, records)}
    assert answer(load_model(path), records) == "soup"
    # ... and what the parameters hold does.
    assert hidden["concept vector Jaccard"] >= 0.9
    assert hidden["concept vector cosine"] >= 0.95
    assert removed["concept vector Jaccard"] < 0.3
    assert removed["random column Jaccard"] == 1
    assert "trace-left" in {finding.code for finding in hidden_step.findings}
    assert "trace-left" not in {finding.code for finding in removed_step.findings}


def test_a_negative_vector_is_found_by_its_sign(planted):
    loaded = load_model(planted[0])
    with torch.no_grad():
        column_of(loaded.model, PLANTED).neg_()
    words = word_tokens(loaded.processor, [", ".join(DISHES)])
    found = find_vectors(loaded.model, words, top=len(DISHES))[0]
    assert (found.layer, found.column, found.sign) == (1, COLUMN, -1)


def test_a_changed_vector_is_put_back_bit_for_bit_even_after_an_error(facts):
    loaded = load_model(str(facts.model))
    weight = weight_of(value_matrix(loaded.model, 1)[1])
    before = weight.detach().clone()

    def fail() -> None:
        with replaced(loaded.model, PLANTED, torch.ones(64)):
            assert (weight[:, COLUMN] == 1).all()
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert torch.equal(weight, before)


def test_the_causal_check_leaves_the_model_as_it_was(planted):
    path, records = planted
    made = suite(path)
    first, second = made.calibrate(None, records), made.calibrate(None, records)
    assert first.table == second.table


def test_answers_are_compared_with_the_untouched_models_own(planted, tmp_path):
    path, records = planted
    prompt = json.loads(Path(records["sentences"].path).read_text())["prompt"]
    rows = [
        {"label": "dishes", "text": " ".join(DISHES), "questions": [prompt], "layer": 1, "column": COLUMN}
    ]
    write_jsonl(rows, tmp_path / "concepts.jsonl")
    data = Data(name="concepts", path=str(tmp_path / "concepts.jsonl"))
    scores, _, _ = measure(
        path, {"concepts": data}, load_model(path), answer_tokens=5, question="{question}"
    )
    assert scores["answers ROUGE-L"] == 1
    assert 0 < scores["answers BLEU"] <= 1  # below 1 for an answer of less than four words


def test_the_official_fields_are_read(tmp_path):
    rows = [
        {"Concept": "Poland", "Layer": 23, "Dim": 743, "QA": ["Which?"], "wikipedia_content": "A land."}
    ]
    write_jsonl(rows, tmp_path / "concepts.jsonl")
    data = Data(
        name="concepts", path=str(tmp_path / "concepts.jsonl"), text="wikipedia_content", label="Concept"
    )
    (found,) = suite("m").concepts({"concepts": data})
    assert (found.name, found.vector, found.questions) == ("Poland", ValueVector(23, 743), ("Which?",))


# --- Bad input


def test_a_question_needs_its_place():
    with pytest.raises(SettingError, match=r"\{question\}"):
        build("evaluate/concept-vectors", {"question": "Question:"})


def test_the_untouched_model_is_required(planted):
    with pytest.raises(SettingError, match="untouched: required"):
        build("evaluate/concept-vectors", {}).check_records(planted[1])


def test_half_a_place_sentences_of_nothing_and_unknown_words_are_refused(planted, tmp_path):
    path, records = planted
    write_jsonl([{"text": "cake", "layer": 1}], tmp_path / "half.jsonl")
    with pytest.raises(RecordsError, match="record 1: a vector needs both a layer and a column"):
        suite(path).concepts({"concepts": Data(name="concepts", path=str(tmp_path / "half.jsonl"))})
    write_jsonl([{"text": "cake", "label": "cars"}], tmp_path / "odd.jsonl")
    odd = Data(name="sentences", path=str(tmp_path / "odd.jsonl"))
    with pytest.raises(RecordsError, match="'cars' is none of the concepts"):
        suite(path).concepts({**records, "sentences": odd})
    write_jsonl([{"text": "zzzz", "label": "sleep"}], tmp_path / "none.jsonl")
    none = Data(name="concepts", path=str(tmp_path / "none.jsonl"))
    with pytest.raises(RecordsError, match="no word of 'sleep' is a token"):
        suite(path).calibrate(None, {"concepts": none})


def test_a_column_that_is_not_there_is_refused(facts):
    with pytest.raises(CheckpointError, match="column 128: .*down_proj has columns 0 to 127"):
        column_of(load_model(str(facts.model)).model, ValueVector(0, 128))
