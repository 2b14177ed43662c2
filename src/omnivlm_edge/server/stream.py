"""Answers on their way from the scheduler's thread to a client that may go at any time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import OmniVLMError
from ..scheduler import Job, Listener, Scheduler, Update
from ..values import Answer
from .protocol import CLIENT_GONE

#: A client that takes no piece of its answer for so long counts as gone.
SEND_SECONDS = 30

Choice: TypeAlias = "tuple[int, Update]"


class ClientGoneError(Exception):
    """The client closed its connection."""


class Answers:
    """The updates of some jobs for one client, by the number of the choice.

    `close` it, whatever happens: that ends what is not finished.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[Choice | None] = asyncio.Queue()
        self._jobs: Sequence[Job] = ()
        self._watcher: asyncio.Task[None] | None = None

    def listener(self, choice: int) -> Listener:
        """For the job of that choice."""

        def tell(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is there
                self._loop.call_soon_threadsafe(self._updates.put_nowait, (choice, update))

        return tell

    def submit(self, scheduler: Scheduler, jobs: Sequence[Job]) -> None:
        """Raises QueueFullError, ClosedError."""
        scheduler.submit(jobs)
        self._jobs = jobs
        self._watcher = self._loop.create_task(self._watch())

    async def accepted(self) -> None:
        """Waits until all prompts are accepted. Raises what is wrong with one."""
        for _ in self._jobs:
            _, update = await self._next()
            if isinstance(update, OmniVLMError):
                raise update

    async def follow(self) -> AsyncIterator[Choice]:
        """The updates until all are finished; an error, of any of them, is raised."""
        left = len(self._jobs)
        while left:
            choice, update = await self._next()
            if isinstance(update, OmniVLMError):
                raise update
            left -= isinstance(update, Answer)
            yield choice, update

    def close(self) -> None:
        """Nobody listens any more. May be called again."""
        for job in self._jobs:
            job.cancel()
        if self._watcher is not None:
            self._watcher.cancel()

    async def _next(self) -> Choice:
        found = await self._updates.get()
        if found is None:
            raise ClientGoneError
        return found

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._updates.put_nowait(None)


class EventStream(Response):
    """A response of server-sent events; `lines` are complete ones.

    A client that goes ends it, and closes `answers`.
    """

    def __init__(self, answers: Answers, lines: AsyncGenerator[str, None]) -> None:
        super().__init__(media_type="text/event-stream")
        self._answers = answers
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # proxies shall hand it on at once
        ]
        try:
            async with contextlib.aclosing(self._lines) as lines:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async for line in lines:
                    body = f"{line}\n\n".encode()
                    message = {"type": "http.response.body", "body": body, "more_body": True}
                    await asyncio.wait_for(send(message), SEND_SECONDS)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (ClientGoneError, asyncio.TimeoutError):
            scope["state"]["log"].status = CLIENT_GONE  # 200 was sent
        finally:
            self._answers.close()


def data(value: dict[str, Any]) -> str:
    """One event."""
    return "data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":"))
