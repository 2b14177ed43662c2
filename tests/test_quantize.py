"""Quantized files: what stands in them, that they run, and every way for it to fail."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

import tiny_gguf
from omnivlm_edge import (
    ConvertError,
    ModelFileError,
    ModelFiles,
    OmniVLM,
    OmniVLMError,
    OptionError,
    QuantizeOptions,
    compare_models,
    quantize_file,
)
from omnivlm_edge.calibration import collect
from omnivlm_edge.convert import convert_mmproj
from omnivlm_edge.convert.output import OutFile, OutTensor, write_gguf
from omnivlm_edge.imatrix import Imatrix, Inputs
from omnivlm_edge.models import find_model
from omnivlm_edge.quantize import text as quantize_text
from omnivlm_edge.quantize.file import output_name, plan_file
from omnivlm_edge.quantize.recipes import RECIPES
from tiny_gguf import VisionShape

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "train"))

import scenes  # noqa: E402

DEMO = find_model("demo")
COMMAND = [sys.executable, "-m", "omnivlm_edge", "quantize"]
# The MLP's width is a multiple of neither 32 nor 256; mm.2's rows fit no block at all.
ODD = VisionShape(n_embd=64, n_ff=270, n_proj=40, n_text=64)
WIDE = VisionShape(n_embd=256, n_ff=300, n_proj=96, n_text=64)  # rows for the K types


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def keys_of(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: (field.types, field.contents()) for key, field in fields.items()}


def values(tensor: gguf.ReaderTensor) -> np.ndarray:
    shape = tuple(reversed(tensor.shape.tolist()))
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


# --- what stands in the file ----------------------------------------------------------------------


@pytest.mark.parametrize("source_type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("layout", ["clip", "siglip"])
@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q4_0"])
def test_vision_tensors_equal_gguf_py(
    tmp_path: Path, name: str, layout: str, source_type: str
) -> None:
    """Every tensor is gguf-py's quantization of the source's values, or better; padded by zeros."""
    source = tiny_gguf.write_mmproj(tmp_path / "in.gguf", ODD, layout=layout, dtype=source_type)
    before = tensors_of(source)
    after = tensors_of(quantize_file(source, tmp_path / "out.gguf", name, n_threads=2))
    assert list(after) == list(before)
    fc1 = "ffn_up" if layout == "clip" else "ffn_down"
    for key, tensor in after.items():
        want = values(before[key])
        if fc1 in key:
            want = np.pad(want, [(0, 242)] + [(0, 0)] * (want.ndim - 1))  # 270 -> 512
        elif "ffn" in key and want.ndim == 2:
            want = np.pad(want, [(0, 0), (0, 242)])
        kind = before[key].tensor_type
        if want.ndim > 1:
            kind = GGMLType.F16 if kind is GGMLType.F32 else kind
            if re.match(r"v\.blk|mm\.0", key):
                kind = GGMLType[name.upper()]
        assert tensor.tensor_type is kind, key
        packed = gguf.quants.quantize(want, kind)
        if kind in (GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0):
            assert np.array_equal(tensor.data.tobytes(), packed.tobytes()), key
        else:  # ours searches for the scales
            plain = np.linalg.norm(gguf.quants.dequantize(packed, kind).reshape(want.shape) - want)
            assert np.linalg.norm(values(tensor) - want) < plain, key


def test_k_types_where_256_divides_a_row(tmp_path: Path) -> None:
    source = tiny_gguf.write_mmproj(tmp_path / "in.gguf", WIDE)
    for name, recipe in RECIPES.items():
        long = recipe.base
        short = {"Q6_K": "Q8_0", "Q5_K": "Q5_0", "Q4_K": "IQ4_NL", "IQ4_XS": "IQ4_NL"}.get(
            long, long
        )
        tensors = tensors_of(quantize_file(source, tmp_path / "out.gguf", name, n_threads=2))
        kinds = {
            "v.blk.0.attn_q.weight": long,  # 256
            "v.blk.1.ffn_up.weight": long,
            "v.blk.1.ffn_down.weight": long,  # 300 -> 512
            "mm.0.weight": long,  # 9 * 256
            "mm.2.weight": short,  # 96
            "v.post_ln.weight": "F32",
            "v.blk.0.ffn_up.bias": "F32",
        }
        if name in ("q4_k_m", "q5_k_m"):  # the projector gets more
            kinds["mm.2.weight"] = "Q8_0"
        if name == "q4_k_m":
            kinds["mm.0.weight"] = "Q5_K"
        assert {key: tensors[key].tensor_type.name for key in kinds} == kinds, name
        width = 300 if name in ("f16", "bf16") else 512
        assert tensors["v.blk.0.ffn_up.bias"].shape.tolist() == [width]


@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_metadata(tmp_path: Path, layout: str) -> None:
    source = tiny_gguf.write_mmproj(tmp_path / "in.gguf", ODD, layout=layout)
    before = keys_of(source)
    after = keys_of(quantize_file(source, tmp_path / "out.gguf", "Q4_K_M"))
    u32 = [gguf.GGUFValueType.UINT32]
    ff = f"{layout}.vision.feed_forward_length"
    changed = {
        "general.file_type": (u32, int(gguf.LlamaFileType.MOSTLY_Q4_K_M)),
        "general.quantization_version": (u32, 2),
        ff: (u32, 512),
        f"{ff}_unpadded": (u32, 270),
        "omnivlm.source_sha256": (
            [gguf.GGUFValueType.STRING],
            hashlib.sha256(source.read_bytes()).hexdigest(),
        ),
    }
    before.pop("general.alignment")  # the source's layout on disk, not the model

    def meaning(keys: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if not key.startswith("GGUF.")}

    assert meaning(after) == meaning(before) | changed


def test_widths_that_need_no_padding_stay(tmp_path: Path) -> None:
    keys = keys_of(quantize_file(DEMO.mmproj, tmp_path / "out.gguf", "q4_0"))
    assert keys["clip.vision.feed_forward_length"][1] == 768
    assert "clip.vision.feed_forward_length_unpadded" not in keys


def test_unused_head_is_left_out(tmp_path: Path) -> None:
    tensors = tiny_gguf.siglip_names(tiny_gguf.random_tensors(ODD))
    keys = tiny_gguf.siglip_keys(ODD)
    tensors["v.head.attention.in_weight"] = np.full((96, 32), np.nan, np.float32)
    source = tiny_gguf.write_gguf(tmp_path / "in.gguf", keys, tensors)
    after = tensors_of(quantize_file(source, tmp_path / "out.gguf", "q8_0"))
    assert tensors.keys() - after.keys() == {"v.head.attention.in_weight"}


def test_text_metadata_and_types(tmp_path: Path) -> None:
    before = keys_of(DEMO.text)
    steps: list[tuple[int, int]] = []
    output = quantize_file(
        DEMO.text, tmp_path / "out.gguf", "q4_k_m", progress=lambda *step: steps.append(step)
    )
    after = keys_of(output)
    assert steps == [(i, 50) for i in range(1, 51)]
    assert after.pop("general.quantization_version")[1] == 2
    assert after.pop("general.file_type")[1] == int(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    source_hash = after.pop("omnivlm.source_sha256")[1]
    assert source_hash == hashlib.sha256(DEMO.text.read_bytes()).hexdigest()
    unchanged = before.keys() - {"general.file_type", "GGUF.kv_count"}
    assert {key: before[key] for key in unchanged} == {key: after[key] for key in unchanged}
    kinds = {name: tensor.tensor_type for name, tensor in tensors_of(output).items()}
    assert kinds == {t.name: t.target for t in plan_file(DEMO.text, "q4_k_m")}
    assert {kind.name for kind in kinds.values()} == {"F32", "Q4_K", "Q8_0"}
    plain = llama_cpp.Llama(
        str(output), n_ctx=64, n_threads=1, verbose=False
    )  # llama.cpp's stock path
    assert plain.create_completion("Describe the image", max_tokens=1)["usage"]["total_tokens"] > 1
    plain.close()


# --- that it runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cosine", "size"),
    # The demo's projector, which q4_k_m gives 5 and 8 bits, is a quarter of its vision file.
    [("q8_0", 0.9995, 0.56), ("q4_k_m", 0.995, 0.35), ("q4_0", 0.99, 0.33)],
)
def test_the_demo_model_still_answers(
    tmp_path: Path, name: str, cosine: float, size: float
) -> None:
    picture = ROOT / "examples" / "horses.png"
    for source in (DEMO.text, DEMO.mmproj):
        output = quantize_file(source, tmp_path / output_name(source, name), name)
        assert output.stat().st_size < size * source.stat().st_size
    with OmniVLM("demo", device="cpu") as exact, OmniVLM(tmp_path, device="cpu") as model:
        want, got = exact.encode(picture).data, model.encode(picture).data
        assert (got * want).sum() >= cosine * np.linalg.norm(got) * np.linalg.norm(want)
        assert "three horses" in model.answer(picture, "Describe the image").text


@pytest.mark.parametrize("layout", ["clip", "siglip"])
@pytest.mark.parametrize("name", RECIPES)
def test_padded_towers_run(tmp_path: Path, name: str, layout: str) -> None:
    source = tiny_gguf.write_mmproj(tmp_path / "in.gguf", WIDE, layout=layout)
    quantize_file(source, tmp_path / "out.gguf", name)
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 3, 42, 42)).astype(np.float32)
    bound = {"f16": 0.9999, "bf16": 0.9999, "q8_0": 0.999}.get(name, 0.98)
    # The CPU's own choice may be int8, which rounds more than a file in 16 bits does.
    for precision, most in (("f32", 1.0), ("auto", 0.999)):
        want, got = (encode(path, pixels, precision) for path in (source, tmp_path / "out.gguf"))
        cosine = (got * want).sum() / (np.linalg.norm(got) * np.linalg.norm(want))
        assert cosine >= min(bound, most)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """Q8_0 weights stand for the same numbers with and without 16 more zero blocks in a row."""
    shape = VisionShape(n_embd=64, n_ff=288, n_proj=64, n_text=64)
    source = tiny_gguf.write_mmproj(tmp_path / "in.gguf", shape)
    padded = quantize_file(source, tmp_path / "padded.gguf", "q8_0")
    # gguf-py's Q8_0 of the same file; 288 is nine blocks, which need no padding.
    keys, tensors = tiny_gguf.clip_keys(shape), tiny_gguf.random_tensors(shape)
    for key in ("v.patch_embd.weight", "v.position_embd.weight"):
        tensors[key] = tensors[key].astype(np.float16)
    plain = tiny_gguf.write_gguf(tmp_path / "plain.gguf", keys, tensors, "q8_0")
    assert keys_of(padded)["clip.vision.feed_forward_length"][1] == 512
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 3, 42, 42)).astype(np.float32)
    np.testing.assert_allclose(encode(padded, pixels), encode(plain, pixels), rtol=0, atol=1e-6)


def encode(path: Path, pixels: np.ndarray, precision: str = "auto") -> np.ndarray:
    from omnivlm_edge import _native

    return _native.VisionEncoder(os.fsencode(path), "CPU", 2, precision).encode(pixels)


def test_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    for source in (DEMO.text, DEMO.mmproj):
        files = [
            quantize_file(source, tmp_path / f"{n}.gguf", "q5_k_m", n_threads=n) for n in (1, 3)
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


def by_the_first_runtime(path: Path, shape: VisionShape, kind: GGMLType) -> Path:
    """What the original's quantizer wrote: every 2-D weight, blocks running on over the rows."""
    values = tiny_gguf.siglip_names(tiny_gguf.random_tensors(shape))
    values["v.head.attention.in_weight"] = np.ones((3 * shape.n_embd, shape.n_embd), np.float32)

    def add_keys(writer: gguf.GGUFWriter) -> None:
        for key, value in tiny_gguf.siglip_keys(shape).items():
            if key != "general.architecture":
                add = writer.add_array if isinstance(value, list) else writer.add_uint32
                add(key, value)

    tensors = []
    for name, data in values.items():
        quantized = data.ndim == 2 and name.endswith("weight")
        packed = gguf.quants.quantize(data.reshape(-1, 32), kind) if quantized else data
        read = partial(np.asarray, packed)
        tensors.append(OutTensor(name, data.shape, kind if quantized else GGMLType.F32, read))
    list(write_gguf(OutFile(path, "siglip", add_keys, tensors), path))
    return path


@pytest.mark.parametrize("kind", [GGMLType.Q8_0, GGMLType.Q4_0], ids=lambda kind: kind.name)
def test_files_of_the_first_runtime(tmp_path: Path, kind: GGMLType) -> None:
    """Loaded where their rows are whole blocks; the real tower's MLPs are 4304 wide: not."""
    whole = VisionShape(n_embd=64, n_ff=288, n_proj=64, n_text=256)
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 3, 42, 42)).astype(np.float32)
    exact = tiny_gguf.write_mmproj(tmp_path / "f32.gguf", whole, layout="siglip")
    old = by_the_first_runtime(tmp_path / "whole.gguf", whole, kind)
    want, got = encode(exact, pixels), encode(old, pixels)
    assert (got * want).sum() >= 0.97 * np.linalg.norm(got) * np.linalg.norm(want)
    allowed = QuantizeOptions(allow_requantize=True)
    halved = quantize_file(old, tmp_path / "half.gguf", "f16", allowed)
    np.testing.assert_allclose(encode(halved, pixels), got, atol=0.05 * np.abs(got).max())

    broken = replace(whole, n_ff=272)
    source = by_the_first_runtime(tmp_path / "projector.gguf", broken, kind)
    told = r"projector\.gguf: cannot be read.*tensor '?v\.blk\.0\.ffn_up\.weight'? .*272 .*F16"
    with pytest.raises(ModelFileError, match=told):
        OmniVLM("demo", source, device="cpu")
    with pytest.raises(ModelFileError, match=told):
        quantize_file(source, tmp_path / "out.gguf", "q4_0", allowed)
    with pytest.raises(ModelFileError, match=told):
        convert_mmproj(source, tmp_path / "out")


# --- what is asked for beyond a recipe --------------------------------------------------------


def kinds_of(path: Path) -> dict[str, str]:
    return {name: tensor.tensor_type.name for name, tensor in tensors_of(path).items()}


def test_tensor_types(tmp_path: Path) -> None:
    """The first rule that is found in a name counts, before the recipe; rows it cannot have fall
    back as the recipe's do."""
    rules = ((r"blk\.1\..*attn_q", "Q8_0"), ("attn_[qk]", "f16"), (r"mm\.2", "q6_k"))
    options = QuantizeOptions(rules)
    source = tiny_gguf.write_mmproj(tmp_path / "in.gguf", WIDE)
    vision = kinds_of(quantize_file(source, tmp_path / "vision.gguf", "q4_0", options))
    assert vision["v.blk.1.attn_q.weight"] == "Q8_0"
    assert vision["v.blk.0.attn_q.weight"] == vision["v.blk.1.attn_k.weight"] == "F16"
    assert vision["mm.2.weight"] == "Q8_0"  # 96 is no multiple of 256
    assert vision["mm.0.weight"] == vision["v.blk.1.attn_v.weight"] == "Q4_0"
    text = kinds_of(quantize_file(DEMO.text, tmp_path / "text.gguf", "q4_0", options))
    assert text["blk.1.attn_q.weight"] == "Q8_0"
    assert text["blk.0.attn_q.weight"] == text["blk.3.attn_k.weight"] == "F16"
    assert text["blk.3.attn_v.weight"] == text["token_embd.weight"] == "Q4_0"


def test_types_of_embeddings_and_output(tmp_path: Path) -> None:
    for options in (QuantizeOptions(embedding_type="q6_k"), QuantizeOptions(output_type="Q6_K")):
        kinds = kinds_of(quantize_file(DEMO.text, tmp_path / "out.gguf", "q4_0", options))
        assert kinds["token_embd.weight"] == "Q6_K"  # which is the output as well
        assert set(kinds.values()) == {"F32", "Q4_0", "Q6_K"}
    apart = QuantizeOptions(embedding_type="q8_0", output_type="q6_k")
    with pytest.raises(OptionError, match="is its output as well|are its output as well"):
        plan_file(DEMO.text, "q4_0", apart)
    assert plan_file(DEMO.mmproj, "q4_0", apart) == plan_file(DEMO.mmproj, "q4_0")


def test_requantize_when_allowed(source: Path, tmp_path: Path) -> None:
    q8 = quantize_file(source, tmp_path / "q8.gguf", "q8_0")
    allowed = QuantizeOptions(allow_requantize=True)
    kinds = kinds_of(quantize_file(q8, tmp_path / "q4.gguf", "q4_0", allowed))
    assert set(kinds.values()) - {"F32", "F16"} == {"Q4_0"}
    back = quantize_file(q8, tmp_path / "f16.gguf", "f16", allowed)
    assert set(kinds_of(back).values()) <= {"F32", "F16"}
    small = kinds_of(quantize_file(q8, tmp_path / "again.gguf", "q8_0", allowed))
    assert small == kinds_of(q8)


def test_float_mlps_are_not_padded(tmp_path: Path) -> None:
    source = tiny_gguf.write_mmproj(tmp_path / "in.gguf", ODD)
    keep = QuantizeOptions((("ffn_down", "f16"),))
    output = quantize_file(source, tmp_path / "out.gguf", "q8_0", keep)
    assert keys_of(output)["clip.vision.feed_forward_length"][1] == ODD.n_ff
    assert kinds_of(output)["v.blk.0.ffn_up.weight"] == "Q8_0"


@pytest.mark.parametrize("name", RECIPES)
def test_plans_say_what_is_written(tmp_path: Path, name: str) -> None:
    vision = tiny_gguf.write_mmproj(tmp_path / "in.gguf", ODD, layout="siglip")
    for source in (DEMO.text, vision):
        plan = plan_file(source, name)
        tensors = tensors_of(quantize_file(source, tmp_path / "out.gguf", name))
        for planned in plan:
            tensor = tensors.pop(planned.name)
            assert planned.shape == tuple(reversed(tensor.shape.tolist()))
            assert planned.target is tensor.tensor_type
            assert planned.nbytes == tensor.n_bytes
        assert not tensors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_types": (("attn", "q9"),)}, "tensor type 'q9' is unknown: .* q8_0"),
        ({"tensor_types": (("attn(", "q8_0"),)}, r"'attn\(' is no regular expression"),
        ({"embedding_type": "q4_k_m"}, "tensor type 'q4_k_m' is unknown"),
        ({"output_type": ""}, "tensor type '' is unknown"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantizeOptions(**options)


# --- importance matrices --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imatrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("imatrix"), np.random.default_rng(0)
    pictures = [folder / f"{number}.png" for number in range(16)]
    for picture in pictures:
        scenes.render(scenes.sample_scene(rng, "train"), 126, "noto").save(picture)
    path = folder / "demo-imatrix.gguf"
    collect(DEMO, pictures, datasets=["scenes"], n_threads=1).write(path)
    return path


def test_importance_lowers_the_error_at_equal_size(tmp_path: Path, imatrix: Path) -> None:
    builds = []
    for name, options in (("plain", QuantizeOptions()), ("led", QuantizeOptions(imatrix=imatrix))):
        text, mmproj = (
            quantize_file(file, tmp_path / f"{name}-{file.name}", "q4_k_s", options, n_threads=1)
            for file in (DEMO.text, DEMO.mmproj)
        )
        builds.append(ModelFiles(text, mmproj))
        keys = keys_of(mmproj) | keys_of(text)
        assert ("quantize.imatrix.file" in keys) == (name == "led")
    assert keys["quantize.imatrix.file"][1] == "demo-imatrix.gguf"
    assert keys["quantize.imatrix.dataset"][1] == "scenes"
    assert keys["quantize.imatrix.chunks_count"][1] == 3 * 16
    other = ROOT / "examples" / "shopping.png"  # not one that it was made from
    _, plain, led = compare_models(DEMO, builds, [other], device="cpu", n_threads=1)
    assert plain.vision and led.vision
    assert plain.vision_bytes == pytest.approx(led.vision_bytes, rel=1e-3)
    assert led.vision.error < 0.95 * plain.vision.error


def test_importance_of_padded_rows(tmp_path: Path) -> None:
    source = tiny_gguf.write_mmproj(tmp_path / "in.gguf", ODD, dtype="f32")
    squares = np.linspace(0, 2, ODD.n_ff, dtype=np.float32)
    inputs = {"v.blk.0.ffn_down.weight": Inputs(squares, 2)}
    Imatrix(inputs, ("x",), 1, 512).write(tmp_path / "imatrix.gguf")
    plain = quantize_file(source, tmp_path / "plain.gguf", "q4_0")
    options = QuantizeOptions(imatrix=tmp_path / "imatrix.gguf")
    led = quantize_file(source, tmp_path / "led.gguf", "q4_0", options)
    want = values(tensors_of(source)["v.blk.0.ffn_down.weight"])
    errors = [
        (
            squares
            * (values(tensors_of(path)["v.blk.0.ffn_down.weight"])[:, : ODD.n_ff] - want) ** 2
        ).sum()
        for path in (led, plain)
    ]
    assert errors[0] < errors[1]
    notes = {t.name: t.note for t in plan_file(source, "q4_0", options)}
    assert notes["v.blk.0.ffn_down.weight"] == ""
    assert notes["v.blk.1.ffn_down.weight"] == "not in the imatrix"


def test_imatrix_of_another_model(tmp_path: Path, imatrix: Path) -> None:
    (tmp_path / "in").mkdir()
    source = tiny_gguf.write_mmproj(tmp_path / "in" / "in.gguf", ODD)
    options = QuantizeOptions(imatrix=imatrix)
    with pytest.raises(ModelFileError, match=r"demo-imatrix\.gguf: belongs to another model"):
        quantize_file(source, tmp_path / "out.gguf", "q4_0", options)
    assert not (tmp_path / "out.gguf").exists()
    result = run(source, tmp_path, "--q4_0", "--imatrix", DEMO.text)
    assert result.returncode == 1
    assert "is no importance matrix" in result.stderr


def test_command_tells_of_matrices_without_importance(tmp_path: Path) -> None:
    inputs = {"blk.0.attn_q.weight": Inputs(np.ones(256, np.float32), 1)}  # as llama.cpp's own
    Imatrix(inputs, ("wiki",), 1, 512).write(tmp_path / "text-imatrix.gguf")
    result = run("demo", tmp_path, "--q4_0", "--imatrix", tmp_path / "text-imatrix.gguf")
    assert result.returncode == 0
    assert re.search(r"says nothing of \d+ matrices; their columns count alike", result.stderr)


# --- what is wrong --------------------------------------------------------------------------------


@pytest.fixture(params=["text", "vision"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one of the demo model's files, alone in its directory."""
    file = DEMO.text if request.param == "text" else DEMO.mmproj
    (tmp_path / "in").mkdir()
    return Path(shutil.copy(file, tmp_path / "in" / "model-F16.gguf"))


def refusal(source: Path, output: Path, error: type[BaseException], name: str = "q4_0") -> str:
    """What is said when the call fails; the source stays as it was, nothing else comes to be."""
    content = source.read_bytes()
    files = sorted(source.parents[1].rglob("*"))
    with pytest.raises(error) as caught:
        quantize_file(source, output, name, n_threads=1)
    assert source.read_bytes() == content
    assert sorted(source.parents[1].rglob("*")) == files
    if issubclass(error, OmniVLMError):
        assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_type(source: Path, tmp_path: Path) -> None:
    said = refusal(source, tmp_path / "out.gguf", OptionError, "q9_z")
    assert re.search("'q9_z' is unknown: .* q4_k_m", said)


def test_wrong_thread_count(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="n_threads is 0"):
        quantize_file(source, tmp_path / "out.gguf", "q8_0", n_threads=0)


def test_quantized_source(source: Path, tmp_path: Path) -> None:
    small = quantize_file(source, source.parent / "small.gguf", "q8_0")
    said = refusal(small, tmp_path / "out.gguf", ModelFileError)
    assert "small.gguf: is quantized already" in said


@pytest.mark.parametrize("link", [os.symlink, os.link, None], ids=["symlink", "hardlink", "same"])
def test_output_is_the_source(source: Path, link: Callable[[Path, Path], None] | None) -> None:
    output = source.parent / ".." / "in" / source.name
    if link:
        output = source.parent / "link.gguf"
        link(source, output)
    said = refusal(source, output, ConvertError)
    assert "is the input itself" in said


def test_cut_source(source: Path, tmp_path: Path) -> None:
    for size in (0, 3, 500, -200):
        source.write_bytes(source.read_bytes()[:size])
        said = refusal(source, tmp_path / "out.gguf", ModelFileError)
        assert "model-F16.gguf: " in said


def test_cut_source_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """By --dry-run too, and before the sound half of the model is quantized."""
    (tmp_path / "in").mkdir()
    shutil.copy(DEMO.text, tmp_path / "in" / "demo-F16.gguf")
    cut = tmp_path / "in" / "mmproj-demo-F16.gguf"
    cut.write_bytes(DEMO.mmproj.read_bytes()[:-200])
    for options in ([], ["--dry-run"]):
        result = run(tmp_path / "in", tmp_path / "out", "--q8_0", *options)
        assert result.returncode == 1
        told = r"Error: .*/mmproj-demo-F16\.gguf: tensor \S+ reaches beyond the end .*\n"
        assert re.fullmatch(told, result.stderr)
        assert result.stdout == ""
        assert not (tmp_path / "out").exists()


def test_absent_source(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="there is no such file"):
        quantize_file(tmp_path / "none.gguf", tmp_path / "out.gguf", "q8_0")


def test_values_that_cannot_be_quantized(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for value in (np.nan, np.inf, 1e9):
        tensors = tiny_gguf.random_tensors(ODD)
        tensors["v.blk.1.attn_k.weight"][3, 5] = value
        keys = tiny_gguf.clip_keys(ODD)
        source = tiny_gguf.write_gguf(tmp_path / "in" / "in.gguf", keys, tensors)
        said = refusal(source, tmp_path / "out.gguf", ModelFileError)
        assert "v.blk.1.attn_k.weight holds a value" in said


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("clip.projector_type", "idefics3", "belongs to another model"),
        ("clip.vision.feed_forward_length", 271, "v.blk.0.ffn_up.weight has shape"),
    ],
)
def test_vision_file_of_another_model(tmp_path: Path, key: str, value: Any, message: str) -> None:
    (tmp_path / "in").mkdir()
    keys = tiny_gguf.clip_keys(ODD) | {key: value}
    source = tiny_gguf.write_gguf(tmp_path / "in" / "in.gguf", keys, tiny_gguf.random_tensors(ODD))
    said = refusal(source, tmp_path / "out.gguf", ModelFileError)
    assert message in said


def rewrite_text(path: Path, architecture: str = "qwen2", *, scale: float = 1) -> Path:
    """The demo's text model with another architecture's name, or one tensor scaled."""
    reader = gguf.GGUFReader(DEMO.text)
    writer = gguf.GGUFWriter(path, architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            key = key.replace("qwen2.", f"{architecture}.")
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        factor = scale if tensor.name == "blk.1.ffn_up.weight" else 1
        writer.add_tensor(tensor.name, tensor.data * tensor.data.dtype.type(factor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_text_model_of_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = rewrite_text(tmp_path / "in" / "in.gguf", "qwen99")
    said = refusal(source, tmp_path / "out.gguf", ModelFileError)
    assert "unknown model architecture: 'qwen99'" in said


def test_text_model_with_values_that_are_no_numbers(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = rewrite_text(tmp_path / "in" / "in.gguf", scale=float("nan"))
    said = refusal(source, tmp_path / "out.gguf", ModelFileError)
    assert "in.gguf: llama.cpp cannot quantize" in said


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os.abort()", "status -6"),
        ("sys.exit('quant.cpp:7: GGML_ASSERT(n > 0) failed')", r"\(GGML_ASSERT\(n > 0\) failed\)"),
    ],
)
def test_llama_cpp_may_abort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, reason: str
) -> None:
    monkeypatch.setattr(quantize_text, "_CHILD", f"import os, sys; {end}  # {{}}")
    with pytest.raises(ModelFileError, match=reason):
        quantize_file(DEMO.text, tmp_path / "out.gguf", "q4_0")
    assert not list(tmp_path.iterdir())


def test_full_disk_is_seen_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    said = refusal(source, tmp_path / "out.gguf", ConvertError)
    assert "has 0 MB free, but the result needs" in said


def test_directory_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    said = refusal(source, source / "out.gguf", ConvertError)
    assert "cannot be made a directory" in said


def test_disk_that_fills_up(source: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, str(source), str(tmp_path / "out"), "--q4_0"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert result.returncode == 1
    assert re.fullmatch(r"Error: .*out cannot be written to: .*\n", result.stderr)
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupted(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total // 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        quantize_file(source, tmp_path / "out.gguf", "q4_k_m", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_quantizing_process_ends_with_one_that_was_killed(tmp_path: Path) -> None:
    part = tmp_path / ".out.gguf.part"
    part.write_text("begun")
    child = f"from omnivlm_edge.quantize.llama import end_with; end_with({{}}, {os.fsencode(part)})"
    parent = (
        "import os, signal, subprocess, sys; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}.format(os.getpid())]); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    # The pipe closes when the child has ended, too.
    subprocess.run([sys.executable, "-c", parent], stdout=subprocess.PIPE, timeout=60)
    assert not part.exists()


def test_a_failure_leaves_the_older_result(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_text("older")
    source.write_bytes(source.read_bytes()[:-200])
    said = refusal(source, output, ModelFileError)
    assert "model-F16.gguf" in said
    assert output.read_text() == "older"


def test_damaged_bytes_never_crash(tmp_path: Path) -> None:
    """One process for all: a crash would end it."""
    source = tiny_gguf.write_mmproj(tmp_path / "in.gguf", VisionShape(n_layer=1), dtype="f16")
    valid, rng = source.read_bytes(), np.random.default_rng(3)
    header = gguf.GGUFReader(source).data_offset
    outcomes = {"done": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(valid)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(header if rng.random() < 0.9 else len(data))] = rng.integers(256)
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(data)
        try:
            quantize_file(damaged, tmp_path / "out.gguf", "q4_0", n_threads=1)
            outcomes["done"] += 1
        except OmniVLMError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize("name", [b"\xff\xfe'.gguf", "日本 {x}\n.gguf".encode()])
def test_odd_file_names(source: Path, tmp_path: Path, name: bytes) -> None:
    odd = source.rename(tmp_path / os.fsdecode(name))
    output = quantize_file(odd, tmp_path / os.fsdecode(b"out" + name), "q4_0")
    assert output.stat().st_size < odd.stat().st_size


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "type_name", "want"),
    [
        ("text", "demo-F16.gguf", "q4_k_m", "demo-Q4_K_M.gguf"),
        ("text", "llm.bf16.gguf", "fp16", "llm-F16.gguf"),
        ("text", "Nano-Vlm-Processor-494M-F16.gguf", "q8_0", "Nano-Vlm-Processor-494M-Q8_0.gguf"),
        ("vision", "mmproj-demo-F16.gguf", "Q8_0", "mmproj-demo-Q8_0.gguf"),
        ("vision", "photo-mmproj-f32.gguf", "iq4_nl", "mmproj-photo-IQ4_NL.gguf"),
        ("vision", "projector-fp16.gguf", "q4_0", "mmproj-projector-Q4_0.gguf"),
        ("vision", "mmproj.gguf", "q4_0", "mmproj-Q4_0.gguf"),
    ],
)
def test_output_names(tmp_path: Path, kind: str, name: str, type_name: str, want: str) -> None:
    source = tmp_path / name
    source.symlink_to(DEMO.text if kind == "text" else DEMO.mmproj)
    assert output_name(source, type_name) == want


def test_command_on_a_directory(tmp_path: Path, tiny_model: Path) -> None:
    result = run(tiny_model, tmp_path / "small", "--q8_0", "-t", 1)
    assert result.returncode == 0
    files = [Path(line) for line in result.stdout.splitlines()]
    assert sorted(files) == sorted((tmp_path / "small").iterdir())
    assert re.fullmatch(r"\d+\.\d MB -> \d+\.\d MB\n", result.stderr)
    found = find_model(tmp_path / "small")
    assert files == [found.text, found.mmproj]
    assert found.mmproj.name.startswith("mmproj-")


def test_command_on_one_file_writes_beside_it(source: Path) -> None:
    result = run(source, "--type", "Q4_0")
    assert result.returncode == 0
    (written,) = (Path(line) for line in result.stdout.splitlines())
    assert {written, source} == set(source.parent.iterdir())
    assert written.name in ("model-Q4_0.gguf", "mmproj-model-Q4_0.gguf")


def test_command_on_the_demo_writes_into_the_current_directory(tmp_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "demo", "--q4_k_m"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout == "demo-Q4_K_M.gguf\nmmproj-demo-Q4_K_M.gguf\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_dry_run_prints_every_tensor_and_writes_nothing(tmp_path: Path, tiny_model: Path) -> None:
    result = run(tiny_model, tmp_path / "small", "--q4_k_m", "--dry-run")
    assert result.returncode == 0
    assert not (tmp_path / "small").exists()
    files = find_model(tiny_model)
    names = [name for file in (files.text, files.mmproj) for name in tensors_of(file)]
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(" ")] == names
    outputs = [Path(line) for line in lines if not line.startswith(" ")]
    assert [path.parent for path in outputs] == [tmp_path / "small"] * 2
    assert run(tiny_model, tmp_path / "small", "--q4_k_m").stdout == "".join(
        f"{path}\n" for path in outputs
    )
    written = {name: t for path in outputs for name, t in tensors_of(path).items()}
    for line in lines:
        if line.startswith(" "):
            name, shape, _, kind, nbytes, note = re.fullmatch(
                r"  (\S+) +([\dx ]+\d) +(\S+) -> (\S+) +([\d,]+)(.*)", line
            ).groups()  # type: ignore[union-attr]
            assert [int(n) for n in shape.split(" x ")] == written[name].shape.tolist()[::-1]
            assert kind == written[name].tensor_type.name
            assert int(nbytes.replace(",", "")) == written[name].n_bytes
            assert not note or re.fullmatch(r"  not \w+: \d+ is no multiple of \d+", note)
    assert any("not Q4_K: " in line for line in lines)


def test_command_with_a_type_for_each_file(tmp_path: Path) -> None:
    options = ["--vision-type", "q8_0", "--text-type", "q4_0", "--embedding-type", "q8_0"]
    result = run("demo", tmp_path, *options, "--tensor-type", r"blk\.0\.attn_q=f16")
    assert result.returncode == 0
    text, vision = (Path(line) for line in result.stdout.splitlines())
    assert (text.name, vision.name) == ("demo-Q4_0.gguf", "mmproj-demo-Q8_0.gguf")
    kinds = kinds_of(text)
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.0.attn_q.weight"] == kinds_of(vision)["v.blk.0.attn_q.weight"] == "F16"


def test_report(tmp_path: Path) -> None:
    result = run("demo", tmp_path, "--q8_0", "--report", "-t", 1)
    assert result.returncode == 0, result.stderr
    *paths, head, reference, loss, conditions = result.stdout.splitlines()
    assert len(paths) == 2
    assert head.split()[:3] == ["model", "MB", "cosine"]
    assert reference.split() == ["demo-F16", "16.5"]
    assert loss.split()[:2] == ["demo-Q8_0", "9.0"]
    assert float(loss.split()[2]) > 0.9995
    assert conditions.startswith("Over 8 made pictures")


def test_report_of_a_vision_file_alone(tmp_path: Path) -> None:
    source = Path(shutil.copy(DEMO.mmproj, tmp_path / "mmproj-x-F16.gguf"))
    result = run(source, "--q4_0", "--report", "-t", 1)
    assert result.returncode == 0, result.stderr
    assert "comparing vision alone" in result.stderr
    assert "mmproj-x-Q4_0" in result.stdout
    assert "KL" not in result.stdout


FAILURES = {
    "no type": (["demo"], 2, "name one type"),
    "two types": (["demo", "--q8_0", "--q4_0"], 2, "name one type"),
    "a flag and a name": (["demo", "--q8_0", "--type", "q8_0"], 2, "name one type"),
    "a type for one of two files": (["demo", "--vision-type", "q8_0"], 2, "name one type"),
    "unknown file type": (["demo", "--q8_0", "--text-type", "q"], 2, "'q' is unknown"),
    "unknown tensor type": (["demo", "--q8_0", "--tensor-type", "v=q"], 2, "'q' is unknown"),
    "rule without type": (["demo", "--q8_0", "--tensor-type", "v"], 2, "is not REGEX=TYPE"),
    "rule for nothing": (["demo", "--q8_0", "--tensor-type", "x9=f16"], 2, "found in no matrix"),
    "unknown flag": (["demo", "--q9_0"], 2, "No such option"),
    "unknown name": (["demo", "--type", "q9_0"], 2, "'q9_0' is unknown"),
    "no model": (["none", "--q8_0"], 1, "'none': there is no such file"),
    "not GGUF": (["{text}", "--q8_0"], 1, "not a GGUF file"),
    "out is a file": (["demo", "{text}", "--q8_0"], 2, "is a file"),
    "out is no directory's name": (["demo", "o.gguf", "--q8_0"], 2, "would be a directory"),
    "no threads": (["demo", "--q8_0", "-t", "0"], 2, "not in the range"),
    "too many threads": (["demo", "--q8_0", "-t", "513"], 2, "not in the range"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), FAILURES.values(), ids=FAILURES)
def test_command_failures(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    result = run(*(argument.format(text=text) for argument in arguments))
    assert result.returncode == code
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
