"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from command import COMMAND
from fake_hub import Cli, FakeHub
from omnivlm_edge import OmniVLM
from omnivlm_edge.convert import convert_checkpoint
from omnivlm_edge.decoder import _initialise_backend
from tiny_checkpoint import write_checkpoint

TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """No test may see or change the user's own models, nor reach a network; Ctrl-C is heard.

    huggingface_hub reads its variables when it is imported, which is later than this; the tests'
    subprocesses inherit them.
    """
    # A shell's background jobs ignore the signal, and so would all that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    home = tempfile.TemporaryDirectory(prefix="omnivlm-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(home.cleanup)
    for name in [name for name in os.environ if name.startswith(("HF_", "OMNIVLM_"))]:
        del os.environ[name]
    os.environ |= {
        "HF_HOME": f"{home.name}/huggingface",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens there
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMNIVLM_HOME": f"{home.name}/omnivlm-edge",
    }


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> None:
    """ggml is asked once in a process for the CPU's kernels: not before ours are among them,
    whatever test happens to use llama-cpp-python alone first."""
    _initialise_backend()


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


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server


@pytest.fixture
def hub_env(tmp_path: Path, hub: FakeHub) -> dict[str, str]:
    """The environment of a user of `hub` who has no models yet."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "OMNIVLM_HOME": str(tmp_path / "own"),
        "PYTHONPATH": str(TESTS),
    }


@pytest.fixture
def hub_cli(hub_env: dict[str, str]) -> Cli:
    """Runs the command line in a process of that user; keywords are more variables."""

    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            env=hub_env | variables,
        )

    return run
