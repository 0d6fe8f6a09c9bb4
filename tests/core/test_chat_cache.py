"""Answers on disk: what is found again, what is not, and what happens when things break."""

from __future__ import annotations

import zoo  # first: sets the environment before transformers is imported

# isort: split
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from servers import ChatServer

from germane.core.chat import ChatSettings
from germane.core.chat_cache import CachedChat
from germane.core.endpoint_chat import EndpointChat
from germane.core.errors import EndpointError, SettingError
from germane.core.local_chat import LocalChat


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


MANY = [asked(str(number)) for number in range(9)]


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "answers.sqlite3"


def cached(server: ChatServer, file: Path, **options: Any) -> CachedChat:
    return CachedChat(EndpointChat(server.url, "tiny", **options), file)


def kept(file: Path) -> int:
    with sqlite3.connect(file) as connection:
        return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])


def test_nothing_is_asked_twice(server: ChatServer, file: Path):
    first = cached(server, file).answer(MANY)
    chat = cached(server, file)  # another, as after a restart
    again = chat.answer([*MANY[::-1], asked("new")])
    assert [reply.text for reply in again] == [f"tiny: {n}" for n in (8, 7, 6, 5, 4, 3, 2, 1, 0, "new")]
    assert [reply.cached for reply in again] == [True] * 9 + [False]
    assert not any(reply.cached for reply in first)
    assert len(server.requests) == 10
    assert [call.reply for call in chat.calls] == again
    assert chat.calls[0].model == f"tiny at {server.url}"


def test_other_settings_and_models_are_other_answers(server: ChatServer, file: Path):
    chat = cached(server, file)
    for settings in (
        ChatSettings(),
        ChatSettings(max_tokens=5),
        ChatSettings(stop=["."]),
        ChatSettings(temperature=0.5),
        ChatSettings(temperature=0.5, seed=1),
        ChatSettings(temperature=0.5, top_p=0.5),
    ):
        assert not chat.answer([asked("x")], settings)[0].cached
        assert chat.answer([asked("x")], settings)[0].cached
    assert not chat.answer([[{"role": "system", "content": "x"}]])[0].cached
    assert not CachedChat(EndpointChat(server.url, "other"), file).answer([asked("x")])[0].cached
    assert chat.answer([asked("x")], ChatSettings(seed=7))[0].cached  # the likeliest token needs no seed


def test_repetitions_in_one_call(server: ChatServer, file: Path):
    """Greedily one answer is enough; sampled ones are asked for each, and found again as they were."""
    chat = cached(server, file, parallel=1)
    assert [reply.cached for reply in chat.answer([asked("x")] * 3)] == [False, True, True]
    assert len(server.requests) == 1
    server.answer = lambda request: str(len(server.requests))
    sampled = ChatSettings(temperature=1.0)
    texts = [reply.text for reply in chat.answer([asked("x")] * 3, sampled)]
    assert texts == ["2", "3", "4"]
    assert [reply.text for reply in chat.answer([asked("x")] * 3, sampled)] == texts


def test_a_retrained_model_in_the_same_folder_is_another(tmp_path: Path, file: Path):
    folder = str(zoo.save(zoo.make(transformers.LlamaForCausalLM, zoo.llama_config()), tmp_path / "model"))
    settings = ChatSettings(max_tokens=3)

    def answer() -> bool:
        return CachedChat(LocalChat.load(folder), file).answer([asked("w1")], settings)[0].cached

    assert [answer(), answer()] == [False, True]
    stamp = (tmp_path / "model" / "model.safetensors").stat()
    zoo.rewrite(
        tmp_path / "model",
        lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 0.5},
    )
    os.utime(tmp_path / "model" / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert [answer(), answer()] == [False, True]


def test_scores_are_kept_too(tmp_path: Path, file: Path):
    local = LocalChat(zoo.make(transformers.LlamaForCausalLM, zoo.llama_config()), zoo.tokenizer())
    chat = CachedChat(local, file)
    scores = chat.log_probabilities([asked("w1"), asked("w2")], ["w3", "w4 w5"])
    options = chat.option_log_probabilities([asked("w1")], ["w3", "w4"])
    local.model = None  # type: ignore[assignment]  # nobody there to be asked
    assert chat.log_probabilities([asked("w2"), asked("w1")], ["w4 w5", "w3"]) == scores[::-1]
    assert chat.option_log_probabilities([asked("w1")], ["w3", "w4"]) == options
    assert options[0]["w3"] == pytest.approx(scores[0].log_probability, abs=1e-5)


def test_what_was_answered_before_a_fault_is_kept(server: ChatServer, file: Path):
    server.faults = [None] * 4 + [500] * 9
    chat = cached(server, file, parallel=1, retries=0)
    with pytest.raises(EndpointError, match="Of 9 conversations, 4 were answered"):
        chat.answer(MANY)
    server.faults = []
    server.requests.clear()
    assert [reply.cached for reply in chat.answer(MANY)] == [True] * 4 + [False] * 5
    assert len(server.requests) == 5


KILLED = """
import sys
from germane.core.chat_cache import CachedChat
from germane.core.endpoint_chat import EndpointChat
chat = CachedChat(EndpointChat(sys.argv[1], "tiny", parallel=1), sys.argv[2])
chat.answer([[{"role": "user", "content": str(number)}] for number in range(9)])
"""


def test_what_was_answered_before_a_kill_is_kept(server: ChatServer, file: Path):
    arrived, end = threading.Event(), threading.Event()

    def answer(request: dict[str, Any]) -> str:
        if request["messages"][0]["content"] == "5":
            arrived.set()
            end.wait(30)
        return "yes"

    server.answer = answer
    process = subprocess.Popen([sys.executable, "-c", KILLED, server.url, str(file)])
    assert arrived.wait(60)
    while kept(file) < 5:  # the sixth is being waited for, so these are on their way to the file
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end.set()
    found = [reply.cached for reply in cached(server, file).answer(MANY)]
    assert found == [True] * 5 + [False] * 4


@pytest.mark.parametrize("damage", ["no database", "overwritten pages"])
def test_a_damaged_file_is_set_aside(
    server: ChatServer, file: Path, damage: str, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("GERMANE_QUIET", raising=False)
    chat = cached(server, file)
    chat.answer([asked(f"{number} " + "x" * 2000) for number in range(20)])
    content = file.read_bytes()
    broken = (
        b"\xff" * len(content)
        if damage == "no database"
        else content[:4096] + b"\xff" * (len(content) - 4096)
    )
    file.write_bytes(broken)
    assert not chat.answer([asked("x")])[0].cached
    assert chat.answer([asked("x")])[0].cached
    assert [
        line.count("set aside as answers.sqlite3.damaged-") for line in capsys.readouterr().err.splitlines()
    ] == [1]
    aside = [found for found in file.parent.iterdir() if "damaged" in found.name]
    assert [found.read_bytes() for found in aside] == [broken]


def test_threads_share_a_file(server: ChatServer, file: Path):
    chats = [cached(server, file) for _ in range(6)]
    threads = [threading.Thread(target=chat.answer, args=(MANY,)) for chat in chats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(chat.calls) == 9 for chat in chats)
    assert kept(file) == 9


def fill(file: Path, number: int) -> None:
    chat = CachedChat(EndpointChat("http://127.0.0.1:9/v1", "tiny"), file)
    for step in range(20):
        chat._write({f"{number} {step}": {}})
        chat._read([f"{number} {step}"])


def test_processes_share_a_file(file: Path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=fill, args=(file, number)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert kept(file) == 120


def test_a_file_that_cannot_be_written(server: ChatServer, tmp_path: Path):
    with pytest.raises(SettingError, match="answers cannot be kept here"):
        cached(server, tmp_path).answer([asked("x")])  # a folder
    assert not server.requests
