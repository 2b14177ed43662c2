"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from omnivlm_edge import OmniVLM
from omnivlm_edge.convert import convert_checkpoint
from tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own models, caches and settings."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("OMNIVLM_", "HF_")):
            del os.environ[name]
    base = tmp_path_factory.mktemp("home")
    os.environ.update(OMNIVLM_HOME=str(base / "omnivlm"), HF_HOME=str(base / "huggingface"))
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random model's two GGUF files (float32)."""
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory / "checkpoint", image_size=84)
    convert_checkpoint(directory / "checkpoint", directory / "model", "f32")
    return directory / "model"


@pytest.fixture(scope="session")
def tiny_ocr_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of model, to read pictures and not to be asked."""
    directory = tmp_path_factory.mktemp("tiny-ocr")
    write_checkpoint(directory / "checkpoint", image_size=84)
    convert_checkpoint(directory / "checkpoint", directory, "f32", variant="vlm-81-ocr")
    return directory


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[OmniVLM]:
    with OmniVLM(tiny_model, device="cpu", n_threads=2) as model:
        yield model


@pytest.fixture
def picture() -> Image.Image:
    """A picture of no particular size with something in every corner."""
    image = Image.new("RGB", (130, 90), "white")
    image.paste("red", (0, 0, 60, 30))
    image.paste("green", (70, 50, 130, 90))
    image.paste("blue", (0, 60, 20, 90))
    return image
