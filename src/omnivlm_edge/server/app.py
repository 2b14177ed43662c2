"""HTTP -> scheduler -> HTTP: the routes, and how a request becomes jobs."""

from __future__ import annotations

import functools
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from ..engine import OmniVLM
from ..errors import (
    ClosedError,
    ContextOverflowError,
    DeadlineError,
    OmniVLMError,
    OptionError,
)
from ..generation import Generation
from ..image import Pixels
from ..openai_messages import read_conversation
from ..scheduler import MISSING, Delta, Job, Scheduler
from ..values import Answer, Turn
from .forms import read_form
from .gate import Gate, GateRules, RequestLog
from .metrics import Metrics
from .pictures import PictureRules, decode, name_of, read_bytes
from .protocol import (
    CLIENT_GONE,
    LOADING,
    ChatRequest,
    ErrorResponse,
    Health,
    ModelEntry,
    ModelList,
    ModelMeta,
    OriginalRequest,
    describe_error,
    error_object,
    logprobs,
    timings,
    usage,
)
from .stream import Answers, ClientGoneError, EventStream, data

_log = logging.getLogger(__name__)

# Pictures that are decoded at the same time: each may take 192 MB, and more threads than cores.
_DECODERS = 2
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Settings:
    """What a server may do; see `omnivlm-edge serve --help`."""

    name: str
    n_parallel: int
    seconds: float  # that an answer may take
    gate: GateRules = field(default_factory=GateRules)
    pictures: PictureRules = field(default_factory=PictureRules)
    origins: Sequence[str] = ()  # of pages elsewhere that may ask
    log_content: bool = False


def describe_model(model: OmniVLM) -> ModelMeta:
    """What clients are told of a model."""
    return ModelMeta(
        image_size=model.image_size,
        image_tokens=model.image_tokens,
        n_ctx=model.n_ctx,
        takes_questions=model.takes_questions,
        single_turn=model.single_turn,
    )


def create_app(
    scheduler: Scheduler, facts: Callable[[], ModelMeta | None], settings: Settings
) -> FastAPI:
    """The application. `facts` are those of `describe_model`, None until there is a model."""
    app: FastAPI = FastAPIOffline(
        redoc_url=None,
        title="omnivlm-edge",
        version=version("omnivlm-edge"),
        description="Questions about pictures, answered on this machine.",
    )
    # The gate checks the key; this tells the documentation's readers, and its button, of it.
    bearer = HTTPBearer(auto_error=False, description="The key of --api-key.")
    with_key = [Security(bearer)] if settings.gate.api_key is not None else []
    metrics = Metrics(
        lambda: scheduler.n_running, lambda: scheduler.n_waiting, lambda: scheduler.sleeping
    )
    service = _Service(scheduler, facts, settings, metrics)
    created = int(time.time())

    @app.exception_handler(OmniVLMError)
    async def package_error(request: Request, error: OmniVLMError) -> Response:
        status, body, headers = describe_error(error)
        _note_error(request, error)
        return JSONResponse(body, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        message, where = _describe_invalid(error)
        return JSONResponse(error_object(message, "invalid_request_error", 400, where), 400)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        # 400: FastAPI's word for a body that is not UTF-8, or nested too deeply.
        message = _NOT_JSON if error.status_code == 400 else str(error.detail)
        body = error_object(message, kind, error.status_code)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(ClientGoneError)
    async def nobody_there(_: Request, __: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(_page(), headers={"content-security-policy": _PAGE_POLICY})

    @app.get("/health", responses=_errors(503), summary="Whether the model is there")
    async def health() -> Health:
        service.check()
        return Health()

    @app.get(
        "/metrics",
        responses={**_errors(401), 200: {"content": {"text/plain": {}}}},
        dependencies=with_key,
        summary="Prometheus' text format",
        response_class=Response,
    )
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def entry() -> ModelEntry:
        return ModelEntry(id=settings.name, created=created, meta=service.meta())

    @app.get(
        "/v1/models",
        responses=_errors(401, 503),
        dependencies=with_key,
        summary="The one model that is served",
    )
    async def models() -> ModelList:
        return ModelList(data=[entry()])

    @app.get(
        "/v1/models/{name:path}",
        responses=_errors(401, 404, 503),
        dependencies=with_key,
        summary="A model",
    )
    async def model(name: str) -> ModelEntry:
        if name != settings.name:
            raise HTTPException(404, f"there is no model {name!r} here: it is {settings.name!r}")
        return entry()

    chat_errors = _errors(400, 401, 408, 413, 415, 500, 503, 504)

    @app.post(
        "/v1/chat/completions",
        responses={**chat_errors, 200: {"content": _CHAT_CONTENT}},
        dependencies=with_key,
        summary="An answer, whole or as it comes",
    )
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await service.chat(request, body)

    @app.post(
        "/v1/omnivlm/chat/completions",
        responses={**chat_errors, 200: {"content": _CHAT_CONTENT}},
        dependencies=with_key,
        summary="The same for clients of the original runtime",
    )
    async def original(request: Request, body: OriginalRequest) -> Response:
        return await service.original(request, body)

    app.add_middleware(Gate, rules=settings.gate, metrics=metrics)
    if settings.origins:  # around the gate: a page shall see its refusals, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for JavaScript sends some of its own
            expose_headers=["retry-after", "x-request-id"],
        )
    return app


_NOT_JSON = "the body is not JSON"
_CHAT_CONTENT: dict[str, Any] = {
    "application/json": {"schema": {"type": "object"}},
    "text/event-stream": {"schema": {"type": "string"}},
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the documentation; `default` for those of every route."""
    errors: dict[int | str, dict[str, Any]] = {s: {"model": ErrorResponse} for s in statuses}
    return {**errors, "default": {"model": ErrorResponse, "description": "Another error"}}


def _describe_invalid(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, in a sentence, and with which field."""
    # Of a value that may be of several types the error that was found the furthest inside counts.
    worst = max(error.errors(), key=lambda found: len(found["loc"]))
    if worst["type"] == "json_invalid":
        return _NOT_JSON, None
    fields = [str(part) for part in worst["loc"][1:]]
    where = ".".join(part for part in fields if part not in ("str", "text") and "[" not in part)
    return f"{where or 'the body'}: {worst['msg']}", where or None


def _note_error(request: Request, error: OmniVLMError) -> None:
    """For the access log: the kind of error; and what it says when it is the server's own."""
    status, body, _ = describe_error(error)
    _log_of(request)["error"] = body["error"]["type"]
    if status == 500:
        _log.error("%s", error)


@functools.cache
def _page() -> str:
    return files(__package__).joinpath("page.html").read_text()


class _Service:
    """What the routes do."""

    def __init__(
        self,
        scheduler: Scheduler,
        facts: Callable[[], ModelMeta | None],
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._scheduler = scheduler
        self._facts = facts
        self._settings = settings
        self._metrics = metrics
        self._decoders = anyio.Semaphore(_DECODERS)

    def meta(self) -> ModelMeta:
        """Raises ClosedError, a 503, while the model is loaded for the first time."""
        facts = self._facts()
        if facts is None:
            raise ClosedError(LOADING)
        return facts

    def check(self) -> None:
        """Raises ClosedError while there is no model, or it cannot be loaded again."""
        self.meta()
        if self._scheduler.missing:
            raise ClosedError(MISSING)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """OpenAI's endpoint."""
        answers, jobs = await self._start(request, body)
        about = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self._settings.name,
        }
        if body.stream:
            return EventStream(answers, self._chunks(request, body, answers, jobs, about))
        found = await self._collect(request, answers, jobs)
        return JSONResponse(
            {
                **about,
                "object": "chat.completion",
                "choices": [
                    {
                        "index": index,
                        "message": {"role": "assistant", "content": answer.text},
                        "logprobs": logprobs(answer.logprobs) if body.logprobs else None,
                        "finish_reason": answer.finish_reason,
                    }
                    for index, answer in enumerate(found)
                ],
                "usage": usage(found),
                "timings": timings(found[0], jobs[0].queue_seconds),
            }
        )

    async def original(self, request: Request, body: OriginalRequest) -> Response:
        """The original runtime's endpoint, with answers of its shapes."""
        answers, jobs = await self._start(request, body.as_chat())
        about = {"id": str(uuid.uuid4()), "created": time.time()}
        if body.stream:
            return EventStream(answers, self._original_chunks(request, answers, jobs, about))
        (answer,) = await self._collect(request, answers, jobs)
        message = {"role": "assistant", "content": answer.text}
        choice = {"message": message, "index": 0, "finish_reason": answer.finish_reason}
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice]})

    async def _start(self, request: Request, body: ChatRequest) -> tuple[Answers, list[Job]]:
        """The jobs of a request, accepted. Raises what is wrong with it."""
        meta = self.meta()
        n = body.n or 1
        if n > self._settings.n_parallel:
            raise OptionError(f"n is {n}: it must be at most {self._settings.n_parallel}")
        deadline = time.monotonic() + self._settings.seconds
        grammar = await anyio.to_thread.run_sync(read_form, body.response_format)
        options = [body.options(choice, grammar) for choice in range(n)]
        system, turns = self._conversation(body, meta)
        turns = await self._with_pictures(turns, meta, deadline)
        if self._settings.log_content:
            _log_of(request)["question"] = turns[-1].question
        answers = Answers(request)

        def make(choice: int, model: OmniVLM) -> Generation:
            return model.prepare(turns, options[choice], system, cut=True)

        jobs = [
            Job(functools.partial(make, choice), answers.listener(choice), deadline)
            for choice in range(n)
        ]
        answers.submit(self._scheduler, jobs)
        try:
            await answers.accepted()
        except BaseException:
            answers.close()
            raise
        return answers, jobs

    def _conversation(self, body: ChatRequest, meta: ModelMeta) -> tuple[str | None, list[Turn]]:
        """The system text, and turns with the addresses of their pictures."""
        system, turns = read_conversation([message.model_dump() for message in body.messages])
        if meta.takes_questions and not turns[-1].question.strip():
            raise OptionError("the user's last message has no text: ask a question")
        if meta.single_turn or not meta.takes_questions:  # the last question, the latest pictures
            images = next((turn.images for turn in reversed(turns) if turn.images), ())
            turns = [replace(turns[-1], images=images)]
        return system, turns

    async def _with_pictures(
        self, turns: Sequence[Turn], meta: ModelMeta, deadline: float
    ) -> list[Turn]:
        """The turns with their pictures instead of the addresses. Raises ImageError."""
        n_pictures = sum(len(turn.images) for turn in turns)
        if n_pictures * meta.image_tokens > meta.n_ctx:  # no work for what cannot be answered
            raise ContextOverflowError(
                f"{n_pictures} pictures do not fit into the context of {meta.n_ctx} positions"
            )
        read: list[Turn] = []
        number = 0
        for turn in turns:
            images = []
            for address in turn.images:
                if time.monotonic() > deadline:
                    raise DeadlineError("the pictures were not read in the time that there was")
                number += 1
                images.append(await self._read(address, name_of(address, number), meta))
            read.append(replace(turn, images=tuple(images)))
        return read

    async def _read(self, address: str, name: str, meta: ModelMeta) -> Pixels:
        """A picture as the model sees it; made here, so that the model's thread need not."""
        rules = self._settings.pictures
        content = await anyio.to_thread.run_sync(read_bytes, address, rules, name)
        async with self._decoders:
            return await anyio.to_thread.run_sync(decode, content, name, meta.image_size)

    async def _collect(
        self, request: Request, answers: Answers, jobs: Sequence[Job]
    ) -> list[Answer]:
        """The whole answers, in the order of the choices."""
        found: dict[int, Answer] = {}
        try:
            async for choice, update in answers.follow():
                if isinstance(update, Answer):
                    found[choice] = update
        finally:
            answers.close()
        self._count(request, found, jobs)
        return [found[choice] for choice in range(len(jobs))]

    async def _chunks(
        self,
        request: Request,
        body: ChatRequest,
        answers: Answers,
        jobs: Sequence[Job],
        about: dict[str, Any],
    ) -> AsyncGenerator[str, None]:
        """OpenAI's chunks, as lines."""
        about = {**about, "object": "chat.completion.chunk"}
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        if with_usage:
            about["usage"] = None

        def chunk(choice: int, delta: dict[str, str], **more: Any) -> str:
            told = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}
            return data({**about, "choices": [{**told, **more}]})

        found: dict[int, Answer] = {}
        for choice in range(len(jobs)):
            yield chunk(choice, {"role": "assistant", "content": ""})
        try:
            async for choice, update in answers.follow():
                if isinstance(update, Delta):
                    more = {"logprobs": logprobs(update.logprobs)} if body.logprobs else {}
                    yield chunk(choice, {"content": update.text}, **more)
                elif isinstance(update, Answer):
                    found[choice] = update
                    yield chunk(choice, {}, finish_reason=update.finish_reason)
        except OmniVLMError as error:
            _note_error(request, error)
            yield data(describe_error(error)[1])
            return
        finally:
            self._count(request, found, jobs)
        if with_usage:
            numbers = {
                "usage": usage([found[choice] for choice in range(len(jobs))]),
                "timings": timings(found[0], jobs[0].queue_seconds),
            }
            yield data({**about, "choices": [], **numbers})
        yield "data: [DONE]"

    async def _original_chunks(
        self, request: Request, answers: Answers, jobs: Sequence[Job], about: dict[str, Any]
    ) -> AsyncGenerator[str, None]:
        """The original runtime's chunks, as lines."""
        about = {**about, "object": "chat.completion.chunk"}
        found: dict[int, Answer] = {}
        try:
            async for choice, update in answers.follow():
                if isinstance(update, Delta):
                    delta = {"content": update.text}
                    told = {"delta": delta, "index": choice, "finish_reason": None}
                    yield data({**about, "choices": [told]})
                elif isinstance(update, Answer):
                    found[choice] = update
        except OmniVLMError as error:
            _note_error(request, error)
            yield data(describe_error(error)[1])
            return
        finally:
            self._count(request, found, jobs)
        times = timings(found[0], jobs[0].queue_seconds)
        speed = {
            "ttft": round(times["ttft_ms"] / 1000, 2),
            "decoding_speed": round(times["predicted_per_second"], 2),
        }
        yield f"metrics: {json.dumps(speed)}"
        yield "data: [DONE]"

    def _count(self, request: Request, found: dict[int, Answer], jobs: Sequence[Job]) -> None:
        """The finished answers go into the metrics and the access log."""
        for choice, answer in found.items():
            self._metrics.count_answer(answer, jobs[choice].queue_seconds)
        if found:
            first = min(found)
            times = timings(found[first], jobs[first].queue_seconds)
            _log_of(request).update(
                prompt_tokens=found[first].prompt_tokens,
                completion_tokens=sum(answer.completion_tokens for answer in found.values()),
                queue_ms=times["queue_ms"],
                ttft_ms=times["ttft_ms"],
            )
        if self._settings.log_content:
            _log_of(request)["answers"] = [answer.text for answer in found.values()]


def _log_of(request: Request) -> dict[str, Any]:
    log: RequestLog = request.state.log
    return log.fields
