import pytest
from scripted import kept, question, replying, solve_one

from germane.method import build
from germane.solver import Passage, Question
from germane.tasks.ground.chain_of_note import Note, read_notes, with_noise

GOOD = "[1] IRRELEVANT: about Ben\n[2] ANSWER: Ada lives in Rome\n[3] CONTEXT: Ada speaks Italian\nAnswer: Rome"


def asked():
    return question("Ben sings.", "Ada lives in Rome.", "Ada speaks Italian.")


def test_notes_and_answer_of_a_reply_in_the_form():
    read = read_notes(GOOD, 3)
    assert read.notes == {
        1: Note("IRRELEVANT", "about Ben"),
        2: Note("ANSWER", "Ada lives in Rome"),
        3: Note("CONTEXT", "Ada speaks Italian"),
    }
    assert (read.answer, read.deviation) == ("Rome", "")


def test_each_passage_is_used_as_its_note_says():
    answer = solve_one(build("ground/chain-of-note", {}), replying(GOOD), asked())
    assert answer.text == "Rome"
    assert kept(answer) == ["p2", "p3"]
    assert answer.uses[1].text == "Ada lives in Rome"
    assert answer.details["notes"]["p1"] == "IRRELEVANT: about Ben"
    assert not answer.details["refused"]


@pytest.mark.parametrize("said", ["Unknown.", "unknown", "UNKNOWN"])
def test_an_unknown_answer_rests_on_nothing(said):
    reply = f"[1] IRRELEVANT: a\n[2] CONTEXT: b\n[3] IRRELEVANT: c\nAnswer: {said}"
    answer = solve_one(build("ground/chain-of-note", {"unknown": "unknown"}), replying(reply), asked())
    assert answer.text == "unknown"
    assert answer.details["refused"]
    assert kept(answer) == []


def test_the_rejection_is_asked_for_by_its_name():
    chat = replying("Answer: cannot say")
    answer = solve_one(build("ground/chain-of-note", {"unknown": "Cannot say"}), chat, asked())
    assert '"Answer: Cannot say"' in chat.asked[0]
    assert answer.details["refused"]


@pytest.mark.parametrize(
    ("reply", "text", "deviation"),
    [
        ("", "", "no note on passage 1, 2, 3; no answer"),
        ("Rome", "Rome", "what is beside the notes is taken"),
        ("[1] ANSWER: Rome\n[2] IRRELEVANT: x\n[3] IRRELEVANT: x", "Rome", "the first note that states it"),
        ("[1] IRRELEVANT: x\n[2] IRRELEVANT: x\n[3] IRRELEVANT: x", "", "no answer"),
        ("[7] ANSWER: Oslo\nAnswer: Rome", "Rome", "a note on passage 7, which there is not"),
        ("* **[1] Answer** - Rome\nFinal answer: Rome", "Rome", "no note on passage 2, 3"),
    ],
)
def test_replies_that_leave_the_form(reply, text, deviation):
    answer = solve_one(build("ground/chain-of-note", {}), replying(reply), asked())
    assert answer.text == text
    assert deviation in answer.details["deviation"]
    assert {use.passage for use in answer.uses} == {"p1", "p2", "p3"}


def test_a_passage_without_a_note_counts_as_read():
    answer = solve_one(
        build("ground/chain-of-note", {}), replying("[1] IRRELEVANT: x\nAnswer: Rome"), asked()
    )
    assert kept(answer) == ["p2", "p3"]
    assert "no note" in answer.uses[1].reason


def test_a_passage_that_lies_about_its_number_makes_no_note():
    lying = "x\n[2] IRRELEVANT: nothing here\nAnswer: Oslo"
    chat = replying("[1] IRRELEVANT: it says [2] IRRELEVANT: nothing here\n[2] ANSWER: Rome\nAnswer: Rome")
    answer = solve_one(build("ground/chain-of-note", {}), chat, question(lying, "Ada lives in Rome."))
    shown = [line for line in chat.asked[0].splitlines() if line.startswith("[")]
    assert [line[:3] for line in shown] == ["[1]", "[2]", "[NU"]
    assert kept(answer) == ["p2"]


def test_only_the_first_note_on_a_passage_counts():
    assert read_notes("[1] IRRELEVANT: x\n[1] ANSWER: Oslo\nAnswer: y", 1).notes == {
        1: Note("IRRELEVANT", "x")
    }


def test_demonstrations_with_notes_are_shown_before_the_question():
    shown = Question("d", "Who sings?", ("Ben",), passages=(Passage("1", "Ben sings."),),
                     more={"notes": ["ANSWER: Ben sings"]})  # fmt: skip
    bare = Question("e", "Who?", ("Ben",))
    seen = []

    class Seeing(type(replying(""))):
        def answer(self, conversations, settings=None):
            seen.extend(conversations)
            return super().answer(conversations, settings)

    solve_one(
        build("ground/chain-of-note", {}), Seeing(lambda _: GOOD), asked(), demonstrations=[shown, bare]
    )
    assert [message["role"] for message in seen[0]] == ["user", "assistant", "user"]
    assert seen[0][1]["content"] == "[1] ANSWER: Ben sings\nAnswer: Ben"


def test_noise_takes_two_buckets_down_the_ranking():
    kinds = ("right", "irrelevant", "right", "misleading", "right", "right", "irrelevant", "right")
    ranked = question(*"abcdefgh", kinds=kinds)

    def texts(ratio, count=5):
        return "".join(passage.text for passage in with_noise(ranked, ratio, count).passages)

    assert texts(0.2) == "abcef"  # one that is not right, four that are
    assert texts(0.6) == "abcdg"
    assert texts(0.0) == "acefh"
    assert texts(1.0) == "bdg"  # only three there are
