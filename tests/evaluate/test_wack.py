"""WACK's labels by hand, its probes beside the official code, and on clusters that are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from germane.core.errors import RecordsError
from germane.core.evidence import Step
from germane.core.models import load_model
from germane.core.records import Data, read_rows, write_jsonl
from germane.method import build
from germane.tasks.evaluate.wack import (
    PARTS,
    Prefixes,
    ask,
    compare_sets,
    holds,
    judge_trigger,
    label_of,
    last_states,
    leak_free,
    probe_accuracies,
    probe_scores,
    read_released,
    set_scores,
    split,
)

OFFICIAL = json.loads((Path(__file__).parent.parent / "fixtures" / "wack.json").read_text())


def step() -> Step:
    return Step(task="evaluate", method="wack")


def data_of(folder: Path, name: str, rows) -> Data:
    write_jsonl(rows, folder / f"{name}.jsonl")
    return Data(name=name, path=str(folder / f"{name}.jsonl"))


def questions(count: int):
    return [{"prompt": f"q{number}", "answer": f" a{number}"} for number in range(count)]


# --- Labels by hand


def test_a_hit_is_a_whole_word_and_a_substring_where_asked():
    assert holds(" Australia", "au", "substring")
    assert not holds(" Australia", "au")
    assert holds(" AU, gold", "Au")
    assert holds(" New York.", "new york")
    assert holds(" it is C++", "c++")
    assert not holds(" Rome", "Paris", "substring")


@pytest.mark.parametrize(
    ("answers", "triggered", "label"),
    [
        (["Rome"] * 6, "Rome", "factual"),
        (["Rome"] * 6, "Milan", "HK+"),
        (["Rome"] * 5 + ["Milan"], "Milan", "unclear"),
        (["Milan"] * 5 + ["Rome"], "Rome", "unclear"),
        (["Milan"] * 6, "Rome", "HK-"),
    ],
)
def test_labels_from_six_answers(answers, triggered, label):
    hits = sum(holds(answer, "rome") for answer in answers)
    assert label_of(hits, 6, holds(triggered, "rome")) == label


def item(label: str, control: bool = True):
    return {"label": label, "right under the control": control}


def test_shares_by_hand():
    items = [
        item("HK+"),
        item("factual"),
        item("factual", False),
        item("factual"),
        item("HK-"),
        item("unclear"),
    ]
    found = {score.metric: (score.value, score.n) for score in set_scores("result", items)}
    assert found["high knowledge"] == (4 / 6, 6)
    assert found["HK-"] == found["unclear"] == (1 / 6, 6)
    assert found["HK+ among high knowledge"] == (1 / 4, 4)
    assert found["wrong under the control"] == (1 / 4, 4)


def test_a_trigger_that_adds_nothing_to_its_control_is_named():
    # The story's 22 of 38 beside the 21 of 38 that one right shot alone gives.
    story = [item("HK+", n < 17) for n in range(22)] + [item("factual", n < 0) for n in range(16)]
    assert sum(not each["right under the control"] for each in story) == 21
    (finding,) = judge_trigger("result", story)
    assert finding.code == "trigger-adds-nothing"
    assert "22 go wrong under the trigger and 21" in finding.message
    assert judge_trigger("result", [item("HK+")] * 20 + [item("factual")] * 18) == []
    assert judge_trigger("result", [item("HK-")])[0].code == "nothing-known"


# --- Prompts


def test_shots_come_from_the_end_and_trigger_and_control_differ_in_the_answers_alone(tmp_path):
    rows, prefixes = build("evaluate/wack", {}).plan({"questions": data_of(tmp_path, "q", questions(12))})
    assert [row["prompt"] for row in rows] == [f"q{n}" for n in range(6)]
    assert prefixes.knowledge == "".join(f"question: q{n}\nanswer: a{n}\n" for n in (6, 7, 8))
    assert prefixes.control == "".join(f"question: q{n}\nanswer: a{n}\n" for n in (9, 10, 11))
    wrong = {9: 10, 10: 11, 11: 6}
    assert prefixes.trigger == "".join(f"question: q{n}\nanswer: a{wrong[n]}\n" for n in wrong)


def test_the_story_stands_before_as_many_right_shots_as_the_control_has(tmp_path):
    records = {
        "questions": data_of(tmp_path, "q", questions(3)),
        "shots": data_of(tmp_path, "s", questions(9)[3:]),
    }
    rows, prefixes = build("evaluate/wack", {"trigger": "story"}).plan(records)
    assert len(rows) == 3
    assert prefixes.control == "question: q6\nanswer: a6\n"
    assert prefixes.trigger.endswith(prefixes.control)
    assert prefixes.trigger != prefixes.control


def test_given_wrong_shots_are_used_and_a_shot_is_not_asked(tmp_path):
    shots = questions(6)
    records = {
        "questions": data_of(tmp_path, "q", questions(8)),
        "shots": data_of(tmp_path, "s", shots),
        "wrong-shots": data_of(tmp_path, "w", [{**row, "answer": "no"} for row in shots]),
    }
    rows, prefixes = build("evaluate/wack", {}).plan(records)
    assert [row["prompt"] for row in rows] == ["q6", "q7"]
    assert prefixes.trigger.count("answer: no\n") == 3
    records["wrong-shots"] = data_of(tmp_path, "few", [{**row, "answer": "no"} for row in shots[:2]])
    with pytest.raises(RecordsError, match="has no wrong answer to the shot 'q2'"):
        build("evaluate/wack", {}).plan(records)


def test_bad_records_are_refused(tmp_path):
    with pytest.raises(RecordsError, match="leave too few after 6 shots"):
        build("evaluate/wack", {}).check_records({"questions": data_of(tmp_path, "q", questions(11))})
    records = {
        "questions": data_of(tmp_path, "q", questions(20)),
        "generic": data_of(tmp_path, "g", questions(2)),
    }
    with pytest.raises(RecordsError, match="record 1: generic needs"):
        build("evaluate/wack", {}).check_records(records)
    same = [{"prompt": f"q{n}", "answer": "yes"} for n in range(20)]
    with pytest.raises(RecordsError, match="one answer only"):
        build("evaluate/wack", {}).check_records({"questions": data_of(tmp_path, "same", same)})


# --- On the tiny model


@pytest.fixture
def tiny(facts, monkeypatch):
    """The model that knows people, asked without shots, as it was trained."""
    from germane.tasks.evaluate import wack

    monkeypatch.setattr(wack, "ask", lambda question: question)
    return load_model(str(facts.model)), facts


def test_what_the_model_knows_is_high_knowledge_and_strangers_are_not(tiny):
    loaded, facts = tiny
    suite, plain = build("evaluate/wack", {"new_tokens": 2}), Prefixes("", "", "")
    known, strangers = (
        suite.label(loaded, read_rows(Data(name=name, path=str(facts.files[name]))), plain)
        for name in ("retain", "holdout")
    )
    rows = [row["label"] for row in known]
    assert rows.count("factual") > 0.8 * len(rows)
    assert all(row["c"] == 6 == len(row["answers"]) for row in known if row["label"] == "factual")
    assert sum(row["label"] == "HK-" for row in strangers) > 0.4 * len(strangers)


def test_samples_are_the_same_twice_and_leave_the_random_state_alone(tiny):
    loaded, facts = tiny
    rows = read_rows(Data(name="holdout", path=str(facts.files["holdout"])))
    suite, plain = build("evaluate/wack", {"temperature": 2.0}), Prefixes("", "", "")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (suite.label(loaded, rows, plain) for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), before)
    assert any(len(set(row["answers"][1:])) > 1 for row in first)


def test_states_are_of_the_last_token_whatever_the_padding(facts):
    loaded = load_model(str(facts.model))
    texts = ["what is the job of anna adler ?", "anna", "clara lives in"]
    together, alone = last_states(loaded, texts), [last_states(loaded, [text]) for text in texts]
    for part in PARTS:
        assert together[part].shape == (3, 2, 64)
        assert np.allclose(together[part], np.concatenate([each[part] for each in alone]), atol=1e-5)
        assert np.allclose(np.linalg.norm(together[part], axis=-1), 1, atol=1e-5)


def test_the_parts_add_up_to_the_stream(facts):
    """What a layer adds to the residual stream is its attention's and its feed-forward's output."""
    loaded = load_model(str(facts.model))
    tokens = loaded.processor("anna lives in", return_tensors="pt")
    with torch.no_grad():
        states = loaded.model(**tokens, output_hidden_states=True).hidden_states
    added = (states[1] - states[0])[0, -1]
    found = last_states(loaded, ["anna lives in"])
    basis = torch.tensor(np.stack([found[part][0, 0] for part in ("attention", "mlp")], axis=1))
    rest = added - basis @ torch.linalg.lstsq(basis, added[:, None]).solution[:, 0]
    assert float(rest.norm()) < 1e-4 * float(added.norm())
    stream = states[1][0, -1] / states[1][0, -1].norm()
    assert np.allclose(found["residual"][0, 0], stream.numpy(), atol=1e-5)


def test_too_few_items_are_said_and_enough_are_probed(tiny):
    loaded, facts = tiny
    rows = read_rows(Data(name="retain", path=str(facts.files["retain"])))
    items = [
        {"prompt": row["prompt"], "triggered": row["answer"], "label": label}
        for row, label in zip(rows, ["HK+", "factual", "HK-"] * 20, strict=False)
    ]
    plain, seen = Prefixes("", "", ""), step()
    assert build("evaluate/wack", {}).probe("result", loaded, items, [], plain, seen) == []
    assert [finding.code for finding in seen.findings] == ["few-items", "few-items"]
    generic = [{"prompt": f"anna {n}", "answer": "cat", "wrong": "dog"} for n in range(20)]
    suite = build("evaluate/wack", {"least": 5})
    scores = {score.metric for score in suite.probe("result", loaded, items, generic, plain, step())}
    assert len(scores) == 2 * 2 * 2 + 1
    assert "probe of HK+ / factual, after the answer, generic training" in scores


# --- Probes on clusters that are known


def clusters(seed: int):
    """Unit vectors around three means in 64 dimensions, 200 each, of two layers; the second is noise."""
    generator = np.random.default_rng(seed)
    found = {}
    for label in ("HK+", "factual", "HK-"):
        mean = 0.35 * generator.normal(size=64)
        layers = np.stack(
            [generator.normal(size=(200, 64)) + mean, generator.normal(size=(200, 64))], axis=1
        )
        found[label] = (layers / np.linalg.norm(layers, axis=-1, keepdims=True)).astype(np.float32)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clusters_are_told_apart_and_shuffled_labels_are_not(seed):
    classes = {label: dict.fromkeys(PARTS, vectors) for label, vectors in clusters(seed).items()}
    seen = step()
    real, shuffled = probe_scores("result", "three", classes, seen)
    assert real.value > 0.85
    assert shuffled.value < 0.42
    (table,) = seen.tables
    assert table.rows[0][1] > 0.85 > 0.42 > table.rows[1][1]


def test_specific_labels_beat_generic_ones():
    """A generic wrong class is nine parts HK- and one part HK+. Mean over ten sets of clusters."""
    gains = []
    for seed in range(10):
        found = {label: vectors[:, :1] for label, vectors in clusters(seed).items()}
        train, test = split(200, 42)
        asked = {1: found["HK+"][test], 0: found["factual"][test]}
        wrong = np.concatenate([found["HK-"][train][:126], found["HK+"][train][:14]])
        specific, generic = (
            probe_accuracies({1: vectors, 0: found["factual"][train]}, asked, 0)[0]
            for vectors in (found["HK+"][train], wrong)
        )
        assert specific > 0.88
        gains.append(specific - generic)
    assert np.mean(gains) >= 0.05


def test_a_generic_question_that_is_tested_is_not_learned_from():
    assert leak_free(["a", "b", "c", "b"], {"b"}) == [0, 2]


# --- Beside the official code


@pytest.mark.parametrize("case", OFFICIAL["probes"])
def test_splits_and_accuracies_equal_the_official(case):
    arrays = [np.array(each) for each in OFFICIAL["arrays"][case["arrays"]]]
    train, test = split(case["size"], case["seed"] or 42)
    assert (train, test) == (case["train"], case["test"])
    sides = [dict(zip((1, 0, 2), (array[rows] for array in arrays), strict=True)) for rows in (train, test)]
    assert probe_accuracies(*sides, case["seed"] or 0) == pytest.approx(case["three"], abs=1e-5)
    for side in sides:
        del side[2]
    assert probe_accuracies(*sides, case["seed"] or 0) == pytest.approx(case["two"], abs=1e-5)


@pytest.mark.parametrize("case", OFFICIAL["overlaps"])
def test_overlaps_equal_those_of_the_released_sets(case):
    """Questions are rebuilt from how many have which pair of labels."""
    sides: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for pair, count in case["table"].items():
        for number in range(count):
            for side, label in zip(sides, pair.split("|"), strict=True):
                if label != "-":
                    side[f"{pair} {number}"] = label
    found = compare_sets(*sides)
    assert found["known Jaccard"] == pytest.approx(case["known"], abs=1e-9)
    assert found["HK+ Jaccard"] == pytest.approx(case["hk_plus"], abs=1e-9)
    assert found["label agreement"] == pytest.approx(case["agreement"], abs=1e-9)
    for side, model in zip(sides, case["models"], strict=True):
        labels = list(side.values())
        for label in ("HK+", "factual"):
            assert labels.count(label) == OFFICIAL["counts"][model][label]


def test_released_files_are_read(tmp_path):
    file = tmp_path / "HK.json"
    file.write_text(json.dumps([[ask("q"), "gold", "lead", [1], [2], f"bad{ask('q')}", 6, -1]]))
    assert read_released(file) == {
        ask("q"): {"answer": "gold", "wrong": "lead", "triggered prompt": f"bad{ask('q')}", "c": 6}
    }
    file.write_text("[[1, 2]]")
    with pytest.raises(RecordsError, match="no list of records of eight fields"):
        read_released(file)
