"""A graph is checked whole, and each error says what, where and what next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from parts import written

from germane.core.errors import SettingError
from germane.tasks.route._graph import parse_graph, read_graph

LAW = {"description": "courts"}
MATHS = {"description": "sums", "model": "m"}
PAIR = {"law": LAW, "maths": MATHS}


def test_without_masters_one_knows_every_worker():
    graph = parse_graph({"workers": {**PAIR, "general": LAW}}, "g")
    assert graph.edges == [("router", "law"), ("router", "maths"), ("router", "general")]
    assert (graph.entry, graph.default) == ("router", "general")


def test_what_is_left_out_is_filled_in():
    masters = {"top": {"neighbours": ["law", "low"]}, "low": {"description": "d", "neighbours": ["maths"]}}
    graph = parse_graph({"workers": PAIR, "masters": masters}, "g")
    assert (graph.entry, graph.default) == ("top", "law")


def test_a_cycle_is_allowed():
    masters = {
        "a": {"description": "d", "neighbours": ["b"]},
        "b": {"description": "d", "neighbours": ["a", "law", "maths"]},
    }
    assert ("b", "a") in parse_graph({"workers": PAIR, "masters": masters}, "g").edges


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"g.workers: required"),
        ({"workers": {}}, r"g.workers: .*at least 1"),
        ({"workers": {"law": {}}}, r"g.workers.law.description: required"),
        ({"workers": {"law": {**LAW, "modle": "x"}}}, r"g.workers.law.modle: unknown setting.*'model'"),
        (
            {"workers": {"law": {**LAW, "endpoint": "http://x"}}},
            r"workers.law: has an endpoint but no `model`",
        ),
        ({"workers": PAIR, "default": "mahts"}, r"g.default: no worker 'mahts'; did you mean 'maths'\?"),
        ({"workers": PAIR, "entry": "law"}, r"g.entry: no master 'law'"),
        (
            {"workers": PAIR, "masters": {"law": {"neighbours": ["maths"]}}},
            r"'law' is a worker and a master",
        ),
        ({"workers": {" ": LAW}}, r"a node is named ' '"),
        (
            {"workers": PAIR, "masters": {"top": {"neighbours": ["law", "math"]}}},
            r"masters.top.neighbours: no node 'math'; did you mean 'maths'\? Known here: law, maths, top",
        ),
        (
            {"workers": PAIR, "masters": {"top": {"neighbours": ["law"]}}},
            r"maths cannot be reached from 'top'",
        ),
        (
            {"workers": PAIR, "masters": {"top": {"neighbours": []}}},
            r"masters.top.neighbours: .*at least 1",
        ),
        (
            {"workers": PAIR, "masters": {"top": {"neighbours": ["law", "law", "maths"]}}},
            r"names a node twice",
        ),
        (
            {
                "workers": PAIR,
                "masters": {"a": {"neighbours": ["b", "law"]}, "b": {"neighbours": ["maths"]}},
            },
            r"masters.b: is a neighbour of 'a', so it needs a `description`",
        ),
    ],
)
def test_what_does_not_hang_together_is_refused(content: dict[str, Any], message: str):
    with pytest.raises(SettingError, match=message):
        parse_graph(content, "g")


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(SettingError, match="no such graph"):
        read_graph(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(SettingError, match="mapping with `workers`"):
        read_graph(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("workers: [")
    with pytest.raises(SettingError, match="not YAML"):
        read_graph(tmp_path / "broken.yaml")


def test_yaml_and_json_say_the_same_and_hold_no_code(tmp_path: Path):
    content = {"workers": PAIR}
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert read_graph(tmp_path / "g.yaml") == read_graph(written(tmp_path, content))
    (tmp_path / "code.yaml").write_text("workers: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(SettingError, match="not YAML"):
        read_graph(tmp_path / "code.yaml")


def test_folders_beside_the_file_are_found(tmp_path: Path):
    (tmp_path / "models" / "law").mkdir(parents=True)
    workers = {"law": {**LAW, "model": "models/law"}, "hub": {**LAW, "model": "owner/name"}}
    graph = read_graph(written(tmp_path, {"workers": workers}))
    assert graph.workers["law"].model == str(tmp_path / "models" / "law")
    assert graph.workers["hub"].model == "owner/name"


def test_a_worker_without_a_model_cannot_answer():
    graph = parse_graph({"workers": PAIR}, "g")
    with pytest.raises(SettingError, match=r"workers.law: has no model"):
        graph.require_models()
