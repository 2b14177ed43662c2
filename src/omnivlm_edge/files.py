"""Files: hashed, and written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash


def digest_file(path: Path, hasher: _Hash | None = None) -> str:
    """The digest of a file in hex: its SHA-256, or of what `hasher` began."""
    hasher = hasher or hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def identity(path: Path) -> list[int]:
    """What changes when a file is replaced or written to. Raises OSError."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def loaded_digest(path: Path, loaded: list[int], memo: Path | None) -> str | None:
    """The SHA-256 in hex of a file whose `identity` was taken when it was loaded.

    None when it is another file by now, or none. `memo` remembers digests for other processes.
    """
    try:
        if identity(path) != loaded:
            return None
        name = str(path.resolve())
        entries = _read_memo(memo) if memo is not None else {}
        *known, digest = entries.get(name, [""])
        if known == loaded:
            return str(digest)
        digest = digest_file(path)
        if identity(path) != loaded:
            return None
    except OSError:
        return None
    if memo is not None:
        entries[name] = [*loaded, digest]
        present = {name: entry for name, entry in entries.items() if os.path.exists(name)}
        with contextlib.suppress(OSError):
            make_private(memo.parent)
            write_whole(memo, json.dumps(present, indent=0).encode())
    return str(digest)


def make_private(directory: Path) -> None:
    """A directory for the user alone, with all above it. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)


def write_whole(path: Path, content: bytes) -> None:
    """The whole file or none, whoever else writes it at the same time. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_writable(path: Path) -> None:
    """Raises OSError where `write_whole` would."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _read_memo(memo: Path) -> dict[str, list[object]]:
    try:
        known = json.loads(memo.read_bytes())
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, list) and entry}
