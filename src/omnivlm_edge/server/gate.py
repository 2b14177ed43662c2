"""What every request passes before it is understood: identity, permission, limits, the log."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..image import shorten
from .metrics import Metrics
from .protocol import CLIENT_GONE, error_object

MAX_BODY = 32 * 2**20  # bytes: a picture of 20 MiB in base64, and the rest
BODY_SECONDS = 30
_DROPPED, _DROP_SECONDS = 64 * 2**20, 2  # of a body that is refused: bytes, and time for them
_UNNAMED_JSON = ("", "text/plain", "application/x-www-form-urlencoded")
# Headers with which a browser says what page a request comes from.
_OF_BROWSERS = ("origin", "referer", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest")
#: What anybody may see, with an API key too.
OPEN_PATHS = re.compile(r"/|/health|/docs|/openapi\.json|/static-offline-docs/.*")
_LOCAL_NAMES = ("localhost", "ip6-localhost", "ip6-loopback")
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}")

_log = logging.getLogger(__name__)
access_log = logging.getLogger("omnivlm_edge.access")


@dataclass(frozen=True)
class GateRules:
    """Who may ask and how much at a time.

    `hosts` are the names that the Host header may have beside those of every machine for itself,
    None for any: a page of another name that leads to this machine (DNS rebinding) is refused.
    """

    api_key: str | None = None
    hosts: Sequence[str] | None = None
    max_requests: int = 64


@dataclass
class RequestLog:
    """What the handlers add to the access log; never anything that the client wrote.

    `status` is there where another one was sent than what became of the request.
    """

    status: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)


class Gate:
    """ASGI middleware; a POST reaches the application with its whole body, or not at all.

    What is refused is answered before its body is read, and the rest of it is dropped, so that a
    client which sends first and listens later sees the answer, too.
    """

    def __init__(self, app: ASGIApp, rules: GateRules, metrics: Metrics) -> None:
        self._app = app
        self._rules = rules
        self._metrics = metrics
        self._posts = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        method = scope["method"]
        if method == "HEAD":  # uvicorn sends no body
            scope = {**scope, "method": "GET"}
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        log = RequestLog()
        scope.setdefault("state", {})["log"] = log
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self._check(scope, receive, send_marked)
        except Exception:  # a mistake of ours
            _log.exception("request %s failed", request_id)
            if not status:
                await _FAILED(scope, receive, send_marked)
        finally:
            # The route's, so that strangers cannot make any number of them.
            route = getattr(scope.get("route"), "path", "other")
            status = log.status or status or CLIENT_GONE
            self._metrics.count_request(route, status)
            access_log.info(
                json.dumps(
                    {
                        "time": round(time.time(), 3),
                        "request_id": request_id,
                        "client": (scope.get("client") or ("",))[0],
                        "method": method,
                        "path": scope["path"],
                        "status": status,
                        "ms": round(1000 * (time.perf_counter() - started), 1),
                        **log.fields,
                    }
                )
            )

    async def _check(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what is refused; hands the rest on."""
        headers = Headers(scope=scope)
        host = headers.get("host")  # every browser names one
        if host is not None and not self._names_us(host.lower()):
            message = (
                f"the Host header names '{shorten(host)}', which is not known as this machine: "
                "start the server with --allowed-host for it"
            )
            refusal = _refusal(403, "permission_error", message)
        elif not self._permitted(scope["path"], headers):
            refusal = _refusal(401, "authentication_error", "the API key is missing or wrong")
            refusal.headers["www-authenticate"] = "Bearer"
        elif scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        elif not _may_be_json(headers):
            message = "the body must be JSON, with Content-Type: application/json"
            refusal = _refusal(415, "invalid_request_error", message)
        elif int(headers.get("content-length", "0")) > MAX_BODY:
            refusal = _TOO_LARGE
        elif self._posts >= self._rules.max_requests:
            message = "as many requests as allowed are being answered: try again later"
            refusal = _refusal(503, "unavailable_error", message)
            refusal.headers["retry-after"] = "1"
        else:
            self._posts += 1
            try:
                await self._post(scope, receive, send)
            finally:
                self._posts -= 1
            return
        await _refuse(refusal, scope, receive, send)

    def _names_us(self, host: str) -> bool:
        if self._rules.hosts is None:
            return True
        name = re.sub(r":\d*$", "", host).removesuffix(".")
        return is_local(name) or name in self._rules.hosts

    def _permitted(self, path: str, headers: Headers) -> bool:
        if self._rules.api_key is None or OPEN_PATHS.fullmatch(path):
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # ASGI's headers are Latin-1 to Python, whatever their bytes were meant to be.
        given = key.strip().encode("latin-1")
        matches = hmac.compare_digest(given, self._rules.api_key.encode())
        return scheme.lower() == "bearer" and matches

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(_read_body(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            message = f"the body was not sent within {BODY_SECONDS} s"
            refusal = _refusal(408, "invalid_request_error", message)
            await refusal(scope, receive, send)
            return
        if body is None:
            return  # the client went: there is nobody to answer
        if len(body) > MAX_BODY:
            await _refuse(_TOO_LARGE, scope, receive, send)
            return
        MutableHeaders(scope=scope)["content-type"] = "application/json"
        await self._app(scope, _replay(body, receive), send)


def is_local(name: str) -> bool:
    """Whether a name or an address always leads to the machine itself."""
    name = name.lower().removesuffix(".")
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(name.strip("[]"))
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return name in _LOCAL_NAMES or name.endswith(".localhost")


def _may_be_json(headers: Headers) -> bool:
    """Whether a body says that it is JSON; or says nothing, and no browser sent it.

    A page of another origin may send the kinds of forms, and text, without being asked first. The
    browser then says where they come from.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in _UNNAMED_JSON:
        return not any(name in headers for name in _OF_BROWSERS)
    return kind == "application/json"


async def _refuse(refusal: JSONResponse, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers. When the connection is closed then, what still comes in would make it a reset."""
    headers = Headers(scope=scope)
    closes = scope.get("http_version") == "1.0" or "close" in headers.get("connection", "").lower()
    if closes and "expect" not in headers:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drop_body(receive), _DROP_SECONDS)
    await refusal(scope, receive, send)


async def _drop_body(receive: Receive) -> None:
    size = 0
    while size < _DROPPED:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, or the beginning of one that is too large; None from a client that goes."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size += len(chunk)
        chunks.append(chunk)
        if size > MAX_BODY or not message.get("more_body", False):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """First the body, then what the client does next: it can only go."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def _refusal(status: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse(error_object(message, kind, status), status)


_TOO_LARGE = _refusal(
    413,
    "invalid_request_error",
    f"the body is larger than {MAX_BODY >> 20} MiB: shrink the picture",
)
_FAILED = _refusal(500, "server_error", "the server failed; its log says why")
