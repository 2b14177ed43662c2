"""Synthetic weights that are distributed like trained ones, on a tower small enough for NumPy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as GGMLType

import reference
from tiny_gguf import Tensors, VisionShape, random_tensors, siglip_names

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from trained_weights import Trained  # noqa: E402

SHAPE = VisionShape(image_size=168, n_embd=128, n_head=4, n_layer=6, n_ff=512, n_proj=128)


def trained(seed: int) -> Tensors:
    """A small tower's tensors under our own names."""
    shapes = {name: data.shape for name, data in siglip_names(random_tensors(SHAPE)).items()}
    weights = Trained(seed, shapes, SHAPE.n_head, text_layers=24)
    read = {n: weights.plan(n, s, GGMLType.F32).read() for n, s in shapes.items()}
    return siglip_names(read)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return trained(seed=0)


@pytest.fixture(scope="module")
def pictures() -> list[npt.NDArray[np.float64]]:
    """A ramp, stripes and noise, float64 [3, 168, 168] from -1 to 1."""
    ramp = np.linspace(-1, 1, SHAPE.image_size)
    noise = np.random.default_rng(1).uniform(-1, 1, (SHAPE.image_size, SHAPE.image_size))
    planes = (
        np.add.outer(ramp, ramp) / 2,
        np.sign(np.sin(40 * np.add.outer(ramp, 0 * ramp))),
        noise,
    )
    return [np.stack([plane, 0.5 * plane, -plane]) for plane in planes]


def test_same_seed_same_weights(tensors: Tensors) -> None:
    again, other = trained(seed=0), trained(seed=1)
    for name, data in tensors.items():
        assert data.dtype == np.float32 and np.isfinite(data).all()
        np.testing.assert_array_equal(again[name], data)
        assert not np.array_equal(other[name], data)


def test_values_have_heavy_tails(tensors: Tensors) -> None:
    values = tensors["v.blk.2.ffn_up.weight"]
    values = values / np.sqrt(np.square(values).mean(1, keepdims=True))
    values = values / np.sqrt(np.square(values).mean(0))
    assert 3.3 < (values**4).mean() < 7  # normal: 3


def test_few_channels_of_the_stream_are_large(tensors: Tensors) -> None:
    bias = np.abs(tensors["v.patch_embd.bias"])
    assert np.count_nonzero(bias > 20 * np.median(bias)) == 6


def test_pictures_differ(tensors: Tensors, pictures: list[npt.NDArray[np.float64]]) -> None:
    encoded = [reference.encode(tensors, SHAPE, picture).ravel() for picture in pictures]
    unit = [tokens / np.linalg.norm(tokens) for tokens in encoded]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert unit[i] @ unit[j] < 0.9
