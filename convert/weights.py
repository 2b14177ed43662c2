"""The tensors of a safetensors checkpoint, read one at a time and in slices.

The safetensors package checks the files; the bytes are read here, because its NumPy side has no
bfloat16. Pickled checkpoints are refused: unpickling runs code that the file brings along.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GGMLType
from gguf import SafetensorsLocal, quants
from safetensors import SafetensorError, safe_open

from ..errors import ConvertError
from .config import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_STORED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_WRITTEN = {GGMLType.F32: np.float32, GGMLType.F16: np.float16, GGMLType.BF16: np.uint16}
_SLICE = 1 << 20  # elements in memory at once, beside the finished tensor


@dataclass(frozen=True)
class SourceTensor:
    """Where one tensor lies in which file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int

    def slices(self) -> Iterator[npt.NDArray[np.float32]]:
        """The values in order, as float32, a bounded number at a time."""
        stored, count = _STORED[self.dtype], prod(self.shape)
        for start in range(0, count, _SLICE):
            length = min(_SLICE, count - start)
            try:
                raw = np.fromfile(
                    self.file, stored, length, offset=self.offset + start * stored.itemsize
                )
            except OSError as exc:
                raise ConvertError(f"{self.file} cannot be read: {exc.strerror}") from exc
            if len(raw) != length:
                raise ConvertError(f"{self.file} became shorter while it was read")
            yield _widen(raw) if self.dtype == "BF16" else raw.astype(np.float32, copy=False)

    def read(self, target: GGMLType) -> npt.NDArray[Any]:
        """The whole tensor in the type that will be written."""
        out = np.empty(prod(self.shape), _WRITTEN[target])
        start = 0
        for values in self.slices():
            out[start : start + len(values)] = self._narrow(values, target)
            start += len(values)
        return out

    def _narrow(self, values: npt.NDArray[np.float32], target: GGMLType) -> npt.NDArray[Any]:
        if target is GGMLType.BF16:
            return quants.quantize(values, target).view(np.uint16)
        try:
            with np.errstate(over="raise"):
                return values.astype(_WRITTEN[target], copy=False)
        except FloatingPointError as exc:
            raise ConvertError(
                f"{self.name} in {self.file} holds values that are too large for f16; "
                "choose bf16 or f32"
            ) from exc


def same_values(one: SourceTensor, other: SourceTensor) -> bool:
    return one.shape == other.shape and all(
        np.array_equal(left, right)
        for left, right in zip(one.slices(), other.slices(), strict=True)
    )


def open_weights(checkpoint: Path) -> dict[str, SourceTensor]:
    """Every tensor of `model.safetensors`, or of the shards that the index lists, by name."""
    if (checkpoint / SINGLE).exists():
        return _read_header(checkpoint / SINGLE)
    if (checkpoint / INDEX).exists():
        return _read_shards(checkpoint)
    pickled = sorted(p.name for p in checkpoint.iterdir() if p.suffix in _PICKLED)
    if pickled:
        raise ConvertError(
            f"{checkpoint} has its weights only as {pickled[0]}, a pickle, and opening a pickle "
            f"runs code that it brings along; save the model as safetensors where you trust it"
        )
    raise ConvertError(f"{checkpoint} has neither {SINGLE} nor {INDEX}; download the weights")


def _read_shards(checkpoint: Path) -> dict[str, SourceTensor]:
    index = read_json(checkpoint / INDEX).section("weight_map")
    for shard in index.values.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConvertError(f"{index.where} names {shard!r}, which is not a file beside it")
    tensors: dict[str, SourceTensor] = {}
    for shard in dict.fromkeys(index.values.values()):
        if not (checkpoint / shard).is_file():
            raise ConvertError(f"{index.where} names {shard}, which is missing; download it too")
        for name, tensor in _read_header(checkpoint / shard).items():
            if index.values.get(name) != shard:
                raise ConvertError(f"{checkpoint / shard} holds {name}, but the index denies it")
            tensors[name] = tensor
    for name, shard in index.values.items():
        if name not in tensors:
            raise ConvertError(f"{checkpoint / shard} does not hold {name}, as the index says")
    return tensors


def _read_header(file: Path) -> dict[str, SourceTensor]:
    try:
        with safe_open(file, framework="np"):  # refuses damage that the next line would not see
            pass
        found = SafetensorsLocal(file).tensors
    except (SafetensorError, OSError, ValueError) as exc:
        raise ConvertError(
            f"{file} is damaged or not a safetensors file: {exc}; download it again"
        ) from exc
    for name, tensor in found.items():
        if tensor.dtype not in _STORED:
            raise ConvertError(
                f"{file}: {name} has the type {tensor.dtype}; only {', '.join(_STORED)} are "
                "supported, so save the model in one of them"
            )
    return {
        name: SourceTensor(name, tensor.shape, tensor.dtype, file, tensor.data_range.offset)
        for name, tensor in found.items()
    }


def _widen(raw: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32)
