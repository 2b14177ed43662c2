"""Importance matrices: how strongly each input channel of a weight matrix is used.

The file is llama.cpp's (tools/imatrix/imatrix.cpp there): `general.type` is `imatrix`, and each
weight has `NAME.in_sum2`, the sums of its inputs' squares, and `NAME.counts`, the rows that were
summed. One file serves the text model and the vision file. Ours have `NAME.in_sum` as well, the
sums of the values themselves, of which llama.cpp's loader takes no notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, Keys
from gguf.gguf_reader import ReaderTensor

from .convert.mmproj import open_gguf, read_tensor
from .convert.output import OutFile, OutTensor, write_gguf
from .errors import ModelFileError

Floats: TypeAlias = "npt.NDArray[np.float32]"

_TYPE = "imatrix"  # general.type
_SQUARES, _VALUES, _COUNTS = ".in_sum2", ".in_sum", ".counts"
_FLOOR = 1e-6  # of a matrix's mean importance
_TINY = 1e-20  # a mean importance that float32 leaves no room to compute with


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of one weight matrix, summed over `n_rows` rows: float32 [n_in] each.

    `values` is None in a file of llama.cpp's own.
    """

    squares: Floats
    n_rows: int
    values: Floats | None = None


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix: the inputs by their weights' names, and where they come from.

    `datasets` names the pictures, for people; `chunk_count` is the number of questions (in
    llama.cpp's own files: of pieces of text) and `chunk_size` the positions that each could take.
    """

    inputs: Mapping[str, Inputs]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def importance(self, name: str) -> Floats | None:
        """The mean square of each input channel of a weight, float32 [n_in]; None where unknown.

        No value is zero, or less than a millionth of the matrix's mean: llama.cpp's searches for
        the best scale of a block divide by the sum of its importances.
        """
        inputs = self.inputs.get(name)
        if inputs is None or inputs.n_rows == 0:
            return None
        means = inputs.squares.astype(np.float64) / inputs.n_rows
        if means.mean() < _TINY:
            means = np.ones_like(means)
        return np.asarray(np.maximum(means, _FLOOR * means.mean()), np.float32)

    def write(self, path: Path) -> None:
        """Writes the file, piece by piece: see `convert.output.publishing` for a name in use."""
        file = OutFile(path, _TYPE, self._add_keys, list(self._tensors()))
        for _ in write_gguf(file, path):
            pass

    def _add_keys(self, writer: GGUFWriter) -> None:
        writer.add_type(_TYPE)
        writer.add_array(Keys.IMatrix.DATASETS, list(self.datasets))
        writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, self.chunk_count)
        writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, self.chunk_size)

    def _tensors(self) -> Iterator[OutTensor]:
        for name, inputs in self.inputs.items():
            count = np.array([inputs.n_rows], np.float32)
            for suffix, data in (
                (_SQUARES, inputs.squares),
                (_COUNTS, count),
                (_VALUES, inputs.values),
            ):
                if data is not None:
                    shape = 1, len(data)
                    read = partial(data.reshape, shape)
                    yield OutTensor(name + suffix, shape, GGMLQuantizationType.F32, read)


def read_imatrix(path: Path) -> Imatrix:
    """Reads a file of ours or of llama.cpp's `llama-imatrix` (GGUF, not its older format).

    Raises ModelFileError when it is damaged or no importance matrix.
    """
    reader = open_gguf(path)
    kind = _value(reader, Keys.General.TYPE)
    if kind != _TYPE:
        raise ModelFileError(
            f"{path}: is no importance matrix (its general.type is {kind!r}); "
            "make one with omnivlm-edge imatrix"
        )
    datasets = _value(reader, Keys.IMatrix.DATASETS)
    chunk_count = _value(reader, Keys.IMatrix.CHUNK_COUNT)
    chunk_size = _value(reader, Keys.IMatrix.CHUNK_SIZE)
    if type(datasets) is not list or type(chunk_count) is not int or type(chunk_size) is not int:
        raise _damaged(path, "a key imatrix.… is missing or of another kind")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = [name.removesuffix(_SQUARES) for name in tensors if name.endswith(_SQUARES)]
    if not names:
        raise _damaged(path, "it holds no statistics")
    inputs = {name: _read_inputs(path, tensors, name) for name in names}
    return Imatrix(inputs, tuple(map(str, datasets)), chunk_count, chunk_size)


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _read_inputs(path: Path, tensors: Mapping[str, ReaderTensor], name: str) -> Inputs:
    if name + _COUNTS not in tensors:
        raise _damaged(path, f"the tensor {name}{_COUNTS} is missing")
    squares, count = (_read_row(path, tensors[name + end]) for end in (_SQUARES, _COUNTS))
    values = _read_row(path, tensors[name + _VALUES]) if name + _VALUES in tensors else None
    if len(count) != 1 or (values is not None and values.shape != squares.shape):
        raise _damaged(path, f"the tensors of {name} do not fit each other")
    if squares.min() < 0 or count[0] < 0:
        raise _damaged(path, f"the tensors of {name} hold negative numbers")
    return Inputs(squares, int(count[0]), values)


def _read_row(path: Path, tensor: ReaderTensor) -> Floats:
    """A tensor of one row, or of several where a model has experts, which ours have not."""
    is_row = len(tensor.shape) > 0 and tensor.shape[0] == tensor.n_elements > 0
    if tensor.tensor_type is not GGMLQuantizationType.F32 or not is_row:
        raise _damaged(path, f"the tensor {tensor.name} is no single row of F32")
    data = read_tensor(path, tensor).view(np.float32)
    if not np.isfinite(data).all():
        raise _damaged(path, f"the tensor {tensor.name} holds values that are no numbers")
    return data


def _damaged(path: Path, what: str) -> ModelFileError:
    return ModelFileError(f"{path}: is damaged or of another kind ({what}); make it again")
