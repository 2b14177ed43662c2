"""Rows -> a file that survives a kill at any instant, and knows what it holds.

The journal is JSON lines, one written by one system call as soon as it is finished: a killed
process loses nothing that it wrote. The disk is told to keep them (fsync) every few seconds and at
the end: after a power cut at most those seconds are missing or torn. The next run cuts a torn line
off, and does what is missing.

    OUT.jsonl      the journal itself
    OUT.parquet    written whole from OUT.parquet.jsonl, the journal, when a run ends
    OUT/           a directory: part-00000.jsonl, part-00001.jsonl, …, or each as .parquet once full

Beside it stands OUT.run (in a directory: _run, which readers of data sets pass over): what was
asked of which model. It is locked while a run writes.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import OptionError, OutputError
from .inputs import load_pyarrow
from .runner import Row

SHARD_ROWS = 100_000
FORMATS = ("jsonl", "parquet")
RUN = "_run"  # in a directory
_PART = re.compile(r"part-\d+\.(?:jsonl|parquet)")
_SYNC_SECONDS = 2.0
_FORMAT_VERSION = 1
_PARQUET_ROWS = 8192  # turned into a row group at once


class Output:
    """The rows of one run, of this process and of earlier ones. Close it.

    `path` is a .jsonl or .parquet file, or, with a slash at its end, a directory, whose shards are
    of `format` and `shard_rows` long. `about` says what is run, in JSON: an output of another one
    is refused, unless `overwrite` empties it first. With `retry_errors` the rows that failed are
    taken out.

    Raises OutputError when another process writes there, when the output is another run's, and, as
    all methods, when the system cannot write (a full disk). OptionError for a name of another kind.
    """

    def __init__(
        self,
        path: str,
        about: Mapping[str, Any],
        *,
        format: str | None = None,
        shard_rows: int | None = None,
        overwrite: bool = False,
        retry_errors: bool = False,
    ) -> None:
        self.path = Path(path)
        self._folder = path.endswith(os.sep) or (self.path / RUN).exists()
        suffix = self.path.suffix.lower().removeprefix(".")
        if self._folder:
            self._format = format or "jsonl"
        elif self.path.is_dir():
            raise OptionError(f"{path}: is a directory; to put shards into it write {path}{os.sep}")
        elif suffix not in FORMATS:
            raise OptionError(f"{path}: an output's name ends with .jsonl, .parquet or {os.sep}")
        elif format or shard_rows:
            raise OptionError(
                f"{path}: is a file; --format and --shard-rows are about shards in a directory, "
                f"whose name ends with {os.sep}"
            )
        else:
            self._format = suffix
        if not self._folder and self.path.exists() and not self.path.is_file():
            raise OptionError(f"{path}: is no regular file; name another output")
        if self._format == "parquet":
            load_pyarrow()  # before any work
        self._shard_rows = (shard_rows or SHARD_ROWS) if self._folder else None
        self._seen = Seen()
        self._journal: _Journal | None = None
        self.n_rows = self.n_errors = 0
        #: Rows that were torn, or there twice, and taken out.
        self.n_repaired = 0
        with _system_errors(self.path):
            self._run_file = self._prepare_places()
            self._lock = _Lock(self._run_file, self.path)
            try:
                if overwrite:
                    self._empty()
                self._check_run(about)
                self._open_journal(retry_errors)
            except BaseException:
                self._lock.close()
                raise

    def is_new(self, key: str, prompt: str) -> bool:
        """Whether there is no such row, nor will be one: true once. Any thread may ask."""
        return self._seen.add(key, prompt)

    def append(self, row: Row) -> None:
        """Writes one row: whole, or not at all."""
        assert self._journal is not None
        with _system_errors(self.path):
            self._journal.append(encode_row(row))
            self._count(row)
            if self._shard_rows and self._journal.n_rows >= self._shard_rows:
                self._next_shard()

    def finish(self) -> None:
        """After the last row, which is on the disk then: no journal is left beside Parquet."""
        assert self._journal is not None
        with _system_errors(self.path):
            self._journal.sync()
            if self._format == "parquet":
                if not self._folder:
                    write_parquet([self._journal.path], self.path)
                else:
                    if self._journal.n_rows:
                        self._next_shard()
                    self._journal.close()
                    self._journal.path.unlink()

    def close(self) -> None:
        """What was written stays, and the next run may go on. May be called again."""
        try:
            with _system_errors(self.path):
                if self._journal is not None:
                    self._journal.close()
        finally:
            self._lock.close()
            self._seen.close()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- places ---------------------------------------------------------------------------------

    def _prepare_places(self) -> Path:
        if self._folder:
            self.path.mkdir(parents=True, exist_ok=True)
            return self.path / RUN
        return self.path.with_name(self.path.name + ".run")

    def _parts(self) -> list[Path]:
        """Every file that holds rows, in order."""
        if self._folder:
            found = (p for p in self.path.iterdir() if _PART.fullmatch(p.name))
            return sorted(found, key=lambda path: (int(path.stem[5:]), path.suffix))
        path = self.path
        if self._format == "parquet":
            path = self.path.with_name(self.path.name + ".jsonl")
        return [path] if path.exists() else []

    def _empty(self) -> None:
        for path in (*self._parts(), *([] if self._folder else [self.path])):
            path.unlink(missing_ok=True)
        self._lock.write(b"")

    def _check_run(self, about: Mapping[str, Any]) -> None:
        """Refuses the rows of another run; notes what this one is where there are none."""
        now = {"omnivlm_edge_batch": _FORMAT_VERSION, "format": self._format, **about}
        now = json.loads(json.dumps(now))  # as it will be read again
        written = self._lock.read()
        has_rows = any(path.stat().st_size for path in self._parts())
        if not self._folder and self._format == "parquet" and not has_rows:
            has_rows = self.path.exists()
        try:
            before = json.loads(written)
        except ValueError:
            if has_rows:
                raise OutputError(
                    f"{self.path}: has rows, but {self._run_file.name}, which tells of what run, "
                    "is missing or damaged: name another output, or --overwrite it"
                ) from None
            self._lock.write(json.dumps(now, indent=1).encode() + b"\n")
            return
        different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if different and not has_rows:
            self._lock.write(json.dumps(now, indent=1).encode() + b"\n")
        elif different:
            raise OutputError(
                f"{self.path}: was begun with another {' and another '.join(different)}: name "
                "another output, or --overwrite it"
            )

    # ---- rows that are there --------------------------------------------------------------------

    def _open_journal(self, retry_errors: bool) -> None:
        parts = self._parts()
        n_last = 0
        for path in parts:
            if self._folder and path.suffix == ".jsonl" and path.with_suffix(".parquet") in parts:
                path.unlink()  # the kill came when its Parquet file was complete
            elif path.suffix == ".parquet":
                n_last = self._read_parquet_part(path, retry_errors)
            else:
                n_last = self._read_part(path, retry_errors)
        if not self._folder:
            name = self.path.name + (".jsonl" if self._format == "parquet" else "")
            self._journal = _Journal(self.path.with_name(name), n_last)
            return
        number = int(parts[-1].stem[5:]) if parts else 0
        if parts and parts[-1].suffix == ".parquet":
            number, n_last = number + 1, 0
        self._journal = _Journal(self.path / f"part-{number:05}.jsonl", n_last)
        if n_last >= (self._shard_rows or 0):
            self._next_shard()

    def _next_shard(self) -> None:
        assert self._journal is not None
        full = self._journal.path
        self._journal.close()
        if self._format == "parquet":
            write_parquet([full], full.with_suffix(".parquet"))
            full.unlink()
        self._journal = _Journal(full.with_name(f"part-{int(full.stem[5:]) + 1:05}.jsonl"), 0)

    def _read_part(self, path: Path, retry_errors: bool) -> int:
        """Counts a journal's rows, and takes out what is wrong with it.

        A torn end is cut off; for anything else the file is written anew, whole or not at all.
        """
        cuts: list[tuple[int, int]] = []
        n_rows = end = 0
        with path.open("rb") as file:
            for line in file:
                start, end = end, end + len(line)
                row = decode_row(line)
                if row is None:
                    self.n_repaired += 1
                elif self._wants(row, retry_errors):
                    n_rows += 1
                    continue
                if cuts and cuts[-1][1] == start:
                    start = cuts.pop()[0]
                cuts.append((start, end))
        if len(cuts) == 1 and cuts[0][1] == end:
            os.truncate(path, cuts[0][0])
        elif cuts:
            with _replacing(path) as new, path.open("rb") as old:
                for start, stop in cuts:
                    _copy(old, new, start - old.tell())
                    old.seek(stop)
                _copy(old, new, end - old.tell())
        return n_rows

    def _read_parquet_part(self, path: Path, retry_errors: bool) -> int:
        pyarrow = load_pyarrow()
        n_rows, wanted = 0, []
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["key", "key_base64", "prompt", "error"]):
                wanted += [self._wants(row, retry_errors) for row in batch.to_pylist()]
        n_rows = sum(wanted)
        if n_rows < len(wanted):
            places = iter(wanted)
            with (
                _replacing(path) as new,
                pyarrow.parquet.ParquetFile(path) as file,
                pyarrow.parquet.ParquetWriter(new, file.schema_arrow) as writer,
            ):
                for batch in file.iter_batches(_PARQUET_ROWS):
                    mask = pyarrow.array([next(places) for _ in range(len(batch))])
                    writer.write_batch(batch.filter(mask))
        return n_rows

    def _wants(self, row: Row, retry_errors: bool) -> bool:
        """Whether a row that was read shall stay; it is counted then, and done."""
        if retry_errors and row.get("error"):
            return False
        if not self._seen.add(key_of(row), row["prompt"]):
            self.n_repaired += 1
            return False
        self._count(row)
        return True

    def _count(self, row: Row) -> None:
        self.n_rows += 1
        self.n_errors += bool(row.get("error"))


def is_written(path: str, output: str) -> bool:
    """Whether a run whose output is `output` would write to the file at `path`."""
    own = [output, f"{output}.jsonl"]
    if _PART.fullmatch(os.path.basename(path)):
        own.append(os.path.join(output, os.path.basename(path)))
    there = [each for each in own if os.path.exists(each)] if os.path.exists(path) else []
    return any(os.path.samefile(each, path) for each in there)


class Seen:
    """Which rows there are, by key and prompt: in a temporary file of SQLite's, not in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._base = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._base.execute("pragma journal_mode = off")
        self._base.execute("pragma synchronous = off")
        self._base.execute("create table seen (digest blob primary key) without rowid")
        self._base.execute("begin")  # one transaction that never ends: nothing is kept

    def add(self, key: str, prompt: str) -> bool:
        """Whether it was not there before."""
        name, text = os.fsencode(key), prompt.encode(errors="surrogatepass")
        digest = hashlib.blake2b(
            len(name).to_bytes(8, "little") + name + text, digest_size=16
        ).digest()
        with self._lock:
            done = self._base.execute("insert or ignore into seen values (?)", (digest,))
            return done.rowcount == 1

    def close(self) -> None:
        with self._lock:
            self._base.close()


# ---- rows as text -------------------------------------------------------------------------------


def encode_row(row: Row) -> bytes:
    """A row's line. A key that is no text (a name's bytes are no UTF-8) is also there in base64."""
    key: str = row["key"]
    fields = {"key": key}
    try:
        key.encode()
    except UnicodeEncodeError:
        name = os.fsencode(key)
        fields = {
            "key": name.decode(errors="backslashreplace"),
            "key_base64": base64.b64encode(name).decode(),
        }
    text = json.dumps(fields | {k: v for k, v in row.items() if k != "key"}, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"  # in JSON that is an escape again


def decode_row(line: bytes) -> Row | None:
    """What a whole line holds; None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and isinstance(row.get("key"), str)
    return row if whole and isinstance(row.get("prompt"), str) else None


def key_of(row: Mapping[str, Any]) -> str:
    """The key of a row as the input gave it: of a file its path, for `os.fsencode` too."""
    name = row.get("key_base64")
    return os.fsdecode(base64.b64decode(name)) if name else str(row["key"])


# ---- Parquet ------------------------------------------------------------------------------------


def write_parquet(journals: Iterable[Path], target: Path) -> None:
    """The rows of journals as one Parquet file: all of it or none, whenever the kill comes."""
    pyarrow = load_pyarrow()
    schema = _schema()
    with (
        _replacing(target) as file,
        pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for rows in _batches(_journal_rows(journals)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))


def _schema() -> Any:
    pa = load_pyarrow()
    text, number, whole = pa.string(), pa.float64(), pa.int64()
    tokens = ("prompt_tokens", "image_tokens", "cached_tokens", "completion_tokens")
    times = (
        *("load_ms", "preprocess_ms", "image_encode_ms", "prompt_ms", "ttft_ms"),
        *("predicted_ms", "predicted_per_second"),
    )
    return pa.schema(
        {
            **dict.fromkeys(("key", "key_base64", "prompt", "answer", "finish_reason"), text),
            "choices": pa.map_(text, number),
            "error": pa.struct({"kind": text, "message": text}),
            "usage": pa.struct(dict.fromkeys(tokens, whole)),
            "timings": pa.struct(dict.fromkeys(times, number)),
            **dict.fromkeys(("model_sha256", "mmproj_sha256", "prompt_sha256"), text),
        }
    )


def _journal_rows(journals: Iterable[Path]) -> Iterator[Row]:
    for path in journals:
        with path.open("rb") as file:
            for line in file:
                row = decode_row(line)
                if row is not None:
                    choices = row.get("choices")
                    yield row | {"choices": list(choices.items()) if choices else None}


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, _PARQUET_ROWS)):
        yield batch


# ---- files --------------------------------------------------------------------------------------


class _Journal:
    """A file of lines that only grows, by whole lines."""

    def __init__(self, path: Path, n_rows: int) -> None:
        self.path = path
        self.n_rows = n_rows
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._file).st_size
        self._synced = time.monotonic()
        _sync_folder(path.parent)  # its name, too

    def append(self, line: bytes) -> None:
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)
        self.n_rows += 1
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """On the disk, whatever happens next."""
        if self._file >= 0:
            file, self._file = self._file, -1
            try:
                os.fsync(file)
            finally:
                os.close(file)


class _Lock:
    """A small file that one process at a time may hold; the system lets go of it for a dead one."""

    def __init__(self, path: Path, output: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(self._file)
            raise OutputError(f"{output}: another run is writing there; wait for its end") from exc

    def read(self) -> bytes:
        return os.pread(self._file, 1 << 24, 0)

    def write(self, content: bytes) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, content, 0)
        os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new content for a file: all of it, on the disk, or the old one."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _copy(source: BinaryIO, target: BinaryIO, n_bytes: int) -> None:
    while n_bytes > 0:
        chunk = source.read(min(n_bytes, 1 << 20))
        target.write(chunk)
        n_bytes -= len(chunk)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise OutputError(
            f"{path}: cannot be written ({reason}); what is there already is whole: the same "
            "command goes on from there"
        ) from exc
