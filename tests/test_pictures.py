"""What a server reads for a request, and what not."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from omnivlm_edge import ImageError
from omnivlm_edge.server import pictures
from omnivlm_edge.server.pictures import PictureRules, decode, name_of, read_bytes
from serving import data_uri

NOTHING = PictureRules()


@pytest.fixture
def media(tmp_path: Path, picture: Image.Image) -> Path:
    """A directory of pictures, with others beside it."""
    (tmp_path / "secret").mkdir()
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    for path in ("secret/a.png", "media/a.png", "media/sub/ä #1?%41.png"):
        picture.save(tmp_path / path)
    return root


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_data_uris_are_always_read(picture: Image.Image) -> None:
    assert read_bytes(data_uri(picture), NOTHING) == png(picture)
    assert read_bytes("DATA:,abc", NOTHING) == b"abc"
    with pytest.raises(ImageError, match="the data URI is damaged"):
        read_bytes("data:image/png;base64,%%%", NOTHING)


@pytest.mark.parametrize("address", ["http://example.com/a.png", "HTTPS://example.com/a.png"])
def test_addresses_are_fetched_only_where_that_is_allowed(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "fetch_url", lambda url: url.encode())
    with pytest.raises(ImageError, match="fetches no addresses.*--allow-urls"):
        read_bytes(address, NOTHING)
    assert read_bytes(address, PictureRules(allow_urls=True)) == address.encode()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1"])
def test_private_addresses_are_never_fetched(host: str) -> None:
    with pytest.raises(ImageError, match="private address"):
        read_bytes(f"http://{host}/a.png", PictureRules(allow_urls=True))


@pytest.mark.parametrize("address", ["", "a.png", "/etc/passwd", "ftp://example.com/a", "x" * 999])
def test_other_addresses_are_refused(address: str, media: Path) -> None:
    with pytest.raises(ImageError, match="(is no address|address is empty); send"):
        read_bytes(address, PictureRules(True, media))


# --- files ----------------------------------------------------------------------------------------


def test_no_file_is_read_unless_that_is_allowed(media: Path) -> None:
    with pytest.raises(ImageError, match="reads no files.*--media-path"):
        read_bytes(f"file://{media}/a.png", NOTHING)


def test_files_below_the_media_path(media: Path, picture: Image.Image) -> None:
    os.symlink("../a.png", media / "sub" / "link.png")
    named = "sub/%C3%A4%20%231%3F%2541.png"
    for name in (f"/{media}/a.png", "a.png", "sub/../a.png", "sub/link.png", named):
        assert read_bytes(f"file://{name}", PictureRules(media_path=media)) == png(picture), name


def test_a_media_path_may_be_a_link(media: Path, picture: Image.Image, tmp_path: Path) -> None:
    os.symlink(media, tmp_path / "link")
    rules = PictureRules(media_path=tmp_path / "link")
    for name in (tmp_path / "link" / "a.png", media / "a.png", "a.png"):
        assert read_bytes(f"file://{name}", rules) == png(picture)


REFUSED: dict[str, Callable[[Path], str]] = {
    "beside it": lambda media: f"{media}/../secret/a.png",
    "above it, from there on": lambda media: "../secret/a.png",
    "percent-encoded": lambda media: "%2e%2e/secret/a.png",
    "the whole path of another": lambda media: f"{media.parent}/secret/a.png",
    "a name that begins alike": lambda media: f"{media}2/a.png",
    "the root": lambda media: "/etc/passwd",
    "a link out": lambda media: f"{_link(media, media.parent / 'secret' / 'a.png')}",
    "a directory that links out": lambda media: f"{_link(media, media.parent / 'secret')}/a.png",
    "a loop": lambda media: f"{_link(media, media / 'out')}",
    "a directory": lambda media: f"{media}/sub",
    "itself": lambda media: f"{media}",
    "a pipe": lambda media: f"{_pipe(media)}",
    "none": lambda media: f"{media}/none.png",
    "a null byte": lambda media: f"{media}/a.png%00",
    "a host with brackets": lambda media: "[a.png",
}


def _link(media: Path, target: Path) -> Path:
    os.symlink(target, media / "out")
    return media / "out"


def _pipe(media: Path) -> Path:
    os.mkfifo(media / "pipe")
    return media / "pipe"


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_not_told_apart(name: str, media: Path) -> None:
    address = "file://" + REFUSED[name](media)
    with pytest.raises(ImageError) as caught:
        read_bytes(address, PictureRules(media_path=media))
    assert str(caught.value).endswith(": is no file below the server's --media-path")


def test_files_have_a_limit(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 20)
    with pytest.raises(ImageError, match="is larger than"):
        read_bytes("file://a.png", PictureRules(media_path=media))


# --- decoding -------------------------------------------------------------------------------------


def test_what_was_read_becomes_what_the_model_sees(picture: Image.Image) -> None:
    pixels = decode(png(picture), "picture 1", 84)
    assert pixels.data.shape[:2] == (84, 84)
    assert pixels.name == "picture 1"


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(Image.new("1", (9000, 9000)))
    assert len(bomb) < 20_000
    with pytest.raises(ImageError, match="a.png.*pixels"):
        decode(bomb, "file://a.png", 84)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("data:text/plain,hello", "picture 3"),
        ("data:text/plain;name=;base64,;name=x,", "picture 3"),
        ("data:image/png;name=a%20%C3%A9.png;base64,hello", "a é.png"),
        ("file://a.png", "file://a.png"),
        ("https://a.example/b.png", "https://a.example/b.png"),
        ("nothing known", "picture 3"),
    ],
)
def test_names(address: str, name: str) -> None:
    assert name_of(address, 3) == name
