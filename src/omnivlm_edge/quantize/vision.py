"""A vision file: gguf-py reads and writes it tensor by tensor, native code quantizes the rows."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_VERSION, GGUFReader, GGUFWriter, quants
from gguf import GGMLQuantizationType as GGMLType
from gguf.gguf_reader import ReaderTensor

from .. import _native
from ..convert.mmproj import open_gguf, read_tensor, row_major_shape
from ..convert.output import OutFile, OutTensor, publishing, write_gguf
from ..device import select_device
from ..errors import ModelFileError
from ..vision import Vision
from .plan import Job, PlannedTensor, feed_forward_width

_SLICE = 1 << 22  # weights quantized between two looks at Ctrl-C


def quantize_vision(job: Job) -> None:
    """Raises ModelFileError when the file cannot be used, ConvertError when the disk is full."""
    source = job.source.path
    Vision(
        source, select_device("cpu"), job.n_threads, precision="ggml"
    )  # checks every key and shape
    reader = open_gguf(source)
    found = {tensor.name: tensor for tensor in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    keys = dict(job.keys)
    width_key = f"{architecture}.vision.feed_forward_length"
    old, new = job.source.number("feed_forward_length"), feed_forward_width(job.source, job.tensors)
    if new != old:
        keys |= {width_key: new, f"{width_key}_unpadded": old}

    def add_keys(writer: GGUFWriter) -> None:
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for key, value in keys.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_uint32(key, value)
        leave = {"general.architecture", "general.alignment", "general.quantization_version", *keys}
        _copy_keys(reader, writer, leave)

    tensors = [
        OutTensor(t.name, t.shape, t.target, partial(_read_as, job, t, found[t.name]))
        for t in job.tensors
    ]
    file = OutFile(job.output, architecture, add_keys, tensors)
    with publishing([job.output], file.nbytes, [source]) as (part,):
        for done, _ in enumerate(write_gguf(file, part), 1):
            job.progress(done, len(tensors))


def _copy_keys(reader: GGUFReader, writer: GGUFWriter, leave: set[str]) -> None:
    for key, field in reader.fields.items():
        value = field.contents()
        # "GGUF." is how gguf-py names the file's header; it can read empty lists, not write them.
        if key not in leave and not key.startswith("GGUF.") and value != []:
            writer.add_key_value(key, value, field.types[0], field.types[-1])


def _read_as(job: Job, planned: PlannedTensor, tensor: ReaderTensor) -> npt.NDArray[Any]:
    """The tensor's bytes in its new type, with zeros appended up to its new shape."""
    raw = read_tensor(job.source.path, tensor)
    old = row_major_shape(tensor)
    if planned.target is tensor.tensor_type and planned.shape == old:
        return raw
    rows = raw.reshape(prod(old[:-1]), -1)
    n_rows, width = prod(planned.shape[:-1]), planned.shape[-1]
    importance = job.importance(planned) if planned.is_matrix else None
    step = max(1, _SLICE // width)
    parts = []
    for start in range(0, n_rows, step):
        values = np.zeros((min(step, n_rows - start), width), np.float32)
        given = rows[start : start + step]
        if len(given):
            values[: len(given), : old[-1]] = quants.dequantize(given, tensor.tensor_type)
        if planned.target is GGMLType.F32:
            parts.append(values.view(np.uint8))
            continue
        try:
            parts.append(_native.quantize(values, planned.target, job.n_threads, importance))
        except ValueError as exc:
            raise ModelFileError(
                f"{job.source.path}: tensor {tensor.name} {exc}; download or convert it again"
            ) from exc
    return np.concatenate(parts)
