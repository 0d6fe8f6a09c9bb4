import pytest
from scripted import kept, question, replying, solve_one

from germane.core.errors import RecordsError
from germane.method import build

KINDS = ("misleading", "right", "irrelevant")


def test_only_right_passages_reach_the_model():
    chat = replying("Rome")
    asked = question("Ada lives in Oslo.", "Ada lives in Rome.", "Ben sings.", kinds=KINDS)
    answer = solve_one(build("ground/oracle", {}), chat, asked)
    assert "Rome" in chat.asked[0]
    assert "Oslo" not in chat.asked[0]
    assert "Ben" not in chat.asked[0]
    assert kept(answer) == ["p2"]
    assert [use.passage for use in answer.uses] == ["p1", "p2", "p3"]


def test_records_that_do_not_say_what_is_right_are_refused():
    method = build("ground/oracle", {})
    with pytest.raises(RecordsError, match="question 'q' has no passage of kind 'right'"):
        method.check_questions([question("Ada lives in Rome.")], [])
    method.check_questions([question("Ada lives in Rome.", kinds=("right",))], [])
