"""Methods with a model behind a real server: `transformers serve`, a process of its own on this machine."""

from __future__ import annotations

import zoo  # first: sets the environment before transformers is imported

# isort: split
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from servers import ChatServer

from germane import embedded, ground, reason
from germane.core import endpoint_chat
from germane.core.chat import ChatSettings, open_chat
from germane.core.errors import EndpointError
from germane.core.local_chat import LocalChat
from germane.core.records import write_jsonl

pytest.importorskip("fastapi", reason="transformers serve needs it")
pytest.importorskip("uvicorn", reason="transformers serve needs it")
QUESTIONS = [
    {"id": "a", "question": "Where does Ann live?", "answer": "Oslo", "passages": ["Ann lives in Oslo."]},
    {"id": "b", "question": "Where does Bob live?", "answer": "Rome", "passages": ["Bob lives in Rome."]},
]


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def _wait(url: str, server: subprocess.Popen[str]) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, server.stdout.read() if server.stdout else ""
            time.sleep(0.1)
    raise AssertionError("the server does not start")


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "smollm2":
        return embedded.smollm2()
    model = zoo.make(transformers.LlamaForCausalLM, zoo.llama_config())
    place = zoo.save(model, tmp_path_factory.mktemp("served"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The address of a server that has the folder's model."""
    port = _free_port()
    command = [
        str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--device", "cpu",
        "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        _wait(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}/v1#{folder}"
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GERMANE_CACHE", str(tmp_path / "cache"))
    write_jsonl(QUESTIONS, tmp_path / "questions.jsonl")
    return tmp_path / "questions.jsonl"


def test_the_server_says_what_the_model_says_here(folder: Path, address: str):
    asked = [
        [{"role": "user", "content": f"What is the capital of {name}?"}] for name in ("France", "Japan")
    ]
    settings = ChatSettings(max_tokens=8)
    there, here = open_chat(address), LocalChat.load(str(folder))
    assert [reply.text for reply in there.answer(asked, settings)] == [
        reply.text for reply in here.answer(asked, settings)
    ]
    assert [call.reply.prompt_tokens for call in there.calls] == [
        call.reply.prompt_tokens for call in here.calls
    ]


@pytest.mark.parametrize("method", ["direct", "self-consistency"])
def test_a_method_of_reason_over_the_server(folder: Path, address: str, file: Path, method, tmp_path: Path):
    result = reason(address, str(file), method=method, out=tmp_path / "out", max_tokens=8)
    calls = (result.folder / "calls.jsonl").read_text().splitlines()
    assert {json.loads(call)["question"] for call in calls} == {"a", "b"}
    assert all(json.loads(call)["completion_tokens"] > 0 for call in calls)


def test_a_method_of_ground_over_the_server_answers_as_here(
    folder: Path, address: str, file: Path, tmp_path: Path
):
    answers = []
    for number, model in enumerate((address, str(folder))):
        place = tmp_path / str(number)
        result = ground(model, str(file), method="plain", out=place, max_tokens=8)
        lines = (result.folder / "answers.jsonl").read_text().splitlines()
        answers.append([json.loads(line)["response"] for line in lines])
    assert answers[0] == answers[1]


def test_after_a_server_died_the_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the questions that had their answers none is asked again."""
    monkeypatch.setenv("GERMANE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(endpoint_chat, "_FIRST_PAUSE", 0.01)
    rows = [{"id": str(number), "question": f"What is {number}?", "answer": "x"} for number in range(20)]
    write_jsonl(rows, tmp_path / "many.jsonl")
    with ChatServer() as server:
        url, port = server.url, server.port
        server.faults = [None] * 6 + [500] * 1000
        with pytest.raises(EndpointError, match="answers with status 500, asked"):
            reason(f"{url}#tiny", str(tmp_path / "many.jsonl"), method="direct", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with ChatServer(port) as server:
        reason(f"{url}#tiny", str(tmp_path / "many.jsonl"), method="direct", out=tmp_path / "out")
        assert len(server.requests) == 14
