"""GGUF files that appear under their final name complete, or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from tqdm import tqdm

from ..errors import ConvertError

_KEYS_SPARE = 16 << 20  # bytes for keys, vocabulary and alignment, when free space is counted


@dataclass(frozen=True)
class OutTensor:
    """One tensor to write; `read` is called once, when its turn comes, and gives its bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    read: Callable[[], npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // block * size


@dataclass(frozen=True)
class OutFile:
    """One GGUF file to write: the final path, the keys, the tensors."""

    path: Path
    architecture: str
    add_keys: Callable[[GGUFWriter], None]
    tensors: Sequence[OutTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def publish(files: Sequence[OutFile], inputs: Sequence[Path] = ()) -> None:
    """Write all files beside their final names, then rename them; leave nothing after an error."""
    total = sum(file.nbytes for file in files)
    with (
        publishing([file.path for file in files], total, inputs) as parts,
        tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress,
    ):
        for file, part in zip(files, parts, strict=True):
            progress.set_description(file.path.name)
            for written in write_gguf(file, part):
                progress.update(written)


@contextmanager
def publishing(
    paths: Sequence[Path], nbytes: int, inputs: Sequence[Path] = ()
) -> Iterator[list[Path]]:
    """Names to write under, in order, within the block; at its end they become `paths`.

    An error or interruption removes them and leaves what `paths` were. All lie in one directory,
    which needs `nbytes` of free space.
    """
    for path in paths:
        _refuse_input(path, inputs)
        _make_directory(path.parent)
    _require_space(paths[0].parent, nbytes)
    parts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
    try:
        yield parts
        for path, part in zip(paths, parts, strict=True):
            os.replace(part, path)
    except OSError as exc:
        raise ConvertError(f"{paths[0].parent} cannot be written to: {exc}") from exc
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def write_gguf(file: OutFile, path: Path) -> Iterator[int]:
    """Writes `file` under another path, and yields the bytes of each tensor when it is written."""
    writer = GGUFWriter(path, file.architecture)
    try:
        file.add_keys(writer)
        for tensor in file.tensors:
            writer.add_tensor_info(
                # The NumPy type is only looked at where no GGML type is given.
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),
                tensor.nbytes,
                tensor.type,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in file.tensors:
            writer.write_tensor_data(tensor.read())
            yield tensor.nbytes
    finally:
        writer.close()


def report_unused(source: Path, names: Collection[str]) -> None:
    """Nothing is left out silently."""
    if names:
        print(
            f"{source}: left out the {len(names)} tensors of the vision tower's pooling head, "
            "which this model never uses",
            file=sys.stderr,
        )


def _refuse_input(output: Path, inputs: Sequence[Path]) -> None:
    if output.exists() and any(output.samefile(path) for path in inputs):
        raise ConvertError(f"{output} is the input itself; choose another output directory")


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConvertError(f"{directory} cannot be made a directory: {exc.strerror}") from exc


def _require_space(directory: Path, nbytes: int) -> None:
    needed, free = nbytes + _KEYS_SPARE, shutil.disk_usage(directory).free
    if free < needed:
        raise ConvertError(
            f"{directory} has {free / 1e6:.0f} MB free, but the result needs "
            f"{needed / 1e6:.0f} MB; free some space or choose another output directory"
        )
