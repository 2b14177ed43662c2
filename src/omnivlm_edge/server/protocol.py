"""The shapes of requests and answers, as OpenAI's clients know them.

https://platform.openai.com/docs/api-reference/chat; `timings` and the sampling fields that OpenAI
has not are named as llama.cpp's server names them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from ..errors import (
    BusyError,
    ClosedError,
    ContextOverflowError,
    DeadlineError,
    ImageError,
    ModelFileError,
    OmniVLMError,
    OptionError,
)
from ..values import (
    MAX_BIAS,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOPS,
    Answer,
    GenerateOptions,
    TokenLogprob,
)

DEFAULTS = GenerateOptions()
LOADING = "Loading model"  # llama-server's words; the page waits while it reads them
CLIENT_GONE = 499  # nginx's number for a client that hangs up, in the log


class _Request(BaseModel):
    """Unknown fields are ignored, values of a wrong type are not converted."""

    model_config = ConfigDict(strict=True)


class TextPart(_Request):
    type: Literal["text"]
    text: str


class ImageUrl(_Request):
    url: str = Field(description="A data: URI, or what the server was allowed to read.")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Has no meaning here.")


class ImagePart(_Request):
    type: Literal["image_url"]
    image_url: ImageUrl | str


Part: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = Field(None, description="An assistant's may be null.")


class StreamOptions(_Request):
    include_usage: bool | None = False


class JsonSchema(_Request):
    name: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


_MAX_BIASES = 1024
_ALL_THAT_FIT = 2**31 - 1
_SAMPLING = (
    "temperature top_p top_k min_p repeat_penalty frequency_penalty presence_penalty".split()
)
Bias: TypeAlias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
MaxTokens: TypeAlias = Annotated[int, Field(ge=-1)]
Stops: TypeAlias = Annotated[list[str], Field(max_length=MAX_STOPS)]


class ChatRequest(_Request):
    """A chat completion that is asked for."""

    messages: list[Message] = Field(min_length=1)
    model: str = Field("", description="Any: there is one model here.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens | None = Field(
        None, description="512 when left out; -1, and any more than fit, are as many as fit."
    )
    max_completion_tokens: MaxTokens | None = Field(None, description="The same.")
    temperature: float | None = Field(None, ge=0, le=2, description="0, greedy, when left out.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, lt=1)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = None
    stop: str | Stops | None = None
    n: int | None = Field(1, ge=1, description="At most as many as the server answers at a time.")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Bias] | None = Field(None, max_length=_MAX_BIASES)
    tools: list[Any] | None = Field(None, description="None: tools cannot be called.")
    functions: list[Any] | None = Field(None, description="None: functions cannot be called.")

    def options(self, choice: int, grammar: str | None) -> GenerateOptions:
        """How one of the `n` choices is sampled. Raises OptionError."""
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise OptionError(f"{name} are not supported by this server: leave them out")
        if self.top_logprobs is not None and not self.logprobs:
            raise OptionError("top_logprobs needs logprobs to be true")
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        wanted: int | None = getattr(self, name)
        if wanted == 0:
            raise OptionError(f"{name} is 0: it must be 1 or more, or -1 for as many as fit")
        stop = self.stop or ()
        return GenerateOptions(
            max_tokens=_ALL_THAT_FIT if wanted == -1 else wanted,
            logit_bias=_biases(self.logit_bias or {}),
            seed=None if self.seed is None else (self.seed + choice) % (MAX_SEED + 1),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            grammar=grammar,
            **given,
        )


def _biases(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Raises OptionError for what is no token's id."""
    for token in given:
        if not re.fullmatch("0|[1-9][0-9]{0,8}", token):
            raise OptionError(f"logit_bias names {token[:20]!r}: it must be a token's id")
    return tuple((int(token), bias) for token, bias in given.items())


# ---- the original runtime's interface -----------------------------------------------------------


class OriginalImage(_Request):
    url: str | None = Field(None, description="As above, or base64 alone.")
    path: str | None = Field(None, description="A file below --media-path.")


class OriginalPart(_Request):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: OriginalImage | None = None


class OriginalMessage(_Request):
    role: Literal["system", "user", "assistant"]
    content: str | list[OriginalPart]


class OriginalRequest(_Request):
    """What clients of the original runtime's server send."""

    messages: list[OriginalMessage] = Field(min_length=1)
    max_tokens: MaxTokens | None = 128
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = False
    stop_words: Stops | None = None

    def as_chat(self) -> ChatRequest:
        """The same request in OpenAI's words. Raises OptionError when there is no picture."""
        messages: list[dict[str, Any]] = []
        n_pictures = 0
        for message in self.messages:
            parts: list[dict[str, Any]] = []
            given = message.content
            for part in [] if isinstance(given, str) else given:
                if part.type == "text":
                    parts.append({"type": "text", "text": part.text or ""})
                elif part.image_url is not None:
                    parts.append({"type": "image_url", "image_url": _address(part.image_url)})
                    n_pictures += 1
            content = given if isinstance(given, str) else parts
            messages.append({"role": message.role, "content": content})
        if not n_pictures:
            raise OptionError("messages: hold no image_url with a url or a path")
        known = self.model_dump(exclude={"messages", "stop_words"})
        return ChatRequest.model_validate({**known, "messages": messages, "stop": self.stop_words})


def _address(image: OriginalImage) -> str:
    if image.path is not None:
        return "file://" + quote(image.path, errors="replace")
    url = image.url or ""
    return url if url[:5].lower() in ("data:", "http:", "https") else f"data:;base64,{url}"


# ---- answers -------------------------------------------------------------------------------------


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorResponse(BaseModel):
    error: ErrorBody


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class ModelMeta(BaseModel):
    """What a client may want to know of the model."""

    image_size: int
    image_tokens: int
    n_ctx: int
    takes_questions: bool
    single_turn: bool


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["omnivlm-edge"] = "omnivlm-edge"
    meta: ModelMeta


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


def usage(answers: list[Answer]) -> dict[str, Any]:
    """OpenAI's `usage` of the choices that answer one prompt."""
    prompt, completion = answers[0].prompt_tokens, sum(a.completion_tokens for a in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": answers[0].cached_tokens,
            "image_tokens": answers[0].image_tokens,
        },
    }


def timings(answer: Answer, queue_seconds: float) -> dict[str, float]:
    """Where the time of an answer went, by llama.cpp's names."""
    times = answer.timings
    n_new = answer.prompt_tokens - answer.cached_tokens
    return {
        "queue_ms": _ms(queue_seconds),
        "preprocess_ms": _ms(times.preprocess),
        "image_encode_ms": _ms(times.encode),
        "cache_n": answer.cached_tokens,
        "prompt_n": n_new,
        "prompt_ms": _ms(times.prefill),
        "prompt_per_second": _rate(n_new, times.prefill),
        "predicted_n": answer.completion_tokens,
        "predicted_ms": _ms(times.decode),
        "predicted_per_second": _rate(answer.completion_tokens, times.decode),
        "ttft_ms": _ms(queue_seconds + times.first_token),
    }


def logprobs(tokens: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """OpenAI's `logprobs` of a choice or of a piece of one."""
    return {
        "content": [
            {
                **_token(token.token, token.logprob),
                "top_logprobs": [_token(data, value) for data, value in token.top],
            }
            for token in tokens
        ]
    }


def _token(data: bytes, logprob: float) -> dict[str, Any]:
    # JSON has no minus infinity.
    text = data.decode(errors="replace")
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 2) if seconds > 0 else 0.0


# ---- errors --------------------------------------------------------------------------------------

_RETRY_SECONDS = 1
#: Errors of this package -> status and OpenAI's or llama.cpp's type; the first that fits.
_STATUS: tuple[tuple[type[OmniVLMError], int, str], ...] = (
    (ContextOverflowError, 400, "exceed_context_size_error"),
    (OptionError, 400, "invalid_request_error"),
    (ImageError, 400, "invalid_request_error"),
    (BusyError, 503, "unavailable_error"),
    (ClosedError, 503, "unavailable_error"),
    (DeadlineError, 504, "timeout_error"),
    (OmniVLMError, 500, "server_error"),
)


def error_object(message: str, kind: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    message = message.encode(errors="replace").decode()  # what clients send need not be UTF-8
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def describe_error(error: OmniVLMError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """An error of this package -> status, body and headers.

    Of the errors' advice, which is for the command line, clients are told nothing.
    """
    status, kind = next((s, k) for cls, s, k in _STATUS if isinstance(error, cls))
    headers = {"Retry-After": str(_RETRY_SECONDS)} if status == 503 else {}
    param = "messages" if isinstance(error, ImageError) else None
    message = error.fact
    if isinstance(error, ContextOverflowError):
        message += ": shorten the prompt, or leave pictures out"
    elif isinstance(error, ModelFileError):  # names files
        message = "the model's files cannot be used: the server's log says why"
    return status, error_object(message, kind, status, param), headers
