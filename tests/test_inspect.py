"""Methods of reason and ground inside Inspect, run by its own command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import ChatServer

from germane.core.records import Data, write_jsonl
from germane.method import names
from germane.solver import read_questions

pytest.importorskip("inspect_ai", reason="inspect-ai is not installed")

QUESTIONS = [
    {
        "id": "lives", "question": "Where does Ann live?", "answer": "Oslo",
        "passages": [
            {"id": "a", "text": "Ann lives in Oslo.", "kind": "right"},
            {"id": "b", "text": "Bob lives in Rome.", "kind": "irrelevant"},
        ],
    },
    {
        "id": "keeps", "question": "What does Bob keep?", "options": ["a cat", "a dog", "a goat"],
        "answer": "a dog", "passages": ["Bob keeps a dog."],
    },
]  # fmt: skip


def reader(request: dict[str, Any]) -> str:
    """Reads what it is asked about, and nothing else."""
    text = request["messages"][-1]["content"]
    if "Where does Ann live" in text:
        return "Oslo" if "Ann lives in Oslo" in text else "Rome"
    return "B"


def inspect_eval(server: ChatServer, folder: Path, questions: Path, *more: str) -> Any:
    """What `inspect eval` writes of its run."""
    command = [
        str(Path(sys.executable).with_name("inspect")), "eval", "germane/questions", "-T", f"path={questions}",
        "--model", "openai-api/local/tiny", "--log-dir", str(folder / "logs"), "--log-format", "json",
        "--display", "none", *more,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "LOCAL_API_KEY": "none",
        "LOCAL_BASE_URL": server.url,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (log,) = (folder / "logs").glob("*.json")
    return json.loads(log.read_text())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_jsonl(QUESTIONS, tmp_path / "questions.jsonl")
    return tmp_path / "questions.jsonl"


@pytest.fixture
def server():
    with ChatServer() as server:
        server.answer = reader
        yield server


def accuracy(log: Any) -> float:
    return log["results"]["scores"][0]["metrics"]["accuracy"]["value"]


def test_a_method_of_ground_by_the_command_of_inspect(server: ChatServer, file: Path, tmp_path: Path):
    log = inspect_eval(server, tmp_path, file, "--solver", "germane/plain", "-S", "max_tokens=9")
    assert (log["status"], accuracy(log)) == ("success", 1.0)
    first = next(sample for sample in log["samples"] if sample["id"] == "lives")
    assert first["output"]["choices"][0]["message"]["content"] == "Oslo"
    assert [use["passage"] for use in first["metadata"]["germane"]["uses"]] == ["a", "b"]
    assert {request["max_tokens"] for request in server.requests} == {9}
    assert len(server.requests) == 2


def test_without_passages_the_same_reader_fails(server: ChatServer, file: Path, tmp_path: Path):
    log = inspect_eval(server, tmp_path, file, "--solver", "germane/no-retrieval")
    assert accuracy(log) == 0.5


def test_several_samples_of_a_method_of_reason(server: ChatServer, file: Path, tmp_path: Path):
    server.answer = lambda request: f"The answer is {reader(request)}."
    log = inspect_eval(server, tmp_path, file, "--solver", "germane/self-consistency", "-S", "samples=3")
    assert log["status"] == "success"
    assert len(server.requests) == 6
    assert all(request["temperature"] > 0 for request in server.requests)


def test_an_unknown_setting_ends_the_run_with_its_name(server: ChatServer, file: Path, tmp_path: Path):
    with pytest.raises(AssertionError, match="sampels"):
        inspect_eval(server, tmp_path, file, "--solver", "germane/self-consistency", "-S", "sampels=3")
    assert server.requests == []


def test_every_method_is_a_solver_by_a_name_of_its_own():
    from germane import inspect

    assert set(inspect.SOLVERS) == {*names("reason"), *names("ground")}
    short = [name.rpartition("/")[2] for name in inspect.SOLVERS]
    assert len(set(short)) == len(short)


def test_a_question_comes_back_from_its_sample_whole(file: Path):
    from inspect_ai.solver import TaskState

    from germane import inspect

    for question in read_questions(Data(name="questions", path=str(file))):
        sample = inspect.as_sample(question)
        state = TaskState(
            model="mockllm/model", sample_id=sample.id, epoch=1, input=sample.input, messages=[],
            target=inspect.Target(sample.target), choices=sample.choices, metadata=sample.metadata,
        )  # fmt: skip
        assert inspect.question_of(state) == question


@pytest.mark.slow
def test_a_real_model_inside_inspect(file: Path, tmp_path: Path):
    """SmolLM2 as Inspect itself runs it."""
    from germane.embedded import smollm2

    command = [
        str(Path(sys.executable).with_name("inspect")), "eval", "germane/questions", "-T", f"path={file}",
        "--solver", "germane/plain", "-S", "max_tokens=16", "--model", "hf/smollm2",
        "-M", f"model_path={smollm2()}", "-M", "device=cpu", "--log-dir", str(tmp_path / "logs"),
        "--log-format", "json", "--display", "none",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    (log,) = (tmp_path / "logs").glob("*.json")
    sample = next(s for s in json.loads(log.read_text())["samples"] if s["id"] == "lives")
    assert "Oslo" in sample["output"]["choices"][0]["message"]["content"]
