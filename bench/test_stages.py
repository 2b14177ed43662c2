"""The stages on the demo model, one by one: python -m pytest bench/test_stages.py

Compares with the committed baseline by what docs/benchmarking.md says.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from omnivlm_edge import GenerateOptions
from omnivlm_edge.decoder import TextDecoder
from omnivlm_edge.device import select_device
from omnivlm_edge.image import load_image, normalise, resize
from omnivlm_edge.made_pictures import made_pictures
from omnivlm_edge.models import find_model
from omnivlm_edge.vision import Vision

THREADS = 1
FILES = find_model("demo")
ROUNDS = 30
PROMPT = 16  # tokens before and behind the picture, each


@pytest.fixture(scope="module")
def vision() -> Vision:
    return Vision(FILES.mmproj, select_device("cpu"), THREADS)


@pytest.fixture
def decoder() -> Iterator[TextDecoder]:
    model = TextDecoder(FILES.text, select_device("cpu"), n_ctx=512, n_threads=THREADS)
    yield model
    model.close()


def test_preprocess(benchmark: BenchmarkFixture, vision: Vision) -> None:
    """JPEG of 512 x 512 pixels -> pixels of the model's size."""
    file = io.BytesIO()
    made_pictures(1)[0].image.save(file, "JPEG", quality=90)
    h = vision.hparams

    def preprocess() -> None:
        pixels = resize(load_image(file.getvalue()).image, h.image_size)
        normalise(pixels, h.image_mean, h.image_std)

    benchmark(preprocess)


def test_encode(benchmark: BenchmarkFixture, vision: Vision) -> None:
    side = vision.hparams.image_size
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, side, side)).astype(np.float32)
    benchmark(vision.encode, pixels)


def test_prefill(benchmark: BenchmarkFixture, decoder: TextDecoder, vision: Vision) -> None:
    """A picture with text around it."""
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((vision.hparams.n_tokens, decoder.n_embd)).astype(np.float32)
    before, behind = (rng.integers(0, 200, PROMPT).tolist() for _ in range(2))

    def prefill() -> None:
        decoder.forget()
        sequence = decoder.open(GenerateOptions())
        decoder.prefill(sequence, [before, embedding, behind])
        decoder.close_sequence(sequence)

    benchmark(prefill)


def test_decode_step(benchmark: BenchmarkFixture, decoder: TextDecoder) -> None:
    """One token more, after 32 to 62 positions."""
    sequence = decoder.open(GenerateOptions())
    decoder.prefill(sequence, [np.random.default_rng(0).integers(0, 200, 2 * PROMPT).tolist()])
    decoder.sample(sequence)

    def step() -> None:
        decoder.decode([sequence])
        decoder.sample(sequence)

    benchmark.pedantic(step, rounds=ROUNDS)
    decoder.close_sequence(sequence)
