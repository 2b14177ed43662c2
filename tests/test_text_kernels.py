"""The text model by our kernels, against llama.cpp's own."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from command import run
from omnivlm_edge import GenerateOptions, _native, quantize_file
from omnivlm_edge.convert import convert_checkpoint
from omnivlm_edge.decoder import TextDecoder
from omnivlm_edge.device import select_device
from omnivlm_edge.models import find_model
from tiny_checkpoint import Dims, write_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
# Rows of 256 values, so that K-quants can have them; a head of 336 columns, 21 panels.
DIMS = Dims(text_hidden=256, text_heads=8, text_kv_heads=4, text_ffn=512, vocab=336)
PROMPT = list(range(40, 117))  # more rows than the kernels take at a time
RECIPES = ("q4_0", "iq4_nl", "q4_k_m", "q8_0")


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wide")
    write_checkpoint(directory / "checkpoint", dims=DIMS)
    convert_checkpoint(directory / "checkpoint", directory / "model", "f32")
    (path,) = (p for p in (directory / "model").glob("*.gguf") if "mmproj" not in p.name)
    return path


@pytest.fixture(scope="module", params=RECIPES)
def model(
    request: pytest.FixtureRequest, float_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("small") / f"{request.param}.gguf"
    quantize_file(float_model, path, request.param)
    return path


def logits(path: Path, *, low_memory: bool = False) -> npt.NDArray[np.float32]:
    """Behind a prompt, then behind three tokens more: [4, n_vocab]."""
    decoder = TextDecoder(path, select_device("cpu"), n_ctx=256, n_threads=2, low_memory=low_memory)
    sequence = decoder.open(GenerateOptions())
    decoder.prefill(sequence, [PROMPT])
    found = [decoder.logits(sequence)]
    for token in (50, 60, 70):
        sequence.last_token = token
        decoder.decode([sequence])
        found.append(decoder.logits(sequence))
    decoder.close()
    return np.stack(found)


def error(found: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_they_fit_the_ggml_that_is_installed() -> None:
    instructions = {"avx512-vnni", "avx-vnni", "neon-i8mm", "neon-dotprod"}
    assert _native.install_text_kernels() == (_native.kernels()[0] in instructions)


def test_they_are_used_where_there_are_any(model: Path) -> None:
    _native.take_log_placement()
    ours = logits(model)
    has_kernels = _native.install_text_kernels()
    placement = _native.take_log_placement()
    assert ("CPU_OMNIVLM" in placement) == has_kernels
    # Without ours, llama.cpp repacks what it has kernels of its own for (on AVX2 not Q8_0).
    repacked = has_kernels or "CPU_REPACK" in placement
    assert (error(ours, logits(model, low_memory=True)) > 0) == repacked


def write_dequantized(source: Path, path: Path) -> None:
    """The same model with the same weights, in F32: by gguf's own arithmetic."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "qwen2")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_they_are_as_exact_as_llama_cpp(model: Path, tmp_path: Path) -> None:
    # Both round the activations to 8 bits, of 32 or 256 values at a time.
    write_dequantized(model, tmp_path / "exact.gguf")
    exact = logits(tmp_path / "exact.gguf")
    assert error(logits(model), exact) < 1.2 * error(logits(model, low_memory=True), exact)


@pytest.mark.parametrize("recipe", ["q5_k_m", "q6_k"])
def test_a_long_prompt_of_other_types_is_answered(recipe: str, tmp_path: Path) -> None:
    """Of which ggml's own code for AMX makes an illegal instruction, compiled by GCC 12."""
    demo = find_model("demo")
    for path in (demo.text, demo.mmproj):
        quantize_file(path, tmp_path / path.name, recipe)
    question = "Describe the image in detail, and tell me all about this picture."
    result = run("run", tmp_path, "-i", EXAMPLES / "horses.png", "-p", question, "--device", "cpu")
    assert "three horses" in result.stdout


def test_they_stay_away_from_other_types(float_model: Path) -> None:
    assert error(logits(float_model), logits(float_model, low_memory=True)) == 0
