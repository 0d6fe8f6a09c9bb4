import json
from pathlib import Path

import pytest
import zoo
from scripted import Scripted, kept, question, replying, solve_one

from germane.core.errors import CheckpointError, RecordsError
from germane.core.records import write_jsonl
from germane.core.training import Training
from germane.embedded import minilm
from germane.method import build
from germane.tasks.ground._ranker import Ranker, read_labelled
from germane.tasks.ground.rationale_ranking import Scores, choose, combined

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "rationale_ranking.json").read_text())


@pytest.mark.parametrize("case", FIXTURE["texts"], ids=str)
def test_the_combined_text_is_the_official_codes(case):
    assert combined(case["context"], case["rationale"], case["passages"]) == case["out"]


@pytest.mark.parametrize("case", FIXTURE["rules"], ids=lambda case: f"{case['rule']} {case['threshold']}")
def test_choices_are_the_official_codes(case):
    found = [choose(Scores(*scores), case["rule"], case["threshold"]) for scores in FIXTURE["scores"]]
    assert "".join(choice[0] for choice in found) == case["choices"]


def test_scores_that_equal_the_threshold():
    even = Scores(0.5, 0.5, 0.4)
    assert choose(even, "passages-first", 0.5) == "passages"
    assert choose(even, "either", 0.5) == "both"  # neither is above it
    assert choose(even, "default-highest", 0.5) == "passages"
    assert choose(even, "highest", 0.5) == "rationale"
    assert choose(Scores(0.9, 0.1, 0.4), "both", 0.5) == "both"


def reading(rationale: str) -> Scripted:
    return Scripted(lambda prompt: rationale if "Do not answer it" in prompt else "Rome")


def ranking(**settings):
    return build("ground/rationale-ranking", settings)


def test_passages_beside_the_point_are_left_out_and_the_rationale_is_read():
    chat = reading("Ada lives in Rome, and has for years.")
    answer = solve_one(ranking(combine="highest"), chat, question("The price of wheat fell."))
    assert "wheat" not in chat.asked[1]
    assert "Ada lives in Rome" in chat.asked[1]
    assert answer.details["read"] == "rationale"
    assert answer.text == "Rome"
    assert kept(answer) == []


def test_only_the_best_passages_are_kept_in_their_order():
    texts = ("Wheat is dear.", "Ada lives in Rome.", "Rain fell.", "Ada lives by the sea.")
    chat = reading("Nothing.")
    answer = solve_one(ranking(combine="passages-first", threshold=0, most=2), chat, question(*texts))
    assert kept(answer) == ["p2", "p4"]
    assert '"Ada lives in Rome. Ada lives by the sea."' in chat.asked[1]


def test_an_empty_rationale_has_no_score():
    answer = solve_one(ranking(), replying("", "Rome"), question("Ada lives in Rome."))
    assert answer.details["scores"]["rationale"] == 0
    assert kept(answer) == ["p1"]


def test_the_context_of_the_record_comes_first():
    chat = reading("A reason")
    solve_one(ranking(combine="both"), chat, question("Found this", more={"context": "A start"}))
    assert '"A start. Further Explanation: A reason. Found this."' in chat.asked[1]


PEOPLE = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ian", "June", "Kai", "Lea")
JOBS = ("baker", "pilot", "nurse", "tailor", "farmer")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Who works as what: a bad context is about the same person, but only says what is not so."""
    rows = []
    for number, name in enumerate(PEOPLE):
        asked = f"What is the job of {name}?"
        job, other = JOBS[number % 5], JOBS[(number + 2) % 5]
        rows.append({"question": asked, "context": f"{name} is a {job}.", "label": 1})
        rows.append(
            {"question": asked, "context": f"The job of {name} is not that of a {other}.", "label": 0}
        )
    file = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    write_jsonl(rows, file)
    return file


def test_a_trained_ranker_tells_good_contexts_from_misleading_ones_and_cosine_does_not(labelled):
    rows = read_labelled(str(labelled))
    ranker = Ranker(str(minilm()), trained=True)
    ranker.train(rows[:16], Training(learning_rate=2e-4, epochs=3, batch_size=4), seed=0)
    pairs = [(row["question"], row["context"]) for row in rows[16:]]
    trained, cosine = ranker(pairs), Ranker(str(minilm()))(pairs)
    assert min(trained[::2]) > max(trained[1::2])
    assert min(cosine[::2]) < max(cosine[1::2])


def test_the_same_ranker_from_the_same_seed(labelled):
    rows = read_labelled(str(labelled))[:8]
    found = []
    for _ in range(2):
        ranker = Ranker(str(minilm()), trained=True)
        ranker.train(rows, Training(epochs=1, batch_size=4), seed=3)
        found.append(ranker([("Who?", "Ada.")]))
    assert found[0] == found[1]


def test_a_saved_classifier_is_read_as_it_is(tmp_path):
    from transformers import BertForSequenceClassification

    model = zoo.make(BertForSequenceClassification, zoo.bert_config(num_labels=2))
    folder = zoo.save(model, tmp_path / "scorer")
    import torch

    tokens = zoo.tokenizer()("w1 w2", "w3", return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens).logits.softmax(dim=1)[0, 1]
    assert Ranker(str(folder))([("w1 w2?", "w3")])[0] == pytest.approx(float(expected), abs=1e-5)


def test_a_classifier_of_many_classes_is_refused(tmp_path):
    from transformers import BertForSequenceClassification

    folder = zoo.save(
        zoo.make(BertForSequenceClassification, zoo.bert_config(num_labels=5)), tmp_path / "five"
    )
    with pytest.raises(CheckpointError, match="has 5 classes"):
        Ranker(str(folder))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "q", "label": 1}], "needs texts in 'question' and 'context'"),
        ([{"question": "q", "context": "c", "label": "good"}], "must be 1 .good. or 0 .bad."),
        ([{"question": "q", "context": "c", "label": 1}], "no question has both"),
    ],
)
def test_bad_labelled_records_are_refused_before_work(rows, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    write_jsonl(rows, file)
    with pytest.raises(RecordsError, match=message):
        ranking(labelled=str(file)).check_questions([question("x")], [])
