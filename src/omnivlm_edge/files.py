"""Files: hashed, and written whole or not at all."""

from __future__ import annotations

import contextlib
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


def remembered_digest(path: Path, memo: Path | None) -> str:
    """The SHA-256 of a file in hex, read from `memo` unless its size or its times changed."""
    stat = path.stat()
    name = str(path.resolve())
    identity = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    entries = _read_memo(memo) if memo is not None else {}
    *known, digest = entries.get(name, [""])
    if known == identity:
        return str(digest)
    digest = digest_file(path)
    if memo is not None:
        entries[name] = [*identity, digest]
        present = {name: entry for name, entry in entries.items() if os.path.exists(name)}
        with contextlib.suppress(OSError):
            write_whole(memo, json.dumps(present, indent=0).encode())
    return str(digest)


def write_whole(path: Path, content: bytes) -> None:
    """The whole file or none, whoever else writes it at the same time. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # for the user alone
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read_memo(memo: Path) -> dict[str, list[object]]:
    try:
        known = json.loads(memo.read_bytes())
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, list) and entry}
