"""The native vision encoder against the NumPy reference, and every way for a file to be wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import reference
import tiny_gguf
from omnivlm_edge import DeviceError, ModelFileError, _native
from tiny_gguf import VisionShape

SHAPES = {
    "81 tokens style": VisionShape(),
    "729 tokens style": VisionShape(n_merge=1),
    "unused border pixels": VisionShape(image_size=50),
    "wide head, odd mlp": VisionShape(image_size=84, n_embd=144, n_head=2, n_ff=538),
    "other patch": VisionShape(image_size=48, patch_size=8, n_merge=4, n_head=1),
}

# Largest difference over the reference's largest value.
MAX_ERROR = {"f32": 1e-3, "f16": 2e-3, "bf16": 1e-2}


def encoder(path: Path, n_threads: int = 2, flash_attention: bool = True) -> _native.VisionEncoder:
    return _native.VisionEncoder(
        os.fsencode(path), "CPU", n_threads, "ggml", flash_attention=flash_attention
    )


def random_pixels(shape: VisionShape, n: int = 1, seed: int = 1) -> np.ndarray:
    size = (n, 3, shape.image_size, shape.image_size)
    return np.random.default_rng(seed).uniform(-1, 1, size).astype(np.float32)


def rounded(tensors: tiny_gguf.Tensors, dtype: str) -> tiny_gguf.Tensors:
    """The weights as the file holds them."""
    kind = gguf.GGMLQuantizationType[dtype.upper()]

    def round_trip(data: np.ndarray) -> np.ndarray:
        return gguf.quants.dequantize(gguf.quants.quantize(data, kind), kind).reshape(data.shape)

    return {name: round_trip(data) if data.ndim > 1 else data for name, data in tensors.items()}


@pytest.mark.parametrize("flash_attention", [True, False], ids=["flash", "explicit"])
@pytest.mark.parametrize("dtype", MAX_ERROR)
@pytest.mark.parametrize("layout", ["clip", "siglip"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_encode_equals_the_reference(
    tmp_path: Path, shape: VisionShape, layout: str, dtype: str, flash_attention: bool
) -> None:
    path = tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape, layout=layout, dtype=dtype)
    weights = rounded(tiny_gguf.random_tensors(shape), dtype)
    gelu = "erf" if layout == "clip" else "tanh"
    pixels = random_pixels(shape, n=2)

    tokens = encoder(path, flash_attention=flash_attention).encode(pixels)

    assert tokens.shape == (2, shape.n_tokens, shape.n_text)
    assert tokens.dtype == np.float32
    for image, got in zip(pixels, tokens, strict=True):
        want = reference.encode(weights, shape, image, gelu)
        cosine = (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want)
        assert cosine >= 0.9999
        assert np.abs(got - want).max() <= MAX_ERROR[dtype] * np.abs(want).max()


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_projector_gelu_follows_the_file(tmp_path: Path, gelu: str) -> None:
    """They differ by 4e-4 around 2.2: averaged over 256 units, more than what rounding does."""
    shape = VisionShape(n_proj=256)
    tensors = tiny_gguf.random_tensors(shape)
    tensors["mm.0.weight"] *= 0.01
    tensors["mm.0.bias"] = np.linspace(2.0, 2.4, 256, dtype=np.float32)
    tensors["mm.2.weight"][:] = 1 / 256
    keys = tiny_gguf.clip_keys(shape) | {"clip.vision.projector.gelu": gelu}
    pixels = random_pixels(shape)
    got = encoder(tiny_gguf.write_gguf(tmp_path / "mmproj.gguf", keys, tensors)).encode(pixels)[0]
    errors = {
        kind: np.abs(got - reference.encode(tensors, shape, pixels[0], kind)).max()
        for kind in ("erf", "tanh")
    }
    other = {"erf": "tanh", "tanh": "erf"}[gelu]
    assert errors[gelu] < 0.3 * errors[other]


@pytest.mark.parametrize("n", [1, 3, 8, 9, 20])
def test_a_batch_equals_its_pictures_one_by_one(tmp_path: Path, n: int) -> None:
    shape = VisionShape()
    vision = encoder(tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape))
    pixels = random_pixels(shape, n)
    batch = vision.encode(pixels)
    single = np.concatenate([vision.encode(pixels[i : i + 1]) for i in range(n)])
    np.testing.assert_allclose(batch, single, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_gives_no_tokens(tmp_path: Path) -> None:
    shape = VisionShape()
    vision = encoder(tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape))
    assert vision.encode(random_pixels(shape, 0)).shape == (0, shape.n_tokens, shape.n_text)


@pytest.mark.parametrize("flash_attention", [True, False], ids=["flash", "explicit"])
@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_collected_sums_equal_the_reference(
    tmp_path: Path, layout: str, flash_attention: bool
) -> None:
    """Every matrix of the file, by its name there, and none of attention's own products."""
    shape = VisionShape(image_size=84, n_ff=50)
    vision = encoder(
        tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape, layout=layout),
        flash_attention=flash_attention,
    )
    weights = tiny_gguf.random_tensors(shape)
    pixels = random_pixels(shape, n=3)
    collector = _native.ImportanceCollector()
    tokens = vision.encode(pixels[:2], collector)
    tokens = np.concatenate([tokens, vision.encode(pixels[2:], collector)])
    np.testing.assert_allclose(tokens, vision.encode(pixels), rtol=1e-4, atol=1e-5)

    rows: dict[str, list[np.ndarray]] = {}
    for image in pixels:
        inputs: dict[str, np.ndarray] = {}
        gelu = "erf" if layout == "clip" else "tanh"
        reference.encode(weights, shape, image, gelu, inputs)
        for name, x in (tiny_gguf.siglip_names(inputs) if layout == "siglip" else inputs).items():
            rows.setdefault(name, []).append(x)
    found = collector.sums()
    assert found.keys() == rows.keys()
    assert len(found) == 2 * 6 + 2
    for name, parts in rows.items():
        want = np.concatenate(parts)
        assert found[name].n_rows == len(want), name
        scale = np.abs(want).max()
        np.testing.assert_allclose(
            found[name].squares, (want**2).sum(0), rtol=2e-3, atol=1e-3 * scale**2, err_msg=name
        )
        np.testing.assert_allclose(
            found[name].values, want.sum(0), atol=1e-3 * scale * len(want) ** 0.5, err_msg=name
        )


def test_collecting_from_nothing(tmp_path: Path) -> None:
    shape = VisionShape()
    vision = encoder(tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape))
    collector = _native.ImportanceCollector()
    vision.encode(random_pixels(shape, 0), collector)
    assert collector.sums() == {}


def test_quantized_weights_load(tmp_path: Path) -> None:
    shape = VisionShape(n_ff=64, n_proj=64)
    tensors = tiny_gguf.random_tensors(shape)
    exact = encoder(
        tiny_gguf.write_gguf(tmp_path / "f32.gguf", tiny_gguf.clip_keys(shape), tensors)
    )
    tiny_gguf.write_gguf(tmp_path / "q8_0.gguf", tiny_gguf.clip_keys(shape), tensors, "q8_0")
    pixels = random_pixels(shape)
    got, want = encoder(tmp_path / "q8_0.gguf").encode(pixels), exact.encode(pixels)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_unused_head_tensors_are_ignored(tmp_path: Path) -> None:
    shape = VisionShape()
    tensors = tiny_gguf.siglip_names(tiny_gguf.random_tensors(shape))
    plain = tiny_gguf.write_gguf(tmp_path / "plain.gguf", tiny_gguf.siglip_keys(shape), tensors)
    tensors["v.head.probe"] = np.full(shape.n_embd, np.nan, np.float32)
    tensors["v.head.attention.in_weight"] = np.full((96, 32), np.nan, np.float32)
    headed = tiny_gguf.write_gguf(tmp_path / "head.gguf", tiny_gguf.siglip_keys(shape), tensors)
    pixels = random_pixels(shape)
    assert np.array_equal(encoder(plain).encode(pixels), encoder(headed).encode(pixels))


def test_hparams_come_from_the_file(tmp_path: Path) -> None:
    shape = VisionShape(image_size=50, n_merge=3)
    hparams = encoder(tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape)).hparams
    assert (hparams.image_size, hparams.patch_size, hparams.n_merge) == (50, 14, 3)
    assert (hparams.n_tokens, hparams.n_embd_text) == (3, 64)
    assert hparams.prompt_variant == "vlm-81-instruct"
    assert list(hparams.image_mean) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((3, 42, 42), np.float32),
        np.zeros((1, 3, 42, 43), np.float32),
        np.zeros((1, 1, 42, 42), np.float32),
        np.zeros((1, 3, 42, 42), np.float64),
        np.zeros((1, 3, 42, 84), np.float32)[..., ::2],
    ],
    ids=["no batch", "size", "channels", "float64", "strided"],
)
def test_wrong_pixels_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    vision = encoder(tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf"))
    with pytest.raises((TypeError, ValueError)):
        vision.encode(pixels)


def test_threads_may_share_an_encoder(tmp_path: Path) -> None:
    shape = VisionShape()
    vision = encoder(tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape))
    pixels = random_pixels(shape, 4)
    want = vision.encode(pixels)
    got: list[Any] = [None] * 8

    def work(i: int) -> None:
        got[i] = [vision.encode(pixels[: 1 + i % 4]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in enumerate(got):
        for result in results:
            np.testing.assert_allclose(result, want[: 1 + i % 4], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 76 MB of weights: large enough to see in a process's memory and on the clock."""
    shape = VisionShape(n_embd=512, n_ff=2048, n_layer=6, n_proj=512, n_text=512)
    return tiny_gguf.write_mmproj(tmp_path_factory.mktemp("big") / "mmproj.gguf", shape)


def test_encode_releases_the_gil(big_file: Path) -> None:
    vision = encoder(big_file, n_threads=1)
    pixels = random_pixels(VisionShape(), 64)
    thread = threading.Thread(target=vision.encode, args=(pixels,))
    thread.start()
    turns = 0
    while thread.is_alive():
        turns += 1
    thread.join()
    assert turns > 1000  # with the GIL held there would be a handful


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stay_in_the_mapping(big_file: Path) -> None:
    """The anonymous (unshared, allocated) memory does not grow by the size of the file."""
    script = """
import re, sys
import numpy as np
from omnivlm_edge import _native
anonymous = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = anonymous()
vision = _native.VisionEncoder(sys.argv[1].encode(), "CPU", 1, "ggml")
vision.encode(np.zeros((1, 3, 42, 42), np.float32))
print((anonymous() - before) * 1024)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, big_file], capture_output=True, text=True, check=True
    )
    assert big_file.stat().st_size > 70e6
    assert int(result.stdout) < 15e6


def test_unknown_device(tmp_path: Path) -> None:
    path = tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf")
    with pytest.raises(DeviceError, match="'TPU0' does not exist"):
        _native.VisionEncoder(os.fsencode(path), "TPU0", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_ggml_lives_in_the_process() -> None:
    script = (
        "import omnivlm_edge, llama_cpp\n"
        "print(*{l.split()[-1] for l in open('/proc/self/maps') if 'ggml-base' in l})"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert len(result.stdout.split()) == 1


# --- quantization ---------------------------------------------------------------------------------

GgmlType = gguf.GGMLQuantizationType
EXACT_TYPES = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Largest relative error (of the norm) for normal random rows.
LOSSY_TYPES = {"Q6_K": 0.02, "Q5_K": 0.04, "Q4_K": 0.08, "IQ4_NL": 0.09, "IQ4_XS": 0.09}


def random_rows(n_rows: int, n_per_row: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n_rows, n_per_row)) * 10.0 ** rng.integers(-2, 4, (n_rows, 1))
    return rows.astype(np.float32)


@pytest.mark.parametrize("shape", [(0, 64), (1, 32), (3, 96), (7, 1152), (64, 4352)])
@pytest.mark.parametrize("name", EXACT_TYPES)
def test_quantize_equals_gguf_py(name: str, shape: tuple[int, int]) -> None:
    rows = random_rows(*shape)
    want = gguf.quants.quantize(rows, GgmlType[name])
    for n_threads in (1, 2, 5):
        got = _native.quantize(rows, GgmlType[name], n_threads)
        np.testing.assert_array_equal(got, want.view(np.uint8).reshape(got.shape))


@pytest.mark.parametrize("name", LOSSY_TYPES)
def test_quantize_is_close_whatever_the_threads(name: str) -> None:
    rows = random_rows(9, 768)
    got = _native.quantize(rows, GgmlType[name], 1)
    error = np.linalg.norm(gguf.quants.dequantize(got, GgmlType[name]) - rows, axis=1)
    assert (error <= LOSSY_TYPES[name] * np.linalg.norm(rows, axis=1)).all()
    for n_threads in (2, 4, 20):
        np.testing.assert_array_equal(_native.quantize(rows, GgmlType[name], n_threads), got)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", *LOSSY_TYPES])
def test_quantize_by_importance(name: str) -> None:
    """Weights lower the weighted error; even ones the error itself. Others leave no mark."""
    rows = random_rows(32, 768)

    def error(weights: np.ndarray | None, measure: np.ndarray) -> float:
        got = gguf.quants.dequantize(_native.quantize(rows, kind, 2, weights), kind)
        scale = np.abs(rows).max(axis=1, keepdims=True)
        return float((measure * ((got - rows) / scale) ** 2).sum())

    kind = GgmlType[name]
    even = np.ones(768, np.float32)
    uneven = np.random.default_rng(1).lognormal(0, 2, 768).astype(np.float32)
    assert error(even, even) < error(None, even)
    assert error(uneven, uneven) < 0.95 * error(even, uneven)
    np.testing.assert_array_equal(
        _native.quantize(rows, kind, 1, uneven), _native.quantize(rows, kind, 3, uneven)
    )


@pytest.mark.parametrize("name", ["F16", "Q8_0"])
def test_quantize_without_choice_of_scales_needs_no_importance(name: str) -> None:
    rows, weights = random_rows(4, 64), np.linspace(1, 9, 64, dtype=np.float32)
    np.testing.assert_array_equal(
        _native.quantize(rows, GgmlType[name], 1, weights),
        _native.quantize(rows, GgmlType[name], 1),
    )


def test_quantize_refuses_importance_of_another_width() -> None:
    for weights in (np.ones(63, np.float32), np.ones(0, np.float32), np.ones(128, np.float32)):
        with pytest.raises(ValueError, match="one value for each column"):
            _native.quantize(random_rows(2, 64), GgmlType.Q4_0, 1, weights)
    for wrong in (np.ones(64), np.ones((1, 64), np.float32), np.ones(128, np.float32)[::2]):
        with pytest.raises(TypeError):
            _native.quantize(random_rows(2, 64), GgmlType.Q4_0, 1, wrong)


@pytest.mark.parametrize("importance", [None, "even", "spread"])
@pytest.mark.parametrize("name", [*EXACT_TYPES, *LOSSY_TYPES])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1.0, -65504.0, 65504.0])
def test_quantize_extreme_rows(name: str, value: float, importance: str | None) -> None:
    weights = None
    if importance is not None:  # of mean 1
        exponents = np.linspace(-6, 2, 256) if importance == "spread" else np.zeros(256)
        weights = (10**exponents / (10**exponents).mean()).astype(np.float32)
    rows = np.zeros((4, 256), np.float32)
    rows[1:] = value
    rows[2, ::2] = 0
    rows[3, 1:] = 0
    packed = _native.quantize(rows, GgmlType[name], 2, weights)
    got = gguf.quants.dequantize(packed, GgmlType[name])
    assert not got[0].any()
    assert np.abs(got - rows).max() <= max(0.2 * abs(value), 1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65536.0, -1e30])
def test_quantize_refuses_values_out_of_range(value: float) -> None:
    rows = random_rows(8, 256)
    rows[6, 200] = value
    for name in ("F16", "Q4_0", "Q4_K", "IQ4_NL"):
        with pytest.raises(ValueError, match="not finite or larger than 65504"):
            _native.quantize(rows, GgmlType[name], 3)


@pytest.mark.parametrize("number", [-1, 0, 4, 9, 15, 16, 19, 26, 31, 38, 1000, 2**31 - 1])
def test_quantize_refuses_types_that_ggml_would_abort_on(number: int) -> None:
    with pytest.raises(ValueError, match=f"ggml type {number} is none"):
        _native.quantize(random_rows(2, 256), number, 1)


@pytest.mark.parametrize(("name", "width"), [("Q8_0", 48), ("Q4_K", 1152), ("F16", 0)])
def test_quantize_refuses_broken_blocks(name: str, width: int) -> None:
    with pytest.raises(ValueError, match=f"rows of {width} values are no whole blocks"):
        _native.quantize(np.zeros((2, width), np.float32), GgmlType[name], 1)


# --- files that are wrong -------------------------------------------------------------------------

Keys = dict[str, Any]
Edit = Callable[[Keys, Keys], object]  # changes keys, tensors in place


def setting(key: str, value: Any) -> Edit:
    return lambda keys, tensors: keys.update({key: value})


def without_key(key: str) -> Edit:
    return lambda keys, tensors: keys.pop(key)


def without_tensor(name: str) -> Edit:
    return lambda keys, tensors: tensors.pop(name)


def tensor(name: str, data: np.ndarray) -> Edit:
    return lambda keys, tensors: tensors.update({name: data})


V = "clip.vision."
WRONG_CLIP_FILES: dict[str, tuple[Edit, str]] = {
    "another architecture": (setting("general.architecture", "llama"), "architecture 'llama'"),
    "another projector": (setting("clip.projector_type", "idefics3"), "projector type 'idefics3'"),
    "no projector type": (without_key("clip.projector_type"), "projector type ''"),
    "no image size": (without_key(V + "image_size"), "key clip.vision.image_size is missing"),
    "no eps": (without_key(V + "attention.layer_norm_epsilon"), "layer_norm_epsilon is missing"),
    "no variant": (without_key("clip.omnivlm.prompt_variant"), "prompt_variant is missing"),
    "key of a wrong type": (setting(V + "block_count", "2"), "block_count has type str"),
    "zero image": (setting(V + "image_size", 0), "image_size is 0"),
    "huge image": (setting(V + "image_size", 4_000_000_000), "image_size is 4000000000"),
    "zero patch": (setting(V + "patch_size", 0), "patch_size is 0"),
    "patch over image": (setting(V + "patch_size", 43), "patch_size is larger than image_size"),
    "zero layers": (setting(V + "block_count", 0), "block_count is 0"),
    "too many layers": (setting(V + "block_count", 3), "more blocks than the file has tensors"),
    "huge layers": (setting(V + "block_count", 2**31), "block_count is"),
    "absurd layers": (setting(V + "block_count", 2**17), "more blocks than the file has tensors"),
    "zero heads": (setting(V + "attention.head_count", 0), "head_count is 0"),
    "heads do not divide": (setting(V + "attention.head_count", 5), "head_count does not divide"),
    "zero width": (setting(V + "embedding_length", 0), "embedding_length is 0"),
    "another width": (setting(V + "embedding_length", 96), "merge_factor does not fit"),
    "another mlp": (setting(V + "feed_forward_length", 56), "v.blk.0.ffn_up.weight has shape"),
    "another image": (setting(V + "image_size", 84), "v.position_embd.weight has shape"),
    "merge factor": (setting(V + "projector.merge_factor", 3), "merge_factor does not fit"),
    "zero merge": (setting(V + "projector.merge_factor", 0), "merge_factor is 0"),
    "text width": (setting(V + "projection_dim", 63), "projection_dim does not fit"),
    "eps zero": (setting(V + "attention.layer_norm_epsilon", 0.0), "not between 0 and 1"),
    "eps nan": (setting(V + "attention.layer_norm_epsilon", float("nan")), "not between 0 and 1"),
    "unknown gelu": (setting(V + "projector.gelu", "relu"), "projector.gelu is 'relu'"),
    "mean of two": (setting(V + "image_mean", [0.5, 0.5]), "image_mean is not an array of three"),
    "mean of words": (setting(V + "image_mean", ["a", "b", "c"]), "image_mean is an array of str"),
    "mean infinite": (setting(V + "image_mean", [0.5, 0.5, float("inf")]), "not finite"),
    "std zero": (setting(V + "image_std", [0.5, 0.0, 0.5]), "not positive"),
    "no tensor": (without_tensor("v.blk.1.attn_k.weight"), "v.blk.1.attn_k.weight is missing"),
    "no bias": (without_tensor("v.post_ln.bias"), "v.post_ln.bias is missing"),
    "no projector": (without_tensor("mm.0.weight"), "mm.0.weight is missing"),
    "projector rows": (
        tensor("mm.0.weight", np.zeros((40, 33), np.float32)),
        "mm.0.weight takes rows of 33 values",
    ),
    "merge does not divide": (
        tensor("mm.0.weight", np.zeros((40, 64), np.float32)),
        "mm.0.weight takes rows of 64 values",
    ),
    "projector inside": (tensor("mm.2.weight", np.zeros((64, 41), np.float32)), "mm.2.weight has"),
    "misshapen": (tensor("v.post_ln.bias", np.zeros(31, np.float32)), "v.post_ln.bias has shape"),
    "transposed": (
        tensor("v.blk.0.ffn_up.weight", np.zeros((32, 48), np.float32)),
        "v.blk.0.ffn_up.weight has shape",
    ),
    "half bias": (
        tensor("v.blk.0.ln1.bias", np.zeros(32, np.float16)),
        "v.blk.0.ln1.bias has type f16 instead of F32",
    ),
    "integer weights": (
        tensor("v.blk.0.attn_v.weight", np.zeros((32, 32), np.int32)),
        "v.blk.0.attn_v.weight has type i32",
    ),
    "double weights": (
        tensor("mm.2.weight", np.zeros((64, 40), np.float64)),
        "mm.2.weight has type f64",
    ),
}


@pytest.mark.parametrize(("edit", "message"), WRONG_CLIP_FILES.values(), ids=WRONG_CLIP_FILES)
def test_wrong_clip_file(tmp_path: Path, edit: Edit, message: str) -> None:
    shape = VisionShape()
    keys, tensors = tiny_gguf.clip_keys(shape), tiny_gguf.random_tensors(shape)
    edit(keys, tensors)
    path = tiny_gguf.write_gguf(tmp_path / "mmproj.gguf", keys, tensors)
    with pytest.raises(ModelFileError, match=message) as caught:
        encoder(path)
    assert str(caught.value).startswith(str(path))


WRONG_SIGLIP_FILES: dict[str, tuple[Edit, str]] = {
    "no heads": (without_key("siglip.vision.attention.head_count"), "head_count is missing"),
    "zero patch": (setting("siglip.vision.patch_size", 0), "patch_size is 0"),
    "no tensor": (without_tensor("v.blk.0.ffn_up.weight"), "v.blk.0.ffn_up.weight is missing"),
    "names not swapped": (
        tensor("v.blk.0.ffn_up.weight", np.zeros((48, 32), np.float32)),
        "v.blk.0.ffn_up.weight has shape",
    ),
}


@pytest.mark.parametrize(("edit", "message"), WRONG_SIGLIP_FILES.values(), ids=WRONG_SIGLIP_FILES)
def test_wrong_siglip_file(tmp_path: Path, edit: Edit, message: str) -> None:
    shape = VisionShape()
    keys = tiny_gguf.siglip_keys(shape)
    tensors = tiny_gguf.siglip_names(tiny_gguf.random_tensors(shape))
    edit(keys, tensors)
    path = tiny_gguf.write_gguf(tmp_path / "mmproj.gguf", keys, tensors)
    with pytest.raises(ModelFileError, match=message):
        encoder(path)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be opened"):
        encoder(tmp_path / "none.gguf")


def test_neither_directory_nor_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path, tmp_path / "pipe.gguf"):
        with pytest.raises(ModelFileError, match="not a regular file"):
            encoder(path)


def test_file_name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff\xfe.gguf")
    tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf").rename(path)
    assert encoder(path).hparams.n_tokens == 1
    path.write_bytes(b"no")
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        encoder(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"GG", "not a GGUF file"), (b"\x89PNG\r\n" * 9, "not a GGUF file")],
    ids=["empty", "short", "png"],
)
def test_not_gguf(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        encoder(path)


def test_cut_header(tmp_path: Path) -> None:
    path = tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf")
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ModelFileError, match="damaged or cut off"):
        encoder(path)


def test_cut_tensors(tmp_path: Path) -> None:
    path = tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ModelFileError, match="cut off"):
        encoder(path)


def test_unaligned_file_is_copied(tmp_path: Path) -> None:
    """general.alignment below what the CPU wants: the weights cannot stay in the mapping."""
    shape = VisionShape()
    tensors = {"padding": np.zeros(2, np.float32)} | tiny_gguf.random_tensors(shape)
    keys = tiny_gguf.clip_keys(shape)
    tiny_gguf.write_gguf(tmp_path / "mmproj.gguf", keys, tensors, alignment=8)
    pixels = random_pixels(shape)
    got = encoder(tmp_path / "mmproj.gguf").encode(pixels)[0]
    want = reference.encode(tensors, shape, pixels[0])
    assert np.abs(got - want).max() <= MAX_ERROR["f32"] * np.abs(want).max()


FUZZ = """
import sys
from pathlib import Path
import numpy as np
from omnivlm_edge import ModelFileError, _native

valid, path, seed = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), int(sys.argv[3])
header = int(sys.argv[4])
rng = np.random.default_rng(seed)
pixels = np.zeros((1, 3, 42, 42), np.float32)
loaded = refused = 0
for _ in range(int(sys.argv[5])):
    data = bytearray(valid)
    for _ in range(rng.integers(1, 4)):  # most of the structure is in the header
        end = header if rng.random() < 0.9 else len(data)
        data[rng.integers(end)] = rng.integers(256)
    if rng.random() < 0.3:
        del data[rng.integers(len(data)) :]
    path.write_bytes(data)
    try:
        vision = _native.VisionEncoder(bytes(path), "CPU", 1)
        assert vision.hparams.prompt_variant.isprintable()
        if vision.hparams.image_size == 42:
            vision.encode(pixels)
        loaded += 1
    except ModelFileError:
        refused += 1
print(loaded, refused)
"""


@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_damaged_bytes_never_crash(tmp_path: Path, layout: str) -> None:
    valid = tiny_gguf.write_mmproj(
        tmp_path / "valid.gguf", VisionShape(n_layer=1), layout=layout, dtype="f16"
    )
    header = gguf.GGUFReader(valid).data_offset
    result = subprocess.run(
        [sys.executable, "-c", FUZZ, valid, tmp_path / "fuzzed.gguf", "7", str(header), "1500"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    loaded, refused = map(int, result.stdout.split())
    assert loaded > 0
    assert refused > 0
