from scripted import kept, question, replying, solve_one

from germane.method import build


def test_no_passage_reaches_the_model():
    chat = replying("Rome")
    answer = solve_one(build("ground/no-retrieval", {}), chat, question("Ada lives in Oslo."))
    assert answer.text == "Rome"
    assert "Oslo" not in chat.asked[0]
    assert kept(answer) == []
    assert [use.passage for use in answer.uses] == ["p1"]
