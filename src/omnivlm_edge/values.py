"""The immutable values that travel between the stages. No I/O."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import OptionError

DEFAULT_MAX_TOKENS = 512  # or what the context has room for
DEFAULT_N_CTX = 2048  # positions
MAX_STOPS = 16
MAX_BIAS = 100  # as in OpenAI's interface
MAX_LOGPROBS = 20  # as in OpenAI's interface
MAX_SEED = 2**32 - 2  # one less than llama.cpp's seeds: its largest means "random"

#: How the vision path is computed on a CPU; see the README. `ggml`: in the file's types.
VISION_PRECISIONS = ("auto", "int8", "int8-fast", "int8-block32", "bf16", "f32", "ggml")

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class ModelFiles:
    """The two GGUF files of one model.

    `variant` overrides the prompt variant that the mmproj names (files in the published `siglip`
    layout name none); see `prompt.VARIANTS`.
    """

    text: Path
    mmproj: Path
    variant: str | None = None


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds per stage.

    `load` was spent once for the model; `preprocess` and `encode` on the pictures of this answer,
    nothing where they came as `ImageEmbedding`. `first_token` is what the answer's first token
    took, from the call on.
    """

    load: float = 0.0
    preprocess: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    first_token: float = 0.0


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """One encoded picture: float32 [n_tokens, n_embd], reusable for any number of questions.

    `name` is the picture's, for people; `cached` tells where the embedding was found: nowhere (it
    was computed), in memory or on disk.
    """

    data: npt.NDArray[np.float32]
    preprocess_seconds: float = 0.0
    encode_seconds: float = 0.0
    name: str = "the picture"
    cached: Literal["", "memory", "disk"] = ""


@dataclass(frozen=True, eq=False)
class Turn:
    """A question, the pictures that came with it, and its answer.

    A picture is an ImageEmbedding, or anything that `OmniVLM.encode` takes. The last turn of a
    conversation has no answer yet, or its beginning, which is continued; one that is answered
    without question and pictures is a greeting. `tokens`, where they are known, are what the answer
    was sampled as: text alone may be tokenised in another way, and then be computed anew.
    """

    question: str
    images: tuple[Any, ...] = ()
    answer: str | None = None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class GenerateOptions:
    """How an answer is sampled. The defaults are greedy, as the original.

    `max_tokens` None means 512, or what the context has room for. `temperature` 0 is greedy and
    makes every other sampling field idle but the penalties, `logit_bias` and `grammar`; `top_k` 0,
    `top_p` 1, `min_p` 0, `repeat_penalty` 1 and the other penalties 0 switch the respective filter
    off; `seed` None draws a fresh one. `frequency_penalty` and `presence_penalty` (from -2 to 2)
    are OpenAI's; `logit_bias` is added to the logits of some tokens: (id, from -100 to 100), and
    each id once. `grammar` (llama.cpp's GBNF; `json_schema_grammar` makes one) admits only answers
    that it describes. An answer ends before the first of the `stop` strings. With `top_logprobs`
    the answer's `logprobs` are kept, each with so many of the likeliest tokens.

    Raises OptionError for a value of a wrong type or out of its range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    grammar: str | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        seeds = f"a whole number from 0 to {MAX_SEED}"
        for name, valid, wanted in (
            ("max_tokens", _optional(_whole(1)), "a whole number from 1"),
            ("temperature", _number(lambda t: 0 <= t < math.inf), "a number from 0 (greedy)"),
            ("top_k", _whole(0), "a whole number from 0 (off)"),
            ("top_p", _number(lambda p: 0 < p <= 1), "a number above 0 and at most 1"),
            ("min_p", _number(lambda p: 0 <= p < 1), "a number from 0 and below 1"),
            ("repeat_penalty", _number(lambda r: 0 < r < math.inf), "a number above 0"),
            ("frequency_penalty", _number(lambda p: -2 <= p <= 2), "a number from -2 to 2"),
            ("presence_penalty", _number(lambda p: -2 <= p <= 2), "a number from -2 to 2"),
            ("logit_bias", _is_bias, f"pairs of different tokens and up to {MAX_BIAS}, in a tuple"),
            ("seed", _optional(_whole(0, MAX_SEED)), seeds),
            ("grammar", _optional(lambda value: isinstance(value, str)), "a text"),
            ("stop", _is_stop, f"at most {MAX_STOPS} texts, none empty, in a tuple"),
            ("top_logprobs", _optional(_whole(0, MAX_LOGPROBS)), f"from 0 to {MAX_LOGPROBS}"),
        ):
            value = getattr(self, name)
            if not valid(value):
                raise OptionError(f"{name} is {value!r}: it must be {wanted}")


_Check: TypeAlias = Callable[[Any], bool]


def _whole(least: int, most: float = math.inf) -> _Check:
    return lambda value: type(value) is int and least <= value <= most


def _number(within: _Check) -> _Check:
    return lambda value: type(value) in (int, float) and within(value)


def _optional(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _is_bias(value: Any) -> bool:
    token, bias = _whole(0, 2**31 - 1), _number(lambda b: -MAX_BIAS <= b <= MAX_BIAS)
    pairs = isinstance(value, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and token(pair[0]) and bias(pair[1])
        for pair in value
    )
    return pairs and len({pair[0] for pair in value}) == len(value)


def _is_stop(value: Any) -> bool:
    if not isinstance(value, tuple) or len(value) > MAX_STOPS:
        return False
    return all(isinstance(text, str) and text for text in value)


@dataclass(frozen=True)
class TokenLogprob:
    """A sampled token's bytes and the natural logarithm of its probability.

    `top` are the likeliest tokens in its place, in the same way. Before temperature and filters.
    """

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """One finished answer.

    `prompt_tokens` counts every position before the answer: `image_tokens` of them are pictures',
    `cached_tokens` were in the context from before, or came from disk, and cost next to nothing.
    `tokens` are the sampled ones, without the one that ended the answer; `images` are the pictures
    of the prompt; `logprobs` stand beside `tokens`, if they were asked for. Where choices were
    scored instead of tokens sampled, `choices` has their probabilities, and `text` the likeliest.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    timings: Timings = field(default_factory=Timings)
    tokens: tuple[int, ...] = field(default=(), repr=False)
    images: tuple[ImageEmbedding, ...] = field(default=(), repr=False)
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    choices: dict[str, float] = field(default_factory=dict)
