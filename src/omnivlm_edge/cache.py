"""What was computed before: encoded pictures in memory and on disk, prompts' beginnings on disk.

Nothing here is ever needed: what is missing, damaged or not writable is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .files import make_private, write_whole

MEMORY_ENTRIES = 32  # 9 MB of 81 x 896 floats
DISK_BYTES = 256_000_000  # 880 pictures of 81 x 896 floats; 180 beginnings of 119 positions

_DIGEST_BYTES = 32


class DiskCache:
    """Bytes by key, one file each in a directory, for all processes; None keeps nothing.

    A file is the SHA-256 of what follows, then the bytes; one that does not agree with its digest
    counts as absent. The least recently used files go first when they are more than `DISK_BYTES`
    together.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def get(self, key: str) -> bytes | None:
        if self._directory is None:
            return None
        path = self._directory / key
        try:
            content = path.read_bytes()
            os.utime(path)  # used now
        except OSError:
            return None
        digest, value = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return value if hashlib.sha256(value).digest() == digest else None

    def put(self, key: str, value: bytes) -> None:
        if self._directory is not None:
            with contextlib.suppress(OSError):
                make_private(self._directory)
                write_whole(self._directory / key, hashlib.sha256(value).digest() + value)
                _prune(self._directory)


def cache_key(*parts: object) -> str:
    """A key that depends on the parts, and on the versions of what computes the values."""
    versions = [version(package) for package in ("omnivlm-edge", "llama-cpp-python")]
    return hashlib.sha256(repr([versions, *parts]).encode()).hexdigest()


#: An embedding, read-only, and where it was found; nowhere if it has just been computed.
Found: TypeAlias = tuple[npt.NDArray[np.float32], Literal["", "memory", "disk"]]


class EmbeddingCache:
    """float32 [n_tokens, n_embd] by key: the latest in memory, more of them on disk."""

    def __init__(self, shape: tuple[int, int], disk: DiskCache) -> None:
        self._shape = shape
        self._disk = disk
        self._memory: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()

    def get(self, key: str) -> Found | None:
        """The embedding of that key, if it is known."""
        data = self._memory.get(key)
        if data is not None:
            with contextlib.suppress(KeyError):  # another thread may have dropped it meanwhile
                self._memory.move_to_end(key)
            return data, "memory"
        content = self._disk.get(key)
        if content is None or len(content) != 4 * self._shape[0] * self._shape[1]:
            return None
        data = np.frombuffer(content, "<f4").reshape(self._shape).astype(np.float32, copy=False)
        self._remember(key, data)
        return data, "disk"

    def put(self, key: str, data: npt.NDArray[np.float32]) -> None:
        self._remember(key, data)
        self._disk.put(key, np.ascontiguousarray(data, "<f4").tobytes())

    def forget(self) -> None:
        """Forgets what is in memory."""
        self._memory.clear()

    def _remember(self, key: str, data: npt.NDArray[np.float32]) -> None:
        self._memory[key] = data
        while len(self._memory) > MEMORY_ENTRIES:
            with contextlib.suppress(KeyError):
                self._memory.popitem(last=False)


def _prune(directory: Path) -> None:
    files = [(entry.stat(), entry.path) for entry in os.scandir(directory)]
    excess = sum(stat.st_size for stat, _ in files) - DISK_BYTES
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
        if excess <= 0:
            break
        os.unlink(path)
        excess -= stat.st_size
