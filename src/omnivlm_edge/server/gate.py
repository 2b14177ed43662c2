"""What every request passes before it is understood: identity, permission, limits, the log."""

from __future__ import annotations

import asyncio
import hmac
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

from .metrics import Metrics
from .protocol import error_object

MAX_BODY = 32 * 2**20  # bytes: a picture of 20 MiB in base64, and the rest
BODY_SECONDS = 30
#: What anybody may see, with an API key too.
OPEN_PATHS = re.compile(r"/|/health|/docs|/openapi\.json|/static-offline-docs/.*")
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}")

_log = logging.getLogger(__name__)
access_log = logging.getLogger("omnivlm_edge.access")


@dataclass(frozen=True)
class GateRules:
    """Who may ask and how much at a time.

    `hosts` are the names that the Host header may have, none for any: a page of another name that
    leads to this machine (DNS rebinding) is refused.
    """

    api_key: str | None = None
    hosts: Sequence[str] = ()
    max_requests: int = 64


@dataclass
class RequestLog:
    """What the handlers add to the access log; never anything that the client wrote."""

    fields: dict[str, Any] = field(default_factory=dict)


class Gate:
    """ASGI middleware; a POST reaches the application with its whole body, or not at all.

    What is refused is answered before its body is read; uvicorn then reads the rest and drops it,
    so that a client which sends first and listens later sees the answer, too.
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
            self._metrics.count_request(route, status)
            access_log.info(
                json.dumps(
                    {
                        "time": round(time.time(), 3),
                        "request_id": request_id,
                        "client": (scope.get("client") or ("",))[0],
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": status,  # 0: the client went before there was any
                        "ms": round(1000 * (time.perf_counter() - started), 1),
                        **log.fields,
                    }
                )
            )

    async def _check(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what is refused; hands the rest on."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] or host
        if self._rules.hosts and name not in self._rules.hosts and host not in self._rules.hosts:
            refusal = _refusal(
                403, "permission_error", "the Host header does not name this machine"
            )
        elif not self._permitted(scope["path"], headers):
            refusal = _refusal(401, "authentication_error", "the API key is missing or wrong")
            refusal.headers["www-authenticate"] = "Bearer"
        elif scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        elif not _is_json(headers):
            # A page of another origin could send any other kind without being asked first (CORS).
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
        await refusal(scope, receive, send)

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
            await _refusal(408, "invalid_request_error", message)(scope, receive, send)
            return
        if body is None:
            return  # the client went: there is nobody to answer
        if len(body) > MAX_BODY:
            await _TOO_LARGE(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)


def _is_json(headers: Headers) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


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
