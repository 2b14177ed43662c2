"""What a quantization will write: every tensor with its shape, its old type and its new one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGMLType

from ..errors import ModelFileError
from ..gguf_header import TensorInfo
from ..imatrix import Imatrix
from ..model_file import ModelFile
from .recipes import FLOATS, QuantizeOptions, Rule, choose

NOT_IN_IMATRIX = "not in the imatrix"
UNUSED_PREFIX = "v.head."  # SigLIP's pooling head in published files, which nothing reads
WIDTH_MULTIPLE = 256  # a K type's block, the longest of all
_VISION_MATRIX = re.compile(r"(v\.blk\.\d+\.\w+|mm\.\d+)\.weight")
_TEXT_VECTORS = re.compile(r"_norm\.weight$|ffn_gate_inp")  # what llama.cpp never quantizes


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the new file.

    `shape` is the new one, rows first. `is_matrix`: the recipe has a say in its type. `note` says
    why that is not the type that was wanted.
    """

    name: str
    shape: tuple[int, ...]
    source: GGMLType
    target: GGMLType
    is_matrix: bool
    note: str = ""

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.target]
        return prod(self.shape) // block * size


@dataclass(frozen=True)
class Job:
    """One file to write: what it is made of, and how.

    `keys` are metadata to add or replace. `progress` is told (tensors done, tensors in all).
    """

    source: ModelFile
    output: Path
    tensors: Sequence[PlannedTensor]
    keys: Mapping[str, str | int]
    n_threads: int
    progress: Callable[[int, int], None]
    imatrix: Imatrix | None = None

    def importance(self, tensor: PlannedTensor) -> npt.NDArray[np.float32]:
        """How much the squared error of each column of a matrix counts, float32 [n_per_row].

        All columns alike where nothing is known: ggml looks for the scales of least error only when
        it is given weights (measured on normal values: Q4_1 10 % less error, Q4_0 5 %).
        """
        importance = np.ones(tensor.shape[-1], np.float32)
        known = self.imatrix.importance(tensor.name) if self.imatrix else None
        if known is not None:  # shorter where the rows were padded
            importance[: len(known)] = known / known.mean()  # no overflow, whatever the activations
        return importance


def plan_tensors(
    file: ModelFile, recipe: str, options: QuantizeOptions, imatrix: Imatrix | None
) -> list[PlannedTensor]:
    """The tensors of the new file, in the order of the old one.

    Raises OptionError for options that do not fit this file, ModelFileError when it is cut off,
    quantized already, holds a type that nobody knows or is not that of the importance matrix.
    """
    tensors = [t for t in file.header.tensors if not t.name.startswith(UNUSED_PREFIX)]
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    rules = options.rules(recipe, file.kind, tied=tied)
    width = _padded_width(file, rules) if file.kind == "vision" else 0
    planned = []
    for tensor in tensors:
        try:
            source = GGMLType(tensor.type)
        except ValueError as exc:
            raise ModelFileError(
                f"{file.path}: tensor {tensor.name} has the unknown type {tensor.type}"
            ) from exc
        if _end_of_data(file, tensor, source) > file.size:
            raise ModelFileError(
                f"{file.path}: tensor {tensor.name} reaches beyond the end of the file: it was cut "
                "off; download or convert it again"
            )
        shape = tuple(reversed(tensor.shape))
        if file.kind == "vision":
            shape = _padded(file, tensor.name, shape, width)
        target, note = source, ""
        matrix = _is_matrix(file, tensor)
        if matrix:
            if source.name not in FLOATS and not options.allow_requantize:
                raise ModelFileError(
                    f"{file.path}: is quantized already (tensor {tensor.name} is {source.name}); "
                    "quantize the F16 or F32 file instead, or allow it with --allow-requantize"
                )
            chosen, note = choose(tensor.name, shape[-1], rules)
            # What cannot be quantized stays as it is, or becomes half as large.
            unfit = note and chosen in FLOATS and source is not GGMLType.F32
            target = source if unfit else GGMLType[chosen]
            if imatrix is not None:
                inputs = imatrix.inputs.get(tensor.name)
                if inputs is None:
                    note = f"{note}; {NOT_IN_IMATRIX}".removeprefix("; ")
                elif len(inputs.squares) != tensor.shape[0]:
                    raise ModelFileError(
                        f"{options.imatrix}: belongs to another model: {tensor.name} has rows of "
                        f"{tensor.shape[0]} values in {file.path}"
                    )
        elif file.kind == "vision" and len(shape) > 1 and source is GGMLType.F32:
            target = GGMLType.F16
        planned.append(PlannedTensor(tensor.name, shape, source, target, matrix, note))
    return planned


def feed_forward_width(file: ModelFile, tensors: Sequence[PlannedTensor]) -> int:
    """The inner width of a vision file's MLPs in the new file."""
    return next(t.shape[-1] for t in tensors if _is_narrowing(file, t.name))


def _padded_width(file: ModelFile, rules: Sequence[Rule]) -> int:
    """The inner width of the MLPs, padded where they are quantized.

    They get as many zero units as make it a multiple of 256 (4304 -> 4352), so that their rows can
    be quantized at all. That changes nothing: such a unit adds gelu(0) · 0 = 0.
    """
    width = file.number("feed_forward_length")
    names = (tensor.name for tensor in file.header.tensors if _is_narrowing(file, tensor.name))
    if all(choose(name, WIDTH_MULTIPLE, rules)[0] in FLOATS for name in names):
        return width
    return width + -width % WIDTH_MULTIPLE


def _end_of_data(file: ModelFile, tensor: TensorInfo, kind: GGMLType) -> int:
    """The least offset in the file at which the tensor can end: alignment is not counted."""
    block, size = GGML_QUANT_SIZES[kind]
    return file.header.size + tensor.offset + prod(tensor.shape) // block * size


def _is_matrix(file: ModelFile, tensor: TensorInfo) -> bool:
    if file.kind == "vision":
        return len(tensor.shape) == 2 and bool(_VISION_MATRIX.fullmatch(tensor.name))
    weight = len(tensor.shape) > 1 and tensor.name.endswith(".weight")
    return weight and not _TEXT_VECTORS.search(tensor.name)


def _is_widening(file: ModelFile, name: str) -> bool:
    # The published converter swapped the names.
    part = "ffn_down" if file.architecture == "siglip" else "ffn_up"
    return bool(re.fullmatch(rf"v\.blk\.\d+\.{part}\.(weight|bias)", name))


def _is_narrowing(file: ModelFile, name: str) -> bool:
    part = "ffn_up" if file.architecture == "siglip" else "ffn_down"
    return bool(re.fullmatch(rf"v\.blk\.\d+\.{part}\.weight", name))


def _padded(file: ModelFile, name: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    if _is_widening(file, name):
        return (width, *shape[1:])
    if _is_narrowing(file, name):
        return (shape[0], width)
    return shape
