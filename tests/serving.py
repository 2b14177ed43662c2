"""`omnivlm-edge serve` as a process of its own, and requests to it byte by byte."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import queue
import re
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from PIL import Image

from command import COMMAND

EXAMPLES = Path(__file__).parents[1] / "examples"
CHAT, ORIGINAL = "/v1/chat/completions", "/v1/omnivlm/chat/completions"


def data_uri(image: Image.Image | Path) -> str:
    if isinstance(image, Path):
        content = image.read_bytes()
    else:
        file = io.BytesIO()
        image.save(file, "PNG")
        content = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(content).decode()


HORSES, SHOPPING = (data_uri(EXAMPLES / name) for name in ("horses.png", "shopping.png"))


def user(text: str, *urls: str) -> dict[str, Any]:
    """A user's message."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def question(text: str, *urls: str, **more: Any) -> dict[str, Any]:
    """A request's body."""
    return {"model": "demo", "messages": [user(text, *urls)], "max_tokens": 24, **more}


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The values of a stream's events, without the last: that it is done."""
        lines = self.body.decode().removesuffix("\n\n").split("\n\n")
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


class Server:
    """Runs from the beginning of a `with` to its end, when it ends with `exit_code`.

    `lines` are what it has written to stderr so far.
    """

    def __init__(
        self, *arguments: object, model: object = "demo", exit_code: int = 0, **env: str
    ) -> None:
        options = ["--port", "0", "--device", "cpu", "--threads", "1", *arguments]
        self.process = subprocess.Popen(
            [*COMMAND, "serve", str(model), *map(str, options)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        self._exit_code = exit_code
        self.lines: list[str] = []
        self.port = 0
        self._address: queue.Queue[int] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.match(r"Listening on http://.*:(\d+) ", line)
            if found:
                self._address.put(int(found[1]))
        self._address.put(0)

    def __enter__(self) -> Server:
        self.port = self._address.get(timeout=60)
        assert self.port, "".join(self.lines)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.wait()
        finally:
            self.process.kill()
        if kind is None:
            assert code == self._exit_code, "".join(self.lines)
            assert "Traceback" not in "".join(self.lines)

    def wait(self) -> int:
        """Until it has ended -> its exit code."""
        code = self.process.wait(timeout=60)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, api_key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        return request(self.port, method, path, body, headers)

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(self, body: Any, path: str = CHAT, **headers: str) -> Reply:
        return self.request("POST", path, body, headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        pattern = rf"^omnivlm_{name}(?:\{{.*\}})? (\S+)$"
        text = self.get("/metrics").body.decode()
        return sum(map(float, re.findall(pattern, text, re.M)))

    def log(self) -> Iterator[dict[str, Any]]:
        """The access log so far."""
        found = (json.loads(line) for line in self.lines if line.startswith("{"))
        return (line for line in found if "request_id" in line)

    def said(self) -> list[str]:
        """The other lines of its log, all of them JSON; not those from before it."""
        found = (json.loads(line) for line in self.lines if line.startswith("{"))
        return [line["message"] for line in found if "message" in line]


def request(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """As `Server.request`, for any server."""
    sent: dict[str, str] = {}
    if body is not None:
        sent["Content-Type"] = "application/json"
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
    sent |= {name.replace("_", "-"): value for name, value in (headers or {}).items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, found, response.read())
    finally:
        connection.close()


def raw_post(body: bytes, length: int | None = None, path: str = CHAT) -> bytes:
    """A POST as bytes, which may announce another length than its body has."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body
