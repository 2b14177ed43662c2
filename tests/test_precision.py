"""The vision path on the CPU's own kernels: every instruction set and precision that runs here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

import reference
import tiny_gguf
from command import COMMAND
from omnivlm_edge import DeviceError, ModelFileError, OmniVLM, OptionError, _native
from omnivlm_edge.gguf_header import Header, TensorInfo
from omnivlm_edge.memory import check_budget, memory_needed
from omnivlm_edge.model_file import inspect_file
from omnivlm_edge.models import find_model
from tiny_gguf import VisionShape

# Largest relative error of the embeddings; 8 bits with one scale for few values are good, too.
MAX_ERROR = {"int8": 0.05, "int8-fast": 0.06, "int8-block32": 0.05, "bf16": 0.02, "f32": 1e-5}

SHAPES = {
    "81 tokens style": VisionShape(),
    "729 tokens style": VisionShape(n_merge=1),
    "wide head, odd mlp": VisionShape(image_size=84, n_embd=144, n_head=2, n_ff=538),
    "several blocks of scales": VisionShape(n_embd=96, n_ff=1300, n_proj=200, n_text=70),
    "many tokens": VisionShape(image_size=210, n_embd=72, n_head=1),
}
EXAMPLES = Path(__file__).parent.parent / "examples"


def encoder(path: Path, precision: str, n_threads: int = 2, **options: object) -> object:
    return _native.VisionEncoder(os.fsencode(path), "CPU", n_threads, precision, **options)


def random_pixels(shape: VisionShape, n: int = 1) -> np.ndarray:
    size = (n, 3, shape.image_size, shape.image_size)
    return np.random.default_rng(1).uniform(-1, 1, size).astype(np.float32)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("precision", MAX_ERROR)
@pytest.mark.parametrize("kernels", _native.kernels())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_encode_equals_the_reference(
    tmp_path: Path, shape: VisionShape, kernels: str, precision: str
) -> None:
    path = tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape)
    weights = tiny_gguf.random_tensors(shape)
    pixels = random_pixels(shape, n=2)
    vision = encoder(path, precision, kernels=kernels)
    tokens = vision.encode(pixels)
    assert (vision.precision, vision.kernels) == (precision, kernels)
    for image, got in zip(pixels, tokens, strict=True):
        want = reference.encode(weights, shape, image, "erf")
        assert relative_error(got, want) < MAX_ERROR[precision]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "IQ4_NL", "Q4_K", "Q6_K"])
def test_weights_of_any_type(tmp_path: Path, kind: str) -> None:
    """Read as ggml dequantises them: the error is that of the file, which f32 does not add to."""
    shape = VisionShape(n_embd=256, n_head=4, n_ff=512, n_proj=256)
    tensors = tiny_gguf.random_tensors(shape)
    number = gguf.GGMLQuantizationType[kind]
    stored: dict[str, object] = {}
    rounded = {}
    for name, data in tensors.items():
        rounded[name] = stored[name] = data
        if data.ndim == 2 and "position" not in name:
            stored[name] = packed = _native.quantize(data, int(number), 1)
            rounded[name] = gguf.quants.dequantize(packed, number).reshape(data.shape)
    path = tiny_gguf.write_gguf(
        tmp_path / "mmproj.gguf", tiny_gguf.clip_keys(shape), stored, packed_dtype=number
    )
    pixels = random_pixels(shape)
    want = reference.encode(rounded, shape, pixels[0], "erf")
    assert relative_error(encoder(path, "f32").encode(pixels)[0], want) < 1e-5
    assert relative_error(encoder(path, "int8").encode(pixels)[0], want) < 0.05


@pytest.mark.parametrize("precision", MAX_ERROR)
def test_low_memory_changes_no_bit(tmp_path: Path, precision: str) -> None:
    shape = VisionShape(n_ff=1300)
    path = tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape, dtype="f16")
    pixels = random_pixels(shape, 2)
    want = encoder(path, precision).encode(pixels)
    lean = encoder(path, precision, low_memory=True)
    for _ in range(2):
        np.testing.assert_array_equal(lean.encode(pixels), want)


@pytest.mark.parametrize("precision", MAX_ERROR)
def test_neither_threads_nor_batches_change_a_bit(tmp_path: Path, precision: str) -> None:
    shape = VisionShape(image_size=126, n_embd=96, n_head=3)
    path = tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape)
    pixels = random_pixels(shape, 9)
    want = encoder(path, precision, 1).encode(pixels)
    for n_threads in (2, 5, 16):
        np.testing.assert_array_equal(encoder(path, precision, n_threads).encode(pixels), want)
    vision = encoder(path, precision)
    singles = [vision.encode(pixels[i : i + 1]) for i in range(len(pixels))]
    np.testing.assert_array_equal(np.concatenate(singles), want)


@pytest.mark.parametrize("precision", MAX_ERROR)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["v.blk.1.ffn_up.weight", "mm.0.weight", "v.blk.0.attn_k.bias"])
def test_what_is_no_number_comes_out_as_none(
    tmp_path: Path, name: str, bad: float, precision: str
) -> None:
    shape = VisionShape()
    tensors = tiny_gguf.random_tensors(shape)
    tensors[name].flat[5] = bad
    path = tiny_gguf.write_gguf(tmp_path / "mmproj.gguf", tiny_gguf.clip_keys(shape), tensors)
    assert not np.isfinite(encoder(path, precision).encode(random_pixels(shape))).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("precision", "low_memory", "anonymous", "of_file"),
    [("int8", False, 30e6, 20e6), ("bf16", False, 50e6, 20e6), ("int8", True, 12e6, 20e6)],
)
def test_memory(
    tmp_path: Path, precision: str, low_memory: bool, anonymous: float, of_file: float
) -> None:
    """A file of 76 MB (F32, 19 million weights) is packed, and its pages are given back."""
    shape = VisionShape(n_embd=512, n_ff=2048, n_layer=6, n_proj=512, n_text=512)
    path = tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", shape)
    script = """
import re, sys
import numpy as np
from omnivlm_edge import _native
def memory():
    status = open("/proc/self/status").read()
    names = "RssAnon", "RssFile"
    return [int(re.search(rf"{name}:\\s+(\\d+)", status)[1]) * 1024 for name in names]
before = memory()
vision = _native.VisionEncoder(sys.argv[1].encode(), "CPU", 1, sys.argv[2], sys.argv[3] == "True")
vision.encode(np.zeros((1, 3, 42, 42), np.float32))
print(*(b - a for a, b in zip(before, memory())))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, path, precision, str(low_memory)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = list(map(int, result.stdout.split()))
    assert grown[0] < anonymous
    assert grown[1] < of_file


def test_profile_names_every_stage(tmp_path: Path) -> None:
    vision = encoder(tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf"), "int8")
    seconds = vision.profile(random_pixels(VisionShape()))
    products = {"attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down", "mm.0", "mm.2"}
    assert products | {"patch_embd", "attention", "rows", "norm and rows"} <= seconds.keys()
    assert all(value > 0 for value in seconds.values())


def test_names(tmp_path: Path) -> None:
    path = tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf")
    with pytest.raises(ValueError, match="no precision 'int7'"):
        encoder(path, "int7")
    with pytest.raises(ValueError, match="no kernels 'mmx'"):
        encoder(path, "int8", kernels="mmx")
    assert encoder(path, "auto", kernels="portable").precision == "ggml"
    assert encoder(path, "auto").precision == _native.cpu_precision("auto")
    assert encoder(path, "ggml").kernels == ""


@pytest.mark.parametrize("precision", ["int8", "bf16", "f32"])
def test_peak(precision: str) -> None:
    assert _native.peak_gops(precision, 2) > 0
    assert _native.peak_gops("ggml", 2) == 0


def test_engine(tiny_model: Path) -> None:
    with OmniVLM(tiny_model, vision_precision="bf16", disk_cache=False, device="cpu") as model:
        assert model.vision_precision == "bf16"
        want = model.answer(EXAMPLES / "horses.png", "What?").text
    with OmniVLM(
        tiny_model, vision_precision="bf16", low_memory=True, disk_cache=False, device="cpu"
    ) as model:
        assert model.answer(EXAMPLES / "horses.png", "What?").text == want
    with pytest.raises(OptionError, match="'int4' does not exist: choose auto, int8"):
        OmniVLM(tiny_model, vision_precision="int4")


def test_precisions_do_not_share_cached_pictures(tiny_model: Path) -> None:
    found = {}
    for precision in ("int8", "f32"):
        with OmniVLM(tiny_model, vision_precision=precision, device="cpu") as model:
            found[precision] = model.encode(EXAMPLES / "shopping.png")
    assert found["f32"].cached == ""
    assert not np.array_equal(found["int8"].data, found["f32"].data)


def test_the_demo_answers_alike_in_every_precision() -> None:
    answers = set()
    for precision in ("ggml", *MAX_ERROR):
        with OmniVLM("demo", vision_precision=precision, disk_cache=False, device="cpu") as model:
            answers.add(model.answer(EXAMPLES / "horses.png", "Describe the image").text)
    assert answers == {"The image shows three horses and one duck near the water."}


def test_a_budget_is_checked_before_anything_is_loaded(tiny_model: Path) -> None:
    files = find_model(tiny_model)
    text, vision = inspect_file(files.text), inspect_file(files.mmproj)
    needed = memory_needed(text, vision, 2048)
    OmniVLM(tiny_model, max_ram=needed, disk_cache=False).close()
    lean = memory_needed(text, vision, 2048, low_memory=True)
    with pytest.raises(OptionError, match=r"more than the \d+ MB allowed: .*--low-memory \(\d+ MB"):
        OmniVLM(tiny_model, max_ram=max(lean, needed - 1))
    with pytest.raises(OptionError, match="the least that it can do with is"):
        OmniVLM(tiny_model, max_ram=1000)
    with pytest.raises(OptionError, match="max_ram is '1G'"):
        OmniVLM(tiny_model, max_ram="1G")


def test_every_choice_that_fits_is_named(tiny_model: Path) -> None:
    files = find_model(tiny_model)
    text, vision = inspect_file(files.text), inspect_file(files.mmproj)
    text = replace(text, size=2_000_000_000, header=many_parameters(text.header, 500_000_000))
    vision = replace(vision, header=many_parameters(vision.header, 450_000_000))
    check = partial(check_budget, n_sequences=1, precision="f32", low_memory=False, on_cpu=True)
    with pytest.raises(OptionError) as refused:
        check(2_700_000_000, text, vision, 2048)
    for choice in (
        "--vision-precision int8 (",
        "--low-memory (",
        "`omnivlm-edge quantize … --q4_k_m` (",
    ):
        assert choice in str(refused.value)
    with pytest.raises(OptionError) as refused:
        check(2_300_000_000, text, vision, 2048)
    assert "fits: --low-memory (" in str(refused.value)
    assert "more than the 2,300 MB allowed" in str(refused.value)


def test_what_is_counted(tiny_model: Path) -> None:
    """The estimates at the published sizes are no less than what was measured, nor far above."""
    files = find_model(tiny_model)
    text, vision = inspect_file(files.text), inspect_file(files.mmproj)
    numbers = {"block_count": 24, "embedding_length": 896, "feed_forward_length": 4864}
    numbers |= {"attention.head_count": 14, "attention.head_count_kv": 2, "context_length": 32768}
    seen = {"image_size": 384, "patch_size": 14, "embedding_length": 1152}
    vision = replace(
        vision,
        header=Header(
            {"general.architecture": "clip"} | {f"clip.vision.{k}": v for k, v in seen.items()},
            [TensorInfo("v.blk.0.ffn_up.weight", (1152, 4304), 0, 0)]
            + [TensorInfo("rest", (459_129_584 - 1152 * 4304,), 0, 0)],
        ),
    )
    for size, low_memory, measured in (
        (993_891_104, False, 1_719),  # F16: with a photograph of 4032 x 3024 that is turned
        (993_891_104, True, 1_205),
        (286_574_528, False, 1_031),  # Q4_K_M
        (286_574_528, True, 545),
        (283_822_016, False, 1_075),  # IQ4_NL
    ):
        text = replace(
            text,
            size=size,
            header=Header(
                {"general.architecture": "qwen2"} | {f"qwen2.{k}": v for k, v in numbers.items()},
                [
                    TensorInfo("token_embd.weight", (896, 151_936), 0, 0),
                    TensorInfo("rest", (494_032_768 - 896 * 151_936,), 0, 0),
                ],
            ),
        )
        needed = memory_needed(text, vision, 2048, precision="int8", low_memory=low_memory)
        assert measured <= needed / 1e6 < measured + 100


def many_parameters(header: Header, count: int) -> Header:
    return replace(header, tensors=[*header.tensors, TensorInfo("more", (count,), 0, 0)])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--max-ram", "10M"], 1, "more than the 10 MB allowed"),
        (["--max-ram", "much"], 2, "much is no size such as 900M or 1.5G"),
        (["--vision-precision", "int4"], 2, "'int4' is not one of 'auto', 'int8'"),
        (["--max-ram", "2.5GB", "--low-memory", "--vision-precision", "bf16"], 0, ""),
    ],
)
def test_command_line(options: list[str], code: int, message: str) -> None:
    picture = EXAMPLES / "horses.png"
    command = [*COMMAND, "run", "demo", "-i", picture, "-p", "Is there a duck?", "--no-cache"]
    result = subprocess.run([*command, *options], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert (result.stdout == "Yes, there is one duck.\n") == (code == 0)


def test_gpus_take_no_kernels(tiny_model: Path) -> None:
    gpus = [device for device in _native.devices() if device.kind != "cpu"]
    if not gpus:
        pytest.skip("this machine has no GPU that ggml was built for")
    with pytest.raises(DeviceError, match="is for the CPU"):
        OmniVLM(tiny_model, device=gpus[0].name, vision_precision="int8")


def test_a_damaged_file_is_refused_when_a_picture_is_encoded(
    tmp_path: Path, tiny_model: Path
) -> None:
    files = find_model(tiny_model)
    data = bytearray(files.mmproj.read_bytes())
    data[-4000:] = np.full(1000, np.nan, np.float32).tobytes()  # the last tensor's end
    (tmp_path / "mmproj.gguf").write_bytes(data)
    with (
        OmniVLM(files.text, tmp_path / "mmproj.gguf", disk_cache=False, device="cpu") as model,
        pytest.raises(ModelFileError, match="makes no numbers of"),
    ):
        model.encode(EXAMPLES / "horses.png")
