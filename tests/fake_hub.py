"""A small Hugging Face hub on the loopback address, which can misbehave on demand.

It speaks the part of the protocol that downloads need: the listing of a repository, `resolve` with
its headers and its redirect to a store of contents on another host, and ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import gguf

DEMO = Path(__file__).parents[1] / "src" / "omnivlm_edge" / "demo"
REPO = "NexaAI/OmniVLM-968M"

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

# A process that makes what is not published; `{vision}` is True or False.
MAKE = """
from fake_hub import fake_quantize
from omnivlm_edge.hub import parse_reference, pull
wanted = parse_reference("omnivision:q4_k_m")
files = pull(wanted, consent=lambda question: True, make_vision={vision}, quantize=fake_quantize)
print(files.text, files.mmproj, sep="\\n")
"""


def python(env: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    """A process that uses the package as a library."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


def pulled(result: subprocess.CompletedProcess[str]) -> list[Path]:
    """The two files that a process printed."""
    assert result.returncode == 0, result.stderr
    return [Path(line) for line in result.stdout.splitlines()]


def with_file_type(content: bytes, quantization: str) -> bytes:
    """A GGUF file that says it is of another quantization; all else stays."""
    key = b"general.file_type" + struct.pack("<I", gguf.GGUFValueType.UINT32)
    start = content.index(key) + len(key)
    number = next(value for value in gguf.LlamaFileType if value.name.endswith(quantization))
    return content[:start] + struct.pack("<I", number) + content[start + 4 :]


def fake_quantize(source: Path, output: Path, type_name: str, *, progress: Any) -> Path:
    progress(1, 1)
    output.write_bytes(with_file_type(source.read_bytes(), type_name))
    return output


def published_files() -> dict[str, bytes]:
    """The listing of NexaAI/OmniVLM-968M with the demo model's files as its content."""
    text = (DEMO / "demo-F16.gguf").read_bytes()
    vision = (DEMO / "mmproj-demo-F16.gguf").read_bytes()
    return {
        "README.md": b"# OmniVLM",
        "Nano-Vlm-Processor-494M-F16.gguf": text + b"old",
        "Nano-Vlm-Processor-494M-Q8_0.gguf": with_file_type(text, "Q8_0") + b"old",
        "mmproj-omni-vlm-f16.gguf": vision + b"old",
        "omnivision-text-optimized-llm-Q8_0.gguf": with_file_type(text, "Q8_0"),
        "omnivision-text-optimized-llm-f16.gguf": text,
        "omnivision-text-optimized-mmproj-f16.gguf": vision,
    }


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


@dataclass
class FakeHub:
    """`status` and `headers` answer every request for a listing; the rest is for contents.

    `cut` ends the connection after so many bytes, once; `stall` sends so many and no more, until
    released; `damaged` changes the last byte of everything.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=lambda: {REPO: published_files()})
    small: set[str] = field(default_factory=set)  # names of the files that are not in LFS
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    cut: int | None = None
    stall: int | None = None
    damaged: bool = False
    git_sha1: Callable[[bytes], str] = lambda data: git_sha1(data)
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub = self  # type: ignore[attr-defined]
        self.server.daemon_threads = True
        self.released = threading.Event()
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def commit(self, repo: str) -> str:
        names = sorted((name, sha256(data)) for name, data in self.repos[repo].items())
        return hashlib.sha1(repr(names).encode()).hexdigest()

    def downloads(self) -> list[Request]:
        """The requests for contents, without those that read a file's header."""
        return [
            request
            for request in self.requests
            if request.method == "GET"
            and request.path.startswith("/cdn/")
            and not (request.range or "").startswith("bytes=0-")
        ]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, path, headers))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self.listing(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            (content,) = {
                data
                for files in self.hub.repos.values()
                for data in files.values()
                if sha256(data) == match[1]
            }
            self.content(content)
        else:
            self.answer(404)

    def listing(self, repo: str) -> None:
        hub = self.hub
        if hub.status != 200:
            self.answer(hub.status, headers=hub.headers)
        elif repo not in hub.repos:
            self.answer(401, headers={"X-Error-Code": "RepoNotFound"})
        else:
            siblings = []
            for name, data in hub.repos[repo].items():
                entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
                entry["blobId"] = hub.git_sha1(data)
                if name not in hub.small:
                    entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
                siblings.append(entry)
            body = {"id": repo, "sha": hub.commit(repo), "siblings": siblings}
            self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        hub = self.hub
        commit = hub.commit(repo)
        if hub.gated:
            self.answer(403, headers={"X-Error-Code": "GatedRepo"})
            return
        if revision not in ("main", commit) or name not in hub.repos[repo]:
            self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
            return
        data = hub.repos[repo][name]
        headers = {"X-Repo-Commit": commit}
        if name in hub.small:
            self.content(data, {**headers, "ETag": f'"{git_sha1(data)}"'})
            return
        headers |= {
            "X-Linked-Etag": f'"{sha256(data)}"',
            "X-Linked-Size": str(len(data)),
            "ETag": '"of the redirect"',
            # Another host, as far as a client can tell.
            "Location": f"http://localhost:{self.server.server_port}/cdn/{sha256(data)}",  # type: ignore[attr-defined]
        }
        self.answer(302, headers=headers)

    def content(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        hub, status, headers = self.hub, 200, dict(headers or {})
        if hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        is_header = self.headers.get("Range", "").startswith("bytes=0-")
        if self.command == "GET" and hub.cut is not None and not is_header:
            part, hub.cut = data[: hub.cut], None
            self.answer(status, part, {**headers, "Content-Length": str(len(data))})
            self.close_connection = True
        elif self.command == "GET" and hub.stall is not None and not is_header:
            part, hub.stall = data[: hub.stall], None
            self.answer(status, part, {**headers, "Content-Length": str(len(data))})
            hub.released.wait()
            self.close_connection = True
        else:
            self.answer(status, data, headers)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
