"""A server that speaks the OpenAI protocol on this machine, and can be told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], str]
SAID = {
    "broken": '{"choices": [{"mess',
    "empty": "",
    "odd": '{"hello": "world"}',
    "none": '{"choices": []}',
}


class ChatServer:
    """Answers `/v1/chat/completions`, and `/v1/completions` where it is told how.

    Attributes:
        answer: Request -> text of the answer.
        score: Request -> what it says of log-probabilities, as the protocol has it; None: nothing.
        faults: What to do with the next requests instead, one each: a status, "broken" (half a JSON),
            "empty", "cut" (the connection ends in the middle), "gone" (before it began), "odd" (JSON, but
            no completion), "none" (no choice), "slow", or None for nothing.
        retry_after: What it says with status 429.
        requests: Every request's body, in the order of arrival.
    """

    def __init__(self, port: int = 0) -> None:
        self.answer: Answer = lambda request: f"{request['model']}: {request['messages'][-1]['content']}"
        self.score: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        self.faults: list[int | str | None] = []
        self.retry_after = "0.01"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server._serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.port = int(self._http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.die()

    def die(self) -> None:
        """Answer nobody any more."""
        self._http.shutdown()
        self._http.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append(request)
        self.headers.append({name.lower(): value for name, value in handler.headers.items()})
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return self._send(handler, fault, json.dumps({"error": {"message": f"told to say {fault}"}}))
        if fault == "slow":
            time.sleep(1.0)
        if fault in ("cut", "gone"):
            return self._cut(handler, fault == "cut")
        if isinstance(fault, str) and fault in SAID:
            return self._send(handler, 200, SAID[fault])
        kinds = {"/v1/chat/completions": self._completion}
        if self.score is not None:
            kinds["/v1/completions"] = self._repetition
        if handler.path not in kinds:
            return self._send(handler, 404, '{"error": {"message": "not here"}}')
        return self._send(handler, 200, json.dumps(kinds[handler.path](request), default=float))

    def _cut(self, handler: BaseHTTPRequestHandler, begun: bool) -> None:
        if begun:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
        handler.close_connection = True

    def _completion(self, request: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.answer(request)}
        return {
            "id": "1", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop", **self._scores(request)}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
        }  # fmt: skip

    def _repetition(self, request: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": 0, "text": "", "finish_reason": "length", **self._scores(request)}
        read = len(request["prompt"])
        return {
            "id": "1", "object": "text_completion", "created": 0, "model": request["model"],
            "choices": [choice],
            "usage": {"prompt_tokens": read, "completion_tokens": 1, "total_tokens": read + 1},
        }  # fmt: skip

    def _scores(self, request: dict[str, Any]) -> dict[str, Any]:
        asked = self.score is not None and "logprobs" in request
        return {"logprobs": self.score(request)} if asked else {}

    def _send(self, handler: BaseHTTPRequestHandler, status: int, text: str) -> None:
        body = text.encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(body)))
            if status == 429:
                handler.send_header("Retry-After", self.retry_after)
            handler.end_headers()
            handler.wfile.write(body)
        except OSError:
            pass  # the client has gone
