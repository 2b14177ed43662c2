"""What the parent process, the children and the contenders have in common."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # [n, side, side, 3]
Tokens = npt.NDArray[np.float32]  # [n, n_tokens, width of the text model]

MAX_TOKENS = 64

# The prompt, for those who cannot ask our package for it: it must not load their libraries twice.
BEFORE_PICTURE = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n\n<|vision_start|>"
AFTER_PICTURE = "<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Contender:
    """One way to run the model: its name, its module in this package and what that is told."""

    name: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """The model in F16, in our layout, and a directory for what is made of it."""

    text: Path
    mmproj: Path
    scratch: Path


@dataclass(frozen=True)
class Question:
    """A picture's file, and the texts around the picture."""

    picture: Path
    system: str
    question: str


@dataclass(frozen=True)
class Timed:
    """Seconds that an answer took: each stage, from the question to the first token, and a token.

    `decode` is of each token behind the first.
    """

    preprocess: float
    encode: float
    prefill: float
    first_token: float
    decode: float
    prompt_tokens: int
    answer_tokens: int


class Encoder(Protocol):
    """Encodes pictures: what `encode` alone takes is measured."""

    side: int

    def convert(self, pixels: Pixels) -> Any: ...

    def encode(self, converted: Any) -> Tokens: ...


class Answerer(Protocol):
    """Answers a question about a picture, with MAX_TOKENS tokens."""

    def answer(self, question: Question) -> Timed: ...


class SkippedError(Exception):
    """A contender cannot run here; the message says why."""


def is_current(made: Path, *sources: Path) -> bool:
    """Whether a file exists that is newer than what it is made of."""
    newest = max(source.stat().st_mtime for source in sources)
    return made.exists() and made.stat().st_mtime >= newest


def peak_megabytes() -> int:
    """The most memory that this process has had resident so far.

    Linux's own line, because getrusage hands down what the parent process had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return round(int(fields["VmHWM"].split()[0]) * 1024 / 1e6)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)
