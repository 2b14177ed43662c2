"""Our vision file as one that llama.cpp runs: the same tower behind an `idefics3` projector.

That projector joins squares of patches and multiplies them by one matrix, which is random here;
ours has two matrices, 4096 wide between them. Everything else is taken over.
"""

from __future__ import annotations

from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFReader, GGUFWriter, LlamaFileType, ReaderTensor
from gguf.quants import dequantize

from omnivlm_edge.convert.output import OutFile, OutTensor, publish

_NUMBERS = (
    "image_size patch_size embedding_length feed_forward_length block_count projection_dim "
    "attention.head_count"
)


def write_idefics3(source: Path, output: Path) -> None:
    """Writes `output` from a vision file in our own layout, matrices in F16."""
    reader = GGUFReader(source)
    kept = [tensor for tensor in reader.tensors if not tensor.name.startswith("mm.")]
    tensors = [_plan(tensor) for tensor in kept]
    tensors.append(_projector(reader))
    publish([OutFile(output, "clip", partial(_add_keys, reader), tensors)], [source])


def _plan(tensor: ReaderTensor) -> OutTensor:
    """Matrices in F16, but F32 for what llama.cpp adds: vectors and positions."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    added = len(shape) == 1 or tensor.name == "v.position_embd.weight"
    target, dtype = (GGMLType.F32, np.float32) if added else (GGMLType.F16, np.float16)

    def read() -> npt.NDArray[Any]:
        return dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(dtype)

    return OutTensor(tensor.name, shape, target, read)


def _projector(reader: GGUFReader) -> OutTensor:
    """mm.model.fc.weight: [width of the text model, scale factor^2 x width of the tower]."""
    joined = _value(reader, "embedding_length") * _value(reader, "projector.merge_factor")
    shape = _value(reader, "projection_dim"), joined

    def read() -> npt.NDArray[Any]:
        values = np.random.default_rng(0).standard_normal(shape, np.float32)
        return (values * joined**-0.5).astype(np.float16)

    return OutTensor("mm.model.fc.weight", shape, GGMLType.F16, read)


def _add_keys(reader: GGUFReader, writer: GGUFWriter) -> None:
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "idefics3")
    writer.add_bool("clip.use_gelu", True)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    for name in _NUMBERS.split():
        writer.add_uint32(f"clip.vision.{name}", _value(reader, name))
    epsilon = "attention.layer_norm_epsilon"
    writer.add_float32(f"clip.vision.{epsilon}", _value(reader, epsilon))
    for name in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{name}", _value(reader, name))
    scale = isqrt(_value(reader, "projector.merge_factor"))
    writer.add_uint32("clip.vision.projector.scale_factor", scale)


def _value(reader: GGUFReader, name: str) -> Any:
    return reader.fields[f"clip.vision.{name}"].contents()
