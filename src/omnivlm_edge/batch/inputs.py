"""What a user may name as input -> one lazy stream of items, however many there are.

Nothing here holds more than a row, the names of a folder's own folders, or one batch of a Parquet
file. A file's pictures come in the order in which the system lists them.
"""

from __future__ import annotations

import contextlib
import csv
import fnmatch
import glob
import io
import json
import os
import re
import stat
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import ImageError, OptionError
from ..image import shorten
from ..sources import PICTURE_SUFFIXES, is_address

MAX_BYTES = 512 * 2**20  # of a picture's file; what is larger is no photograph
MAX_LINE = 64 * 2**20  # of a table or a list: a picture may stand in it
_PARQUET_BATCH = 16  # rows: each may hold a picture
_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_LISTS = (".txt", ".lst", ".list")


@dataclass(frozen=True)
class Slice:
    """A part of a file, where a tar archive keeps a picture."""

    path: str
    offset: int
    size: int


#: A path, a file's part, an address (http, https, data:), a picture file's content, or pixels.
Source: TypeAlias = "Path | Slice | str | bytes | npt.NDArray[np.uint8]"


@dataclass(frozen=True)
class Item:
    """A picture and its key, which is the same in every run; and its prompt, if it has its own.

    Without a `source` it is no picture, and `problem` says why. A tuple is what one question shows
    together: several pictures, or none.
    """

    key: str
    source: Source | tuple[Source, ...] | None
    prompt: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class Columns:
    """The columns of tables: `key` None takes the picture's path, `prompt` None none.

    In tar archives `prompt` is the rest of the name of the file that holds it.
    """

    image: str = "image"
    key: str | None = None
    prompt: str | None = None


def read_inputs(inputs: Sequence[str], columns: Columns) -> Iterator[Item]:
    """The pictures that `inputs` name, one after the other.

    An input is a folder (with all below it; links to folders are not followed), a pattern, a
    picture, a list of paths (.txt, or - for standard input; lines, or what NULs separate), a table
    (.jsonl, .csv, .tsv, .parquet), or a WebDataset shard (.tar).

    Raises ImageError for an input that is absent and for a folder that cannot be read, OptionError
    for one that is of no such kind or lacks a column; all else that is wrong, a damaged table too,
    becomes an item with a `problem`.
    """
    for text in inputs:
        yield from _read_input(text, columns)


def count_inputs(inputs: Sequence[str], columns: Columns) -> Iterator[int]:
    """Counts what `read_inputs` gives, so far, from time to time; the last one is the number."""
    total = 0
    for text in inputs:
        if text.lower().endswith(".parquet") and os.path.isfile(text):
            try:
                with open_parquet(text) as file:
                    total += int(file.metadata.num_rows)
            except ImageError:
                total += 1  # it will be an item with a problem
            continue
        for _ in _read_input(text, columns):
            total += 1
            if total % 1000 == 0:
                yield total
    yield total


def check_inputs(inputs: Sequence[str]) -> None:
    """Raises as `read_inputs`, for what is wrong with the inputs themselves."""
    for text in inputs:
        if os.path.isdir(text):
            _list_folder(text).close()
        elif text != "-" and (os.path.lexists(text) or not glob.has_magic(text)):
            _reader(text)


def named_tables(inputs: Sequence[str]) -> Iterator[str]:
    """The tables and lists that exist among the inputs, and those that patterns match."""
    for text in inputs:
        paths = [text] if os.path.lexists(text) else _expand(text) if glob.has_magic(text) else []
        for path in paths:
            if isinstance(path, str) and path.lower().endswith((*_TABLES, *_LISTS)):
                yield path


def check_columns(path: str, columns: Columns) -> None:
    """Raises OptionError for a CSV or Parquet file without one of the columns.

    One that cannot be read at all is no error yet, nor is one that can be read only once.
    """
    lower = path.lower()
    with contextlib.suppress(ImageError, OSError, csv.Error):
        if not os.path.isfile(path):
            return
        if lower.endswith(".parquet"):
            with open_parquet(path) as file:
                _check_columns(path, file.schema_arrow.names, columns)
        elif lower.endswith((".csv", ".tsv")):
            with _open_csv(path) as text:
                _csv_rows(path, text, columns)


def has_tables(inputs: Sequence[str]) -> bool:
    """Whether any input is, or may turn out to be, one that has columns."""
    return any(text.lower().endswith((*_TABLES, ".tar")) or glob.has_magic(text) for text in inputs)


def read_source(
    source: Path | Slice | bytes | npt.NDArray[np.uint8], key: str
) -> Path | bytes | npt.NDArray[np.uint8]:
    """What can be decoded: the content, or a path whose content can be. Raises ImageError."""
    if isinstance(source, Path):
        try:
            found = source.stat()
        except (OSError, ValueError):
            return source  # what is wrong with it is said when it is opened
        if stat.S_ISREG(found.st_mode) and found.st_size > MAX_BYTES:
            raise ImageError(f"{shorten(key)}: is larger than {MAX_BYTES >> 20} MiB")
        return source
    if isinstance(source, Slice):
        return _read_slice(source, key)
    if isinstance(source, bytes) and not source:
        raise ImageError(f"{shorten(key)}: is empty")
    return source


def is_picture(name: str) -> bool:
    """Whether a file in a folder counts as a picture, by its name."""
    return name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")


def walk(folder: str) -> Iterator[Item]:
    """The pictures in a folder and below it; hidden ones, and what links lead to, are left out."""
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            entries = _list_folder(current)
        except ImageError as error:
            yield Item(current, None, problem=str(error))
            continue
        below = []
        with entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith("."):
                        below.append(entry.path)
                elif is_picture(entry.name) and not _is_folder(entry):
                    yield Item(entry.path, Path(entry.path))
        waiting += reversed(below)


# ---- one input ----------------------------------------------------------------------------------


def _read_input(text: str, columns: Columns) -> Iterator[Item]:
    if text == "-":
        yield from _read_list(sys.stdin.buffer, "", "standard input")
    elif os.path.isdir(text):
        _list_folder(text).close()  # this one must be readable
        yield from walk(text)
    elif os.path.lexists(text) or not glob.has_magic(text):
        yield from _read_file(text, columns)
    else:
        for path in _expand(text):
            if isinstance(path, Item):
                yield path
            elif path.lower().endswith((*_TABLES, *_LISTS, ".tar")):
                yield from _read_file(path, columns)
            else:
                yield Item(path, Path(path))


def _read_file(path: str, columns: Columns) -> Iterator[Item]:
    """What a file holds; one that cannot be read at all is an item with a problem."""
    read = _reader(path)
    try:
        yield from read(path, columns)
    except ImageError as error:
        yield Item(path, None, problem=str(error))
    except (OSError, csv.Error) as exc:
        reason = getattr(exc, "strerror", None) or exc
        yield Item(path, None, problem=f"{shorten(path)}: cannot be read to its end ({reason})")


def _reader(path: str) -> Callable[[str, Columns], Iterator[Item]]:
    if not os.path.lexists(path):
        raise ImageError(f"{shorten(path)}: there is no such file or folder")
    lower = path.lower()
    if lower.endswith(PICTURE_SUFFIXES):
        return lambda path, _: iter([Item(path, Path(path))])
    if lower.endswith(_LISTS):
        return _read_list_file
    if lower.endswith((".jsonl", ".ndjson")):
        return _read_jsonl
    if lower.endswith((".csv", ".tsv")):
        return _read_csv
    if lower.endswith(".parquet"):
        return _read_parquet
    if lower.endswith(".tar"):
        return _read_tar
    known = " ".join((*PICTURE_SUFFIXES, *_LISTS, *_TABLES, ".tar"))
    raise OptionError(
        f"{shorten(path)}: its name does not tell what it is; known are folders, and {known}"
    )


def _list_folder(path: str) -> Any:
    try:
        return os.scandir(path)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ImageError(f"{shorten(path)}: this folder cannot be read ({reason})") from exc


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: opening it will say so
        return False


def _expand(pattern: str) -> Iterator[str | Item]:
    """The files that match a pattern, and with a problem the folders that may not be looked into.

    Unlike glob's, no folder's names are all held at once.
    """
    first, *rest = os.path.expanduser(pattern).split(os.sep)
    parts: list[str] = []
    for part in filter(None, (first, *rest)):
        if not (part == "**" and parts[-1:] == ["**"]):  # "**/**" is "**"
            parts.append(part)
    yield from _match("" if first else os.sep, parts)


def _match(base: str, parts: Sequence[str]) -> Iterator[str | Item]:
    first, rest = parts[0], parts[1:]
    if not glob.has_magic(first):
        path = os.path.join(base, first)
        if rest:
            yield from _match(path, rest)
        elif os.path.isfile(path):
            yield path
        return
    any_depth = first == "**"
    matches = re.compile(fnmatch.translate("*" if any_depth else first)).match
    try:
        entries = os.scandir(base or ".")
    except PermissionError as exc:
        problem = f"{shorten(base or '.')}: this folder cannot be read ({exc.strerror})"
        yield Item(base or ".", None, problem=problem)
        return
    except OSError:  # it is no folder: a pattern may lead everywhere
        return
    with entries:
        if any_depth and rest:
            yield from _match(base, rest)
        for entry in entries:
            hidden = entry.name.startswith(".") and not first.startswith(".")
            if hidden or not matches(entry.name):
                continue
            try:
                is_folder = entry.is_dir(follow_symlinks=not any_depth)
                is_file = not is_folder and entry.is_file()
            except OSError:  # a link that leads to itself
                continue
            path = os.path.join(base, entry.name)
            if is_folder and (any_depth or rest):
                yield from _match(path, parts if any_depth else rest)
            elif is_file and not rest:
                yield path


# ---- lists and tables ---------------------------------------------------------------------------


def _open(path: str) -> Any:
    try:
        return open(path, "rb")  # noqa: SIM115
    except OSError as exc:
        raise ImageError(f"{shorten(path)}: cannot be read ({exc.strerror})") from exc


def _read_list_file(path: str, _: Columns) -> Iterator[Item]:
    with _open(path) as file:
        yield from _read_list(file, os.path.dirname(path), path)


def _read_list(file: Any, folder: str, name: str) -> Iterator[Item]:
    end = b"\0" if b"\0" in file.peek(1 << 16)[: 1 << 16] else b"\n"
    for number, line in _lines(file, end):
        if line is None:
            yield _too_long(name, number)
            continue
        text = os.fsdecode(line.strip(b"\r\n") if end == b"\n" else line)
        if text:
            yield _item_of(text, folder, f"{name}:{number}")


def _lines(file: BinaryIO, end: bytes = b"\n") -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without their end; None instead of one that is too long."""
    number, held, skipping = 1, b"", False
    while chunk := file.read(1 << 20):
        *whole, rest = (held + chunk).split(end)
        for line in whole:
            yield number, None if skipping else line
            number, skipping = number + 1, False
        held = rest
        if len(held) > MAX_LINE:
            held, skipping = b"", True
    if held or skipping:
        yield number, None if skipping else held


def _too_long(name: str, number: int) -> Item:
    return Item(f"{name}:{number}", None, problem=f"the line is longer than {MAX_LINE >> 20} MiB")


def _item_of(
    text: str, folder: str, place: str, prompt: str | None = None, key: str | None = None
) -> Item:
    """A path, from `folder` on, or an address; a data: URI is named by its place."""
    if is_address(text):
        name = place if text[:5].lower() == "data:" else text
        return Item(name if key is None else key, text, prompt)
    path = os.path.join(folder, text)
    return Item(path if key is None else key, Path(path), prompt)


def _read_jsonl(path: str, columns: Columns) -> Iterator[Item]:
    with _open(path) as file:
        for number, line in _lines(file):
            if line is None:
                yield _too_long(path, number)
            elif line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as exc:
                    yield Item(f"{path}:{number}", None, problem=f"the line is not JSON ({exc})")
                    continue
                yield _from_row(row, path, number, columns)


def _read_csv(path: str, columns: Columns) -> Iterator[Item]:
    with _open_csv(path) as file:
        rows = _csv_rows(path, file, columns)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as exc:
                yield Item(f"{path}:{rows.line_num}", None, problem=f"the row is damaged ({exc})")
                continue
            yield _from_row(row, path, rows.line_num, columns)


def _open_csv(path: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open(path), "utf-8-sig", "surrogateescape", newline="")


def _csv_rows(path: str, file: io.TextIOWrapper, columns: Columns) -> csv.DictReader[str]:
    """The rows behind the first line, which names the columns."""
    csv.field_size_limit(MAX_LINE)
    rows = csv.DictReader(file, delimiter="\t" if path.lower().endswith(".tsv") else ",")
    if not rows.fieldnames:
        raise ImageError(f"{shorten(path)}: is empty; a table's first line names its columns")
    _check_columns(path, rows.fieldnames, columns)
    return rows


def load_pyarrow() -> Any:
    """The module, with `parquet` in it. Raises OptionError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise OptionError('Parquet needs pyarrow: pip install "omnivlm-edge[batch]"') from exc
    return pyarrow


def open_parquet(path: str) -> Any:
    """A ParquetFile. Raises ImageError for what is none, OptionError where pyarrow is missing."""
    pyarrow = load_pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, pyarrow.ArrowException) as exc:
        raise ImageError(f"{shorten(path)}: cannot be read as Parquet ({exc})") from exc


def _read_parquet(path: str, columns: Columns) -> Iterator[Item]:
    with open_parquet(path) as file:
        _check_columns(path, file.schema_arrow.names, columns)
        wanted = {columns.image, columns.key, columns.prompt} - {None}
        number = 0
        try:
            for batch in file.iter_batches(_PARQUET_BATCH, columns=sorted(map(str, wanted))):
                for row in batch.to_pylist():
                    number += 1
                    yield _from_row(row, path, number, columns)
        except (OSError, ValueError) as exc:  # ArrowInvalid is one
            problem = f"{shorten(path)}: is damaged behind row {number} ({exc})"
            yield Item(f"{path}:{number + 1}", None, problem=problem)


def _check_columns(path: str, names: Sequence[str], columns: Columns) -> None:
    for name in (columns.image, columns.key, columns.prompt):
        if name is not None and name not in names:
            raise OptionError(
                f"{shorten(path)}: has no column '{name}', but {', '.join(names)}: "
                "see --image-column, --key-column and --prompt-column"
            )


def _from_row(row: Any, path: str, number: int, columns: Columns) -> Item:
    """A table's row; `image` is a path, an address, bytes, or {"bytes": …, "path": …}."""
    place = f"{path}:{number}"
    if not isinstance(row, dict):
        return Item(place, None, problem=f"{shorten(place)}: the row is not a JSON object")
    prompt = key = None
    if columns.key is not None:
        key = str(row.get(columns.key))
        if row.get(columns.key) is None or not _is_name(key):
            problem = f"{shorten(place)}: the row has no usable '{columns.key}'"
            return Item(place, None, problem=problem)
    if columns.prompt is not None:
        prompt = row.get(columns.prompt)
        if not isinstance(prompt, str) or not prompt or not is_text(prompt):
            problem = f"{shorten(place)}: the row has no text in '{columns.prompt}'"
            return Item(place if key is None else key, None, problem=problem)
    image = row.get(columns.image)
    if isinstance(image, dict):  # as Hugging Face's data sets have it
        if image.get("bytes"):
            named = image.get("path")
            if key is None and named and _is_name(str(named)):
                key = str(named)
            image = image["bytes"]
        else:
            image = image.get("path")
    if isinstance(image, bytes):
        return Item(place if key is None else key, image, prompt)
    if not isinstance(image, str) or not image or not _is_name(image):
        problem = f"{shorten(place)}: the row has no usable '{columns.image}'"
        return Item(place if key is None else key, None, prompt, problem)
    return _item_of(image, os.path.dirname(path), place, prompt, key)


def is_text(text: str) -> bool:
    """Whether it is Unicode: Python's texts may hold bytes that are none, JSON's halves of it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_name(text: str) -> bool:
    """Whether a file may have this name: any bytes, but no halves."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


# ---- tar ----------------------------------------------------------------------------------------


def _read_tar(path: str, columns: Columns) -> Iterator[Item]:
    """The pictures of a WebDataset shard; files of one sample, alike up to a dot, stand together.

    Contents are not read here, but by offset when it is their turn.
    """
    sample: list[tuple[str, str, Slice]] = []  # (name, extension, place)
    stem = None
    try:
        with _open(path), tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # or it keeps them all
                if not member.isreg():
                    continue
                folder, base = os.path.split(member.name)
                start, _, extension = base.partition(".")
                if (folder, start) != stem:
                    yield from _sample_items(path, sample, columns)
                    sample, stem = [], (folder, start)
                place = Slice(path, member.offset_data, member.size)
                sample.append((member.name, extension, place))
    except (tarfile.TarError, OSError, EOFError) as exc:
        yield from _sample_items(path, sample, columns)
        yield Item(path, None, problem=f"{shorten(path)}: is cut off or no tar archive ({exc})")
        return
    yield from _sample_items(path, sample, columns)


def _sample_items(
    path: str, sample: Sequence[tuple[str, str, Slice]], columns: Columns
) -> Iterator[Item]:
    prompt, problem = None, ""
    if columns.prompt is not None:
        texts = [place for _, extension, place in sample if extension == columns.prompt]
        try:
            prompt = _read_slice(texts[0], path).decode() if texts else None
        except (ImageError, ValueError) as exc:
            problem = f"its prompt cannot be read ({exc})"
        if not prompt:
            problem = problem or f"the sample has no file '.{columns.prompt}'"
    for name, extension, place in sample:
        if f".{extension}".lower().endswith(PICTURE_SUFFIXES):
            yield Item(f"{path}/{name}", None if problem else place, prompt, problem)


def _read_slice(place: Slice, key: str) -> bytes:
    if place.size > MAX_BYTES:
        raise ImageError(f"{shorten(key)}: is larger than {MAX_BYTES >> 20} MiB")
    try:
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            data = file.read(place.size)
    except OSError as exc:
        raise ImageError(f"{shorten(key)}: cannot be read ({exc.strerror})") from exc
    if not data:
        raise ImageError(f"{shorten(key)}: is empty")
    if len(data) < place.size:
        raise ImageError(f"{shorten(key)}: is cut off")
    return data
