import pytest

from germane.tasks.route._graph import parse_graph
from germane.tasks.route._router import Card
from germane.tasks.route.keyword import KeywordRouter, overlap, words


def test_overlap_by_hand():
    # "what is the torque of a car engine" has torque, car, engine; the description knows two of three.
    query = words("What is the torque of a car-engine?")
    assert query == {"torque", "car", "engine"}
    assert overlap(query, words("Cars, car parts, ENGINE oil")) == pytest.approx(2 / 3)
    assert overlap(set(), query) == 0.0


def test_most_words_win_and_the_first_of_equals():
    workers = {
        "a": {"description": "cat dog"},
        "b": {"description": "dog bird fish"},
        "general": {"description": "x"},
    }
    graph = parse_graph({"workers": workers}, "g")
    card = Card(
        method="route/keyword", settings={}, master="router", nodes=list(workers), max_steps=1, graph={}
    )
    router = KeywordRouter(card, graph, 0.0)
    found = router.route_all(["bird and dog", "dog", "the moon", ""])
    assert [(d.worker, d.score) for d in found] == [
        ("b", 1.0),
        ("a", 1.0),
        ("general", 0.0),
        ("general", 0.0),
    ]
    assert found[2].fallback == "no word of it is in any description"
