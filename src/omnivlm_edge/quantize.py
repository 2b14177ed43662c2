"""A smaller file of either kind: source GGUF -> the same model with its matrices quantized.

    text model   -> llama.cpp's own quantizer, in a process of its own
    vision file  -> gguf-py reads and writes, tensor by tensor; _native.quantize does the arithmetic

A block's MLP gets as many zero units as make its inner width (4304) a multiple of 256, so that its
rows can be quantized at all. That changes nothing: such a unit adds gelu(0) · 0 = 0.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGUFReader, GGUFWriter, LlamaFileType, quants
from gguf import GGMLQuantizationType as GGMLType
from gguf.gguf_reader import ReaderTensor

from . import _native
from .convert.mmproj import open_gguf, read_tensor, row_major_shape
from .convert.output import OutFile, OutTensor, publishing, write_gguf
from .device import check_threads, select_device
from .errors import ModelFileError
from .model_file import inspect_file
from .recipes import RECIPES, recipe_name
from .vision import Vision

Progress: TypeAlias = "Callable[[int, int], None]"  # tensors done, tensors in all

_FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
_MATRIX = re.compile(r"(v\.blk\.\d+\.\w+|mm\.\d+)\.weight")
_UNUSED = "v.head."  # SigLIP's pooling head in published files, which nothing reads
_WIDTH_MULTIPLE = 256  # a K type's block, the longest of all
_SLICE = 1 << 22  # weights quantized between two looks at Ctrl-C
_OWN_KEYS = [
    f"general.{key}" for key in ("architecture", "alignment", "file_type", "quantization_version")
]


def quantize_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    type_name: str,
    *,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the model file `source` as `output`, its matrices in the types of a recipe.

    `type_name` is a name from `recipes.RECIPES`. What `source` is, a text model or a vision file,
    is read from it. `output` appears when it is complete, or not at all.

    Raises OptionError for an unknown name, ModelFileError when `source` is damaged, of another
    kind or quantized already, ConvertError when `output` cannot be written or is `source` itself.
    """
    source, output = Path(source), Path(output)
    name = recipe_name(type_name)
    n_threads = check_threads(n_threads)
    progress = progress or (lambda done, total: None)
    if _is_vision(source):
        _quantize_vision(source, output, name, n_threads, progress)
    else:
        _quantize_text(source, output, name, n_threads, progress)
    return output


def output_name(source: Path, type_name: str) -> str:
    """What `source` is called when it is quantized, by convention.

    photo-F16.gguf -> photo-Q8_0.gguf, and its vision file -> mmproj-photo-Q8_0.gguf.
    """
    stem = re.sub(r"[-.](f32|b?f16|fp32|fp16)$", "", source.stem, flags=re.IGNORECASE)
    parts = stem.split("-")
    if _is_vision(source):
        parts = ["mmproj", *(part for part in parts if part.lower() != "mmproj")]
    return "-".join([*parts, recipe_name(type_name).upper()]) + ".gguf"


def _is_vision(source: Path) -> bool:
    return inspect_file(source).kind == "vision"


def _file_type(name: str) -> LlamaFileType:
    return LlamaFileType[f"MOSTLY_{name.upper()}"]


def _quantized_already(source: Path) -> ModelFileError:
    return ModelFileError(f"{source}: is quantized already; quantize the F16 or F32 file instead")


# ---- the text model -----------------------------------------------------------------------------


# Paths travel as escaped text: not every file name is text that a command line can carry.
_CHILD = """import sys
sys.path[:] = {!a}
from omnivlm_edge.decoder import quantize_text
sys.exit(quantize_text{!a})
"""


def _quantize_text(
    source: Path, output: Path, name: str, n_threads: int, progress: Progress
) -> None:
    """In a child process, because llama.cpp's quantizer cannot be interrupted and may abort."""
    if _native.inspect_text_file(os.fsencode(source)).quantized:
        raise _quantized_already(source)
    nbytes = source.stat().st_size
    if GGMLType[RECIPES[name][0]] not in _FLOATS:
        nbytes = nbytes * 9 // 16  # Q8_0, the largest, has 8.5 bits where F16 has 16
    with publishing([output], nbytes, [source]) as (part,):
        arguments = str(source), str(part), int(_file_type(name)), n_threads
        reason = _run_quantizer(_CHILD.format(sys.path, arguments), progress)
        if "iostream error" in reason:  # all that llama.cpp says of it
            raise OSError("the disk is full or failed")
        if reason:
            raise ModelFileError(f"{source}: llama.cpp cannot quantize this text model ({reason})")


def _run_quantizer(code: str, progress: Progress) -> str:
    """Runs `code` in a child and follows llama.cpp's log; the reason of a failure, or nothing."""
    line = ""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    ) as child:
        try:
            for line in child.stderr or ():
                if step := re.match(r"\[ *(\d+)/ *(\d+)\]", line):
                    progress(int(step[1]), int(step[2]))
        except BaseException:
            child.kill()
            raise
    if child.returncode == 0:
        return ""
    told = re.search(r"(?<=failed to quantize: ).*|GGML_ASSERT.*", line)
    return told[0] if told else f"it ended with status {child.returncode}"


# ---- the vision file ----------------------------------------------------------------------------


def _quantize_vision(
    source: Path, output: Path, name: str, n_threads: int, progress: Progress
) -> None:
    Vision(source, select_device("cpu"), n_threads)  # checks every key and shape
    reader = open_gguf(source)
    architecture = reader.fields["general.architecture"].contents()
    ff_key = f"{architecture}.vision.feed_forward_length"
    ff_old = ff_new = reader.fields[ff_key].contents()
    recipe = [GGMLType[type_name] for type_name in RECIPES[name]]
    if recipe[0] not in _FLOATS:
        ff_new += -ff_old % _WIDTH_MULTIPLE

    def add_keys(writer: GGUFWriter) -> None:
        writer.add_file_type(_file_type(name))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_uint32(ff_key, ff_new)
        if ff_new != ff_old:
            writer.add_uint32(f"{ff_key}_unpadded", ff_old)
        _copy_keys(reader, writer, leave={*_OWN_KEYS, ff_key})

    tensors = []
    for tensor in reader.tensors:
        if not tensor.name.startswith(_UNUSED):
            shape = _padded_shape(tensor, architecture, ff_new)
            target = _target_type(source, tensor, shape, recipe)
            read = partial(_read_as, source, tensor, shape, target, n_threads)
            tensors.append(OutTensor(tensor.name, shape, target, read))
    file = OutFile(output, architecture, add_keys, tensors)
    with publishing([output], file.nbytes, [source]) as (part,):
        for done, _ in enumerate(write_gguf(file, part), 1):
            progress(done, len(tensors))


def _copy_keys(reader: GGUFReader, writer: GGUFWriter, leave: set[str]) -> None:
    for key, field in reader.fields.items():
        value = field.contents()
        # "GGUF." is how gguf-py names the file's header; it can read empty lists, not write them.
        if key not in leave and not key.startswith("GGUF.") and value != []:
            writer.add_key_value(key, value, field.types[0], field.types[-1])


def _padded_shape(tensor: ReaderTensor, architecture: str, ff: int) -> tuple[int, ...]:
    shape = row_major_shape(tensor)
    fc1, fc2 = "ffn_up", "ffn_down"
    if architecture == "siglip":  # the published converter swapped the names
        fc1, fc2 = fc2, fc1
    if re.fullmatch(rf"v\.blk\.\d+\.{fc1}\.(weight|bias)", tensor.name):
        return (ff, *shape[1:])
    if re.fullmatch(rf"v\.blk\.\d+\.{fc2}\.weight", tensor.name):
        return (shape[0], ff)
    return shape


def _target_type(
    source: Path, tensor: ReaderTensor, shape: tuple[int, ...], recipe: list[GGMLType]
) -> GGMLType:
    """Matrices as the recipe says, other tensors at most halved, vectors as they are."""
    if len(shape) == 2 and _MATRIX.fullmatch(tensor.name):
        if tensor.tensor_type not in _FLOATS:
            raise _quantized_already(source)
        for target in recipe:
            if shape[-1] % GGML_QUANT_SIZES[target][0] == 0:
                return target
    if tensor.tensor_type is GGMLType.F32 and len(shape) > 1:
        return GGMLType.F16
    return tensor.tensor_type


def _read_as(
    source: Path, tensor: ReaderTensor, shape: tuple[int, ...], target: GGMLType, n_threads: int
) -> npt.NDArray[Any]:
    """The tensor's bytes in the type `target`, with zeros appended up to `shape`."""
    raw = read_tensor(source, tensor)
    old = row_major_shape(tensor)
    if old != shape:  # zero bytes are 0.0 in every float type
        rows = raw.reshape(prod(old[:-1]), -1)
        size = rows.shape[1] // old[-1]
        grown = np.zeros((prod(shape[:-1]), shape[-1] * size), np.uint8)
        grown[: len(rows), : rows.shape[1]] = rows
        raw = grown
    if target is tensor.tensor_type:
        return raw
    rows = raw.reshape(prod(shape[:-1]), -1)
    step = max(1, _SLICE // shape[-1])
    parts = []
    for start in range(0, len(rows), step):
        values = quants.dequantize(rows[start : start + step], tensor.tensor_type)
        try:
            parts.append(_native.quantize(values, target, n_threads))
        except ValueError as exc:
            raise ModelFileError(
                f"{source}: tensor {tensor.name} {exc}; download or convert it again"
            ) from exc
    return np.concatenate(parts)
