"""This package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from omnivlm_edge import GenerateOptions, OmniVLM, quantize_file
from omnivlm_edge.device import select_device
from omnivlm_edge.image import normalise
from omnivlm_edge.quantize.file import output_name
from omnivlm_edge.vision import Vision

from .base import MAX_TOKENS, Files, Pixels, Question, Timed, Tokens, is_current

LIBRARIES = ("omnivlm-edge", "llama-cpp-python")
FOUR_BITS = "q4_k_m"  # the recipe of the smallest files that the README recommends


def prepare(files: Files, *, precision: str, build: str | None = None) -> None:
    """Quantizes both files, where it is the 4-bit files that shall answer."""
    if build != "4-bit":
        return
    for source, output in zip((files.text, files.mmproj), _small(files), strict=True):
        if not is_current(output, source):
            quantize_file(source, output, FOUR_BITS)


def load(
    files: Files, threads: int, *, precision: str, build: str | None = None
) -> OurEncoder | OurAnswerer:
    """An encoder in this precision; an answerer where a build is named, `f16` or `4-bit`."""
    if build is None:
        return OurEncoder(files.mmproj, threads, precision)
    text, mmproj = _small(files) if build == "4-bit" else (files.text, files.mmproj)
    return OurAnswerer(text, mmproj, threads, precision)


class OurEncoder:
    """The vision path alone."""

    def __init__(self, mmproj: Path, threads: int, precision: str) -> None:
        self._vision = Vision(
            mmproj, select_device("cpu"), threads, precision=precision
        )
        self.side = self._vision.hparams.image_size

    def convert(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        mean, std = self._vision.hparams.image_mean, self._vision.hparams.image_std
        return np.stack([normalise(picture, mean, std) for picture in pixels])

    def encode(self, converted: npt.NDArray[np.float32]) -> Tokens:
        return self._vision.encode(converted)


class OurAnswerer:
    """The whole program, without its cache on disk."""

    def __init__(self, text: Path, mmproj: Path, threads: int, precision: str) -> None:
        self._model = OmniVLM(
            text,
            mmproj,
            device="cpu",
            n_threads=threads,
            disk_cache=False,
            vision_precision=precision,
        )

    def answer(self, question: Question) -> Timed:
        answer = self._model.answer(
            question.picture,
            question.question,
            GenerateOptions(max_tokens=MAX_TOKENS),
            system=question.system,
        )
        times = answer.timings
        return Timed(
            preprocess=times.preprocess,
            encode=times.encode,
            prefill=times.prefill,
            first_token=times.first_token,
            decode=times.decode / (answer.completion_tokens - 1),
            prompt_tokens=answer.prompt_tokens,
            answer_tokens=answer.completion_tokens,
        )


def _small(files: Files) -> tuple[Path, Path]:
    text, mmproj = (
        files.scratch / FOUR_BITS / output_name(path, FOUR_BITS)
        for path in (files.text, files.mmproj)
    )
    return text, mmproj

