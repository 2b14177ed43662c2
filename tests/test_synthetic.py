"""The full-size synthetic model has the published files' sizes; nothing of it is written here."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import synthetic  # noqa: E402


def test_published_mmproj() -> None:
    file = synthetic.published_mmproj(Path("mmproj.gguf"), synthetic.Noise(0))
    assert len(file.tensors) == 452
    assert file.nbytes == 957_534_720
    parameters = sum(
        tensor.nbytes // (2 if tensor.type.name == "F16" else 4) for tensor in file.tensors
    )
    assert parameters == 428_225_600 + 46_142_336  # tower with its pooling head, projector


def test_text_file() -> None:
    file = synthetic.text_file(Path("text.gguf"), synthetic.Noise(0), seed=0)
    assert len(file.tensors) == 290
    parameters = sum(
        tensor.nbytes // (2 if tensor.type.name == "F16" else 4) for tensor in file.tensors
    )
    assert parameters == 494_032_768
