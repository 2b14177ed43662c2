"""A small server on the loopback address that speaks the API which the page uses.

It gives the page, the model's description and streamed answers, and misbehaves on demand: tests set
its attributes. What it was asked, and whether the browser hung up, can be read from it.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from omnivlm_edge.server.protocol import LOADING

PAGE = Path(__file__).parents[1] / "src" / "omnivlm_edge" / "server" / "page.html"
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
TIMINGS = {
    "preprocess_ms": 11.2,
    "image_encode_ms": 402.5,
    "prompt_n": 95,
    "prompt_ms": 310.7,
    "prompt_per_second": 305.8,
    "cache_n": 0,
    "predicted_n": 14,
    "predicted_ms": 448.1,
    "predicted_per_second": 31.2,
    "ttft_ms": 741.9,
    "queue_ms": 0.2,
}
UNAVAILABLE = "unavailable_error"


@dataclass
class FakeOpenAI:
    """Use as a context manager; `url` is where the page is."""

    answer: list[str] = field(default_factory=lambda: ["Three horses", " and one", " duck."])
    finish_reason: str = "stop"
    timings: dict[str, Any] = field(default_factory=lambda: dict(TIMINGS))
    meta: dict[str, Any] = field(
        default_factory=lambda: {
            "image_size": 384,
            "image_tokens": 81,
            "n_ctx": 8192,
            "takes_questions": True,
            "single_turn": False,
        }
    )
    api_key: str | None = None
    loading: bool = False
    loading_message: str = LOADING
    failure: tuple[int, str, str, dict[str, str]] | None = None  # status, message, type, headers
    breaks_with: str | None = None  # the message of an error after the answer's pieces
    endless: bool = False  # the last piece again and again, until the browser hangs up
    asked: list[dict[str, Any]] = field(default_factory=list)  # the bodies of the questions
    hung_up: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> FakeOpenAI:
        fake = self

        class Handler(_Handler):
            server_state = fake

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        # The short interval is the longest that shutdown() takes.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Of the last question."""
        messages: list[dict[str, Any]] = self.asked[-1]["messages"]
        return messages

    def texts(self) -> list[tuple[str, str]]:
        """Role and text of the last question's messages; each picture is a `[picture]`."""
        return [(message["role"], _text(message["content"])) for message in self.messages]


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "[picture]") for part in content)


class _Handler(BaseHTTPRequestHandler):
    server_state: FakeOpenAI

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        state = self.server_state
        if self.path == "/":
            self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/health" and not state.loading:
            self._send_json(200, {"status": "ok"})
        elif self.path == "/health":
            self._send_error(503, state.loading_message, UNAVAILABLE)
        elif self.path == "/v1/models" and self._may_answer():
            model = {"id": "demo", "object": "model", "created": 0, "owned_by": "omnivlm-edge"}
            self._send_json(200, {"object": "list", "data": [model | {"meta": state.meta}]})
        elif self.path != "/v1/models":
            self._send_error(404, "There is nothing here.", "not_found_error")

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may_answer():
            return
        state.asked.append(body)
        if state.failure:
            status, message, type_name, headers = state.failure
            self._send_error(status, message, type_name, headers)
            return
        try:
            self._stream()
        except OSError:
            state.hung_up.set()

    def _may_answer(self) -> bool:
        state = self.server_state
        key = (state.api_key or "").encode().decode("latin-1")  # as Python reads headers
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            self._send_error(401, "Invalid API key.", "authentication_error")
        elif state.loading:
            self._send_error(503, state.loading_message, UNAVAILABLE)
        else:
            return True
        return False

    def _stream(self) -> None:
        state = self.server_state
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in state.answer:
            self._event({"choices": [{"index": 0, "delta": {"content": piece}}]})
            time.sleep(0.01)
        while state.endless:
            self._event({"choices": [{"index": 0, "delta": {"content": state.answer[-1]}}]})
            time.sleep(0.01)
        if state.breaks_with:
            error = {"message": state.breaks_with, "type": "server_error", "param": None}
            self._event({"error": error | {"code": 500}})
            return
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": state.finish_reason}]})
        usage = {"prompt_tokens": 95, "completion_tokens": 14, "total_tokens": 109}
        self._event({"choices": [], "usage": usage, "timings": state.timings})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")

    def _send_error(
        self, status: int, message: str, type_name: str, headers: dict[str, str] | None = None
    ) -> None:
        error = {"message": message, "type": type_name, "param": None, "code": status}
        self._send_json(status, {"error": error}, headers)

    def _send_json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), "application/json", headers)

    def _send(
        self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
