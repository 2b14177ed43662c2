"""One server in this process: its port, its model, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..engine import OmniVLM
from ..errors import DeviceError
from ..scheduler import Scheduler
from ..values import GenerateOptions
from .app import Settings, create_app, describe_model
from .gate import access_log
from .protocol import ModelMeta

_log = logging.getLogger(__name__)

_WARM_UP_TOKENS = 4
_BACKLOG = 128  # connections that may wait for the process
_REQUEST_SECONDS = 20  # until a new connection must have sent a request's head
_CLOSING_SECONDS = 10  # for the end of answers after the time that they may take


def serve(
    load: Callable[[], OmniVLM],
    settings: Settings,
    *,
    host: str,
    port: int,
    n_queue: int,
    sleep_after: float | None,
    preload: bool,
    announce: Callable[[str], None],
) -> None:
    """Serves until SIGINT or SIGTERM, then finishes the running answers.

    The port opens at once, or with `preload` when the model is there; `load` makes the model.
    Raises what `load` raises, and DeviceError when the port cannot be had.
    """
    facts: ModelMeta | None = None

    def load_warm() -> OmniVLM:
        nonlocal facts
        started = time.monotonic()
        model = load()
        if facts is None:  # not again for a request that waits while the model wakes
            _warm_up(model)
        facts = describe_model(model)
        _log.info("the model is loaded (%.1f s)", time.monotonic() - started)
        return model

    with _bind(host, port) as listener:
        if not preload:
            _listen(listener)
        _log_to_stderr()
        scheduler = Scheduler(
            load_warm, n_parallel=settings.n_parallel, n_queue=n_queue, sleep_after=sleep_after
        )
        try:
            if preload:
                scheduler.wait_until_loaded()
                _listen(listener)
            app = create_app(scheduler, lambda: facts, settings)
            config = uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                # Until then a client that does not read its answer is waited for.
                timeout_graceful_shutdown=math.ceil(settings.seconds) + _CLOSING_SECONDS,
            )
            server = _Server(config, scheduler)
            name = f"[{host}]" if ":" in host else host
            announce(f"http://{name}:{listener.getsockname()[1]}")
            server.run(sockets=[listener])
            if server.failure is not None:
                raise server.failure
        finally:
            scheduler.close()


class _Protocol(H11Protocol):
    """uvicorn's, which by itself waits for ever for a new connection's first request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(_REQUEST_SECONDS, self._close_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()  # it would keep all of this in memory
        super().connection_lost(exc)

    def _close_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()


class _Server(uvicorn.Server):
    """Ends in order: what runs is finished, what waits is refused; at the second signal at once."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self.failure: Exception | None = None
        self._scheduler = scheduler

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own would send itself the signal again at the end.
        if self.should_exit:
            os._exit(128 + sig)  # in the middle of a step, or of loading; nothing is lost on disk
        self.should_exit = True

    async def main_loop(self) -> None:
        loading = asyncio.create_task(asyncio.to_thread(self._watch_loading))
        await super().main_loop()
        loading.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(asyncio.to_thread(self._scheduler.close))
        n_answers = self._scheduler.n_running
        if n_answers:
            what = "an answer" if n_answers == 1 else f"{n_answers} answers"
            _log.info("finishing %s; Ctrl-C or SIGTERM again to stop at once", what)
        await super().shutdown(sockets)
        await closing

    def _watch_loading(self) -> None:
        try:
            self._scheduler.wait_until_loaded()
        except Exception as error:
            self.failure = error
            self.should_exit = True


@contextlib.contextmanager
def _port_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        advice = "choose another --host or --port"
        if exc.errno == errno.EADDRINUSE:
            advice = "is another server running? choose another with --port"
        raise DeviceError(
            f"port {port} of {host} cannot be had ({exc.strerror}): {advice}"
        ) from exc


def _bind(host: str, port: int) -> socket.socket:
    """A socket that has the port; nobody is let in before `_listen`."""
    with _port_errors(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # The port of a server that has just ended can be had; one that listens keeps its own.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    return listener


def _listen(listener: socket.socket) -> None:
    with _port_errors(*listener.getsockname()[:2]):
        listener.listen(_BACKLOG)


def _warm_up(model: OmniVLM) -> None:
    """The first request shall not pay for pages that were never touched."""
    size = model.image_size
    picture = Image.new("RGB", (size, size), "grey")
    model.answer(picture, "Describe the image", GenerateOptions(max_tokens=_WARM_UP_TOKENS))
    model.forget()


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        if record.name == access_log.name:
            return record.getMessage()
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _log_to_stderr() -> None:
    """Everything as JSON, a line for each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name, level in (("omnivlm_edge", logging.INFO), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False
