"""The immutable values that travel between the stages. No I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from .errors import OptionError

MAX_SEED = 2**32 - 2  # one less than llama.cpp's seeds: its largest means "random"

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

    `load` was spent once for the model, `preprocess` and `encode` once for the picture; an answer
    about an `ImageEmbedding` repeats what that one had cost.
    """

    load: float = 0.0
    preprocess: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, eq=False)
class ImageEmbedding:
    """One encoded picture: float32 [n_tokens, n_embd], reusable for any number of questions."""

    data: npt.NDArray[np.float32]
    preprocess_seconds: float = 0.0
    encode_seconds: float = 0.0


@dataclass(frozen=True)
class GenerateOptions:
    """How an answer is sampled. The defaults are greedy, as the original.

    `temperature` 0 is greedy and makes every other sampling field but `repeat_penalty` idle;
    `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 switch the respective filter off;
    `seed` None draws a fresh one.

    Raises OptionError for a value out of its range.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = [
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0 (greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repeat_penalty", 0 < self.repeat_penalty < math.inf, "a number above 0"),
            ("seed", self.seed is None or 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
        ]
        for name, valid, wanted in ranges:
            if not valid:
                raise OptionError(f"{name} is {getattr(self, name)}: it must be {wanted}")


@dataclass(frozen=True)
class Answer:
    """One finished answer.

    `prompt_tokens` counts every position that was prefilled, `image_tokens` the picture's share.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    timings: Timings = field(default_factory=Timings)
