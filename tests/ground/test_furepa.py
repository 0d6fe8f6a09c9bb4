from collections import Counter
from dataclasses import replace

import pytest
from scripted import Scripted, kept, question, replying, solve_one

from germane.core.errors import CheckpointError, SettingError
from germane.method import build
from germane.retrieval import Passage, RetrieverRequest, make_index
from germane.solver import Solving
from germane.tasks.ground.furepa import most_frequent, plan_records, read_end

TEXTS = (
    "Ada is married to Ben.", "Ben was born in Rome.", "Wheat is dear this year.", "It rained on Monday.",
)  # fmt: skip
KINDS = ("right", "right", "irrelevant", "irrelevant")


def furepa(**settings):
    return build("ground/furepa", {"depth": 1, "plans": 3, **settings})


def asked():
    return question(*TEXTS, kinds=KINDS)


def test_how_a_reply_ends():
    assert read_end("First.\nSearch: who?\nAnswer: Rome") == ("answer", "Rome")
    assert read_end("I reason.\n**Search:** where was Ben born?") == ("search", "where was Ben born?")
    assert read_end("I do not know what to answer here.") == ("", "")
    assert read_end("") == ("", "")


def test_the_most_frequent_answer_however_it_is_written():
    assert most_frequent(["Oslo", "the Rome", "Rome."]) == "the Rome"
    assert most_frequent(["Oslo", "Rome"]) == "Oslo"


def hop(prompt: str) -> str:
    """Searches for Ben until a passage says where he was born."""
    return "Answer: Rome" if "born in Rome" in prompt else "It is Ben.\nSearch: where was Ben born"


def test_searches_until_most_replies_answer():
    chat = Scripted(hop)
    answer = solve_one(furepa(), chat, asked())
    assert answer.text == "Rome"
    assert kept(answer) == ["p1", "p2"]
    assert len(chat.asked) == 6  # two rounds of three, and nothing to close
    assert answer.details["rounds"][0]["searched"] == "where was Ben born"
    assert answer.details["rounds"][0]["plans"][0]["votes"] == 3


def test_earlier_thoughts_and_queries_are_never_shown():
    chat = Scripted(hop)
    solve_one(furepa(), chat, asked())
    assert all("It is Ben" not in prompt and "where was Ben born" not in prompt for prompt in chat.asked)


def test_every_drawn_reply_has_a_seed_of_its_own():
    chat = Scripted(hop)
    solve_one(furepa(), chat, asked())
    assert len({settings.seed for settings in chat.settings}) == 6


def test_the_plan_that_most_propose_without_an_assessor():
    replies = ["Search: wheat prices", "Search: where was Ben born", "Search: Where was Ben born?"]
    chat = replying(*replies, "Answer: Rome")
    answer = solve_one(furepa(), chat, asked())
    assert answer.details["rounds"][0]["searched"] == "where was Ben born"
    assert [plan["votes"] for plan in answer.details["rounds"][0]["plans"]] == [1, 2]


def test_an_assessor_overrules_the_majority():
    replies = ["Search: rain", "Search: rain", "Search: where do Ada and Ben live"]
    answer = solve_one(furepa(assessor="minilm"), replying(*replies, "Answer: Rome"), asked())
    assert answer.details["rounds"][0]["searched"] == "where do Ada and Ben live"


@pytest.mark.parametrize("reply", ["", "No idea.", "Search:", "Answer:"])
def test_replies_without_form_end_the_search(reply):
    chat = replying(reply)
    answer = solve_one(furepa(), chat, asked())
    assert len(chat.asked) == 4  # one round, and the answer
    assert {use.passage for use in answer.uses} == {"p1", "p2", "p3", "p4"}


def test_the_same_query_is_not_searched_for_twice():
    chat = replying("Search: where was Ben born")
    answer = solve_one(furepa(), chat, asked())
    assert len(chat.asked) == 3 + 3 + 1
    assert answer.details["queries"] == ["Where does Ada live?", "where was Ben born"]


def test_what_is_known_has_a_limit():
    waiting = iter(["wheat", "wheat", "wheat", "rain", "rain", "rain"])
    chat = Scripted(lambda _: f"Search: {next(waiting, 'wheat')}")
    answer = solve_one(furepa(depth=2, known=2), chat, asked())
    assert len(kept(answer)) == 2


def test_records_for_an_assessor():
    replies = ["Search: wheat", "Search: where was Ben born", "Search: where was Ben born"]
    answer = solve_one(furepa(), replying(*replies, "Answer: Rome"), asked())
    rows = plan_records(asked(), answer, {"wheat": ["p3"], "where was Ben born": ["p1", "p2"]})
    assert [(row["context"], row["label"]) for row in rows] == [("wheat", 0), ("where was Ben born", 1)]
    assert rows[0]["question"] == "Where does Ada live? Known: Ada is married to Ben."


def test_a_question_is_asked_as_often_whatever_is_asked_beside_it():
    def rule(prompt):
        return hop(prompt) if "Ada" in prompt.split("Question:")[1] else "No idea."

    other = replace(asked(), id="other", text="Who sings?")
    solving = Solving(Scripted(rule), seed=1)
    furepa().solve(solving, [asked(), other])
    counts = Counter(call["question"] for call in solving.calls)
    assert counts == {"q": 6, "other": 4}


def test_what_is_missing_is_refused_before_work():
    with pytest.raises(SettingError, match="say of which model"):
        furepa(labelled="rows.jsonl").check_questions([asked()], [])
    with pytest.raises(CheckpointError):
        furepa(assessor="./no-such-model").check_questions([asked()], [])


def test_searches_an_index(tmp_path):
    texts = (*TEXTS, "Ben was born in Rome, near the river.")
    passages = (Passage(f"d{number}", "", text) for number, text in enumerate(texts))
    make_index(RetrieverRequest(name="bm25").build(), passages, tmp_path)
    answer = solve_one(furepa(index=str(tmp_path)), Scripted(hop), question("Of no use."))
    assert answer.text == "Rome"
    assert "p1" not in kept(answer)
    assert {use.passage for use in answer.uses} == {"p1", *answer.details["rounds"][-1]["known"]}
