"""A server that speaks the OpenAI protocol on this machine, and can be told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], str]


class ChatServer:
    """Answers `/v1/chat/completions`.

    Attributes:
        answer: Request -> text of the answer.
        faults: What to do with the next requests instead, one each: a status, "broken" (no JSON),
            "odd" (JSON, but no completion), or "slow".
        requests: Every request's body, in the order of arrival.
    """

    def __init__(self) -> None:
        self.answer: Answer = lambda request: f"{request['model']}: {request['messages'][-1]['content']}"
        self.faults: list[int | str] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server._serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
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
        if fault == "broken":
            return self._send(handler, 200, '{"choices": [{"mess')
        if fault == "odd":
            return self._send(handler, 200, '{"hello": "world"}')
        if handler.path != "/v1/chat/completions":
            return self._send(handler, 404, '{"error": {"message": "not here"}}')
        return self._send(handler, 200, json.dumps(self._completion(request)))

    def _completion(self, request: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.answer(request)}
        return {
            "id": "1", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
        }  # fmt: skip

    def _send(self, handler: BaseHTTPRequestHandler, status: int, text: str) -> None:
        body = text.encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(body)))
            if status == 429:
                handler.send_header("Retry-After", "0.01")
            handler.end_headers()
            handler.wfile.write(body)
        except OSError:
            pass  # the client has gone
