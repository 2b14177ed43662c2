"""The immutable values that travel between the stages. No behaviour, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

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
    """Wall-clock seconds per stage. `load` is paid once per model, the others per answer."""

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
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None


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
