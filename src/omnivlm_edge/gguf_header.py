"""The header of a GGUF file: its metadata and the list of its tensors, without their data.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length in the file is
checked against the bytes that are there. Arrays are stepped over and not built: a vocabulary of
150,000 strings would take longer than all the rest, and nobody here asks for it.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from .errors import ModelFileError

Value = str | int | float | bool

# GGUF's number types -> struct formats.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in ggml's order (fastest first), `type` a number of ggml_type.

    `offset` is where its data begin, counted from the first tensor's.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What stands before the tensors' data; arrays are left out of `metadata`.

    `arrays` says where they stand, by key: the offsets of the first byte and behind the last.
    `partial` is true when the bytes at hand ended before the header did; otherwise `size` is the
    bytes of the header, behind which the data begin at the next alignment.
    """

    metadata: dict[str, Value]
    tensors: list[TensorInfo]
    partial: bool = False
    size: int = 0
    arrays: dict[str, tuple[int, int]] = field(default_factory=dict)


class _EndOfData(Exception):
    """The header goes on behind the bytes at hand."""


def read_header(path: Path) -> Header:
    """The header of a file. Raises ModelFileError when it is absent, cut off or no GGUF file."""
    if not path.exists():
        raise ModelFileError(f"{path}: there is no such file; check the path")
    if not path.is_file():  # opening a pipe would wait for ever
        raise ModelFileError(f"{path}: is not a file; name a GGUF file")
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:  # cannot be mapped
                raise ModelFileError(f"{path}: is not a GGUF file but empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = parse_header(data, str(path))
    except OSError as exc:
        raise ModelFileError(f"{path}: cannot be read ({exc.strerror})") from exc
    if header.partial:
        raise ModelFileError(f"{path}: is damaged or cut off; download or convert it again")
    return header


def parse_header(data: bytes | mmap.mmap, name: str) -> Header:
    """The header from the first bytes of a file called `name`; `partial` when they do not suffice.

    Raises ModelFileError for what no further bytes could put right.
    """
    if data[:4] != b"GGUF":
        raise ModelFileError(f"{name}: is not a GGUF file")
    header, reader = Header({}, []), _Reader(data, name)
    try:
        reader.read(header)
    except _EndOfData:
        return replace(header, partial=True)
    return replace(header, size=reader.offset)


class _Reader:
    def __init__(self, data: bytes | mmap.mmap, name: str) -> None:
        self.data = data
        self.name = name
        self.offset = 4  # behind the magic

    def read(self, header: Header) -> None:
        version = self.number("I")
        if version not in (2, 3):
            raise ModelFileError(
                f"{self.name}: is GGUF version {version} (or big-endian); only 2 and 3 can be read"
            )
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        for _ in range(n_keys):
            key = self.string()
            kind = self.number("I")
            if kind == _STRING:
                header.metadata[key] = self.string()
            elif kind == _ARRAY:
                start = self.offset
                self.skip_array()
                header.arrays[key] = start, self.offset
            else:
                header.metadata[key] = self.scalar(self.format_of(kind))
        for _ in range(n_tensors):
            header.tensors.append(self.tensor())

    def skip(self, size: int) -> int:
        """Moves on by `size` bytes, which must be there; returns where they start."""
        start = self.offset
        if size > len(self.data) - start:
            raise _EndOfData
        self.offset += size
        return start

    def scalar(self, code: str) -> int | float | bool:
        layout = struct.Struct("<" + code)
        value: int | float | bool = layout.unpack_from(self.data, self.skip(layout.size))[0]
        return value

    def number(self, code: str) -> int:
        return int(self.scalar(code))

    def string(self) -> str:
        size = self.number("Q")
        start = self.skip(size)
        return self.data[start : start + size].decode("utf-8", "replace")

    def format_of(self, kind: int) -> str:
        if kind not in _SCALARS:
            self.fail(f"a value has the unknown type {kind}")
        return _SCALARS[kind]

    def skip_array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind != _STRING:
            self.skip(count * struct.calcsize("<" + self.format_of(kind)))
            return
        # The one loop that counts: a text model has 300,000 of these strings.
        offset, data, unpack = self.offset, self.data, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                offset += 8 + unpack(data, offset)[0]
        except (struct.error, OverflowError):
            raise _EndOfData from None
        self.skip(offset - self.offset)

    def tensor(self) -> TensorInfo:
        name = self.string()
        n_dimensions = self.number("I")
        if n_dimensions > _MAX_DIMENSIONS:
            self.fail(f"tensor {name} has {n_dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dimensions))
        kind = self.number("I")
        return TensorInfo(name, shape, kind, offset=self.number("Q"))

    def fail(self, what: str) -> NoReturn:
        raise ModelFileError(f"{self.name}: is damaged ({what}); download or convert it again")
