"""The addresses in a request -> decoded pictures, within what the server was allowed to read."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import ImageError
from ..image import Pixels, load_image, preprocess, shorten
from ..sources import MAX_BYTES, decode_data_uri, fetch_url

MAX_PIXELS = 64_000_000  # of a picture, 192 MB while it is decoded
_MAX_HEADER = 1000  # characters of a data: URI before its comma


@dataclass(frozen=True)
class PictureRules:
    """Where pictures may come from, beside `data:` URIs.

    `allow_urls`: http(s) addresses, public ones; `media_path`: files below this directory.
    """

    allow_urls: bool = False
    media_path: Path | None = None


def name_of(address: str, number: int) -> str:
    """What messages call a picture: its address, a data: URI's parameter `name`, or its number."""
    if _scheme(address) in ("http", "https", "file"):
        return shorten(address)
    header = address[:_MAX_HEADER].partition(",")[0]
    found = re.search(r";name=([^;,]+)", header, re.I)
    return shorten(unquote(found[1])) if found else f"picture {number}"


def read_bytes(address: str, rules: PictureRules, name: str = "the picture") -> bytes:
    """What is at a `data:` URI, or at an address that the rules allow. Raises ImageError."""
    scheme = _scheme(address)
    if scheme == "data":
        return decode_data_uri(address, name)
    if scheme in ("http", "https"):
        if not rules.allow_urls:
            raise ImageError(
                f"{name}: this server fetches no addresses; send the picture as a "
                "data: URI, or start the server with --allow-urls"
            )
        return fetch_url(address)
    if scheme == "file":
        if rules.media_path is None:
            raise ImageError(
                f"{name}: this server reads no files; send the picture as a data: URI, "
                "or start the server with --media-path"
            )
        return _read_file(address, rules.media_path)
    given = f"'{shorten(address)}' is no address" if address else "its address is empty"
    raise ImageError(f"{name}: {given}; send the picture as a data: URI with base64")


def decode(data: bytes, name: str, size: int) -> Pixels:
    """What was at an address -> the square that the model sees.

    Raises ImageError, also for a picture of more than MAX_PIXELS.
    """
    return preprocess(load_image(data, name, max_pixels=MAX_PIXELS), size)


def _read_file(address: str, media_path: Path) -> bytes:
    """A file below the media path, whether it is written with its whole path or from there on."""
    # One message for all cases: nobody may find out which files there are elsewhere.
    refusal = ImageError(f"{shorten(address)}: is no file below the server's --media-path")
    root = media_path.resolve()
    try:
        parts = urlsplit(address)
        path = (root / unquote(parts.netloc + parts.path)).resolve(strict=True)
        if not path.is_relative_to(root):
            raise refusal
        # The resolved path has no links in it; and what is no regular file must not be waited for.
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise refusal
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, RuntimeError):  # the latter: a loop of links
        raise refusal from None
    if len(data) > MAX_BYTES:
        raise ImageError(f"{shorten(address)}: is larger than {MAX_BYTES >> 20} MiB; shrink it")
    return data


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _scheme(address: str) -> str:
    return address[:16].partition(":")[0].lower()
