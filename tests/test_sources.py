"""Every way to name a picture, with a web server on the loopback address."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import trustme
from PIL import Image, ImageGrab, UnidentifiedImageError

from omnivlm_edge import ImageError, sources
from omnivlm_edge.sources import decode_data_uri, fetch_url, find_pictures, read_sources


@pytest.fixture
def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by path; `server.png` is the picture, `server.hosts` every Host header."""

    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.hosts.append(self.headers["Host"])
        path, _, query = self.path.partition("?")
        png = self.server.png
        with contextlib.suppress(OSError):  # a client that has hung up
            if path in ("/picture.png", "/%C3%A4%20b.png"):
                self.answer(200, png, Content_Length=len(png))
            elif path == "/no-length":
                self.answer(200, png)
            elif path == "/chunked":
                chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(png), png)
                self.protocol_version = "HTTP/1.1"
                self.answer(200, chunks, Transfer_Encoding="chunked", Connection="close")
            elif path == "/cut":
                self.answer(200, png[:50], Content_Length=len(png))
            elif path == "/page":
                self.answer(200, b"<html>", Content_Type="text/html")
            elif path == "/large":
                self.answer(200, Content_Length=sources.MAX_BYTES + 1)
            elif path == "/endless":
                self.answer(200)
                while True:
                    self.wfile.write(bytes(65536))
            elif path == "/drip":
                self.answer(200, Content_Length=1000)
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            elif path == "/drip-header":
                self.wfile.write(b"HTTP/1.1 200 ")
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            elif path == "/nonsense":
                self.wfile.write(b"good morning\r\n\r\n")
            elif path.startswith("/hops/"):
                left = int(path.removeprefix("/hops/"))
                self.answer(302, Location=f"/hops/{left - 1}" if left else "/picture.png")
            elif path == "/raw-redirect":
                self.answer(302, Location="/ä b.png".encode().decode("latin-1"))
            elif path == "/to":
                self.answer(307, Location=query)
            else:
                self.answer(404)


class Server(ThreadingHTTPServer):
    png: bytes
    hosts: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(png: bytes) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.png, server.hosts = png, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server: Server, path: str) -> bytes:
    return fetch_url(server.url + path, allow_private=True)


def names(text: str) -> list[str]:
    return [Path(picture.name).name for picture in read_sources(text)]


# --- files ----------------------------------------------------------------------------------------


def test_path_and_home(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    picture.save(tmp_path / "a.png")
    for text in (str(tmp_path / "a.png"), "~/a.png", "~/[a].png"):
        (loaded,) = read_sources(text)
        assert loaded.name == str(tmp_path / "a.png")
        assert np.array_equal(np.asarray(loaded.image), np.asarray(picture))


def test_pattern(tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("10.png", "9.png", "9b.png", "sub.png/2.png", "a/b/x.png", "²3.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(name)
    assert names("*.png") == ["9.png", "9b.png", "10.png", "²3.png"]  # no directory among them
    assert names("**/x.png") == ["x.png"]
    assert names("[9]*.png") == ["9.png", "9b.png"]
    picture.save("[9]*.png")
    assert names("[9]*.png") == ["[9]*.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name is empty"),
        ("none.png", "none.png: there is no such file"),
        ("none*.png", r"none\*.png: there is no such file, nor one that matches"),
        ("notes.txt", "notes.txt: is not a picture"),
        ("*.txt", "notes.txt: is not a picture"),
        (".", "is not a file"),
        ("a\0b", "cannot be read"),
        ("a\0b/*", "cannot be read"),
        ("~nobodyx/a.png", "there is no such file"),
        ("ftp://a/b.png", "only http and https are fetched, not 'ftp'"),
        ("file:///etc/passwd", "only http and https are fetched, not 'file'"),
    ],
)
def test_wrong_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no picture")
    with pytest.raises(ImageError, match=message):
        read_sources(text)


# --- data URIs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["data:image/png;base64,", "DATA:;Base64,", "data:,"])
def test_data_uri(picture: Image.Image, png: bytes, header: str) -> None:
    base64_ = header.lower().endswith(";base64,")
    body = base64.b64encode(png).decode() if base64_ else quote(png)
    (loaded,) = read_sources(header + body)
    assert np.array_equal(np.asarray(loaded.image), np.asarray(picture))
    assert loaded.name == header + "…"
    assert decode_data_uri(header + body) == png


def test_data_uri_that_a_program_wrapped_and_encoded(png: bytes) -> None:
    lines = base64.encodebytes(png).decode()  # a line feed after 76 characters
    assert decode_data_uri("data:image/png;base64," + lines) == png
    assert decode_data_uri("data:image/png;base64," + quote(lines, safe="")) == png


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png;base64", "damaged: it has no comma"),
        ("data:" + "x" * 5000, "damaged: it has no comma"),
        ("data:image/png;base64,iVBORw0KGgo", "data URI is damaged"),
        ("data:image/png;base64,iVBO*w==", "data URI is damaged"),
        ("data:,\udcff", "data URI is damaged"),
        ("data:,", "is not a picture"),
        ("data:image/png;base64," + "A" * 5000, "image/png;base64,…: is not a picture"),
    ],
)
def test_damaged_data_uris(uri: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        read_sources(uri)
    assert len(str(caught.value)) < 200


def test_data_uri_too_large(monkeypatch: pytest.MonkeyPatch, png: bytes) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png).decode()
    monkeypatch.setattr(sources, "MAX_BYTES", len(png))
    assert decode_data_uri(uri) == png
    monkeypatch.setattr(sources, "MAX_BYTES", len(png) - 1)
    with pytest.raises(ImageError, match="is larger than"):
        decode_data_uri(uri)


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/picture.png", "/no-length", "/chunked", "/hops/4", "/to?/picture.png", "/ä b.png"],
)
def test_fetch(server: Server, png: bytes, path: str) -> None:
    assert fetch(server, path) == png


def test_redirect_in_raw_utf8(server: Server, png: bytes) -> None:
    """What servers send in spite of the standard: the bytes of `ä`, unencoded."""
    assert fetch(server, "/raw-redirect") == png


def test_read_address(server: Server, picture: Image.Image) -> None:
    (loaded,) = read_sources(server.url + "/picture.png", allow_private=True)
    assert loaded.name == server.url + "/picture.png"
    assert np.array_equal(np.asarray(loaded.image), np.asarray(picture))
    with pytest.raises(ImageError, match="/page: is not a picture"):
        read_sources(server.url + "/page", allow_private=True)


def test_environment_proxies_are_not_used(
    server: Server, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    assert fetch(server, "/picture.png") == png


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none", "the server answers 404 Not Found"),
        ("/hops/5", "redirected more than 5 times"),
        ("/to?", "the server answers 307 Temporary Redirect"),
        ("/to?file:///etc/passwd", "only http and https are fetched, not 'file'"),
        ("/to?http://[::1", "not a valid address"),
        ("/to?https:///x", "it names no host"),
        ("/cut", "damaged or was cut off"),
        ("/nonsense", "damaged or was cut off"),
        ("/large", "is larger than 20 MiB"),
    ],
)
def test_wrong_answers(server: Server, path: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        fetch(server, path)
    assert str(caught.value).startswith(server.url + path)


def test_too_large_without_a_length(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 2**20)
    with pytest.raises(ImageError, match="is larger than 1 MiB"):
        fetch(server, "/endless")


@pytest.mark.parametrize("path", ["/drip", "/drip-header"])
def test_slow_drip(server: Server, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(sources, "MAX_SECONDS", 0.3)
    with pytest.raises(ImageError, match="took longer than"):
        fetch(server, path)


def test_slow_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_SECONDS", 0.1)
    done = threading.Event()

    def resolve(*_: object, **__: object) -> list[Any]:
        done.wait(30)
        return []

    with pytest.raises(ImageError, match="took longer than"):
        fetch_url("http://slow.test/", resolve=resolve)
    done.set()


def test_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ImageError, match="cannot be reached .*refused"):
        fetch_url(f"http://127.0.0.1:{port}/a.png", allow_private=True)

    def resolve(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    with pytest.raises(ImageError, match="its host cannot be found"):
        fetch_url("http://none.test/a.png", resolve=resolve)


@pytest.mark.parametrize(
    "url",
    ["http://", "http://a:b/", "http://a:99999/", "http://[::1/", "http://a..b/", "http://\udcff/"],
)
def test_invalid_addresses(url: str) -> None:
    with pytest.raises(ImageError, match="is not a valid address"):
        fetch_url(url)


PRIVATE = """127.0.0.1 127.9.9.9 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0
    224.0.0.1 240.0.0.1 255.255.255.255 192.0.2.1 ::1 :: ::ffff:127.0.0.1 ::127.0.0.1 fe80::1
    fc00::1 ff02::1 ff0e::1 fec0::1 64:ff9b::a01:203 2002:7f00:1:: 2001:db8::1""".split()
PUBLIC = "1.1.1.1 93.184.215.14 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808".split()


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(ImageError, match="leads to the private address .*--allow-private-urls"):
        fetch_url(f"http://{host}/a.png")


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "127.1"])
def test_other_spellings_of_loopback_are_refused(host: str) -> None:
    with pytest.raises(ImageError, match="leads to the private address"):
        fetch_url(f"http://{host}/a.png")


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert sources._is_public(address)


def resolver(*addresses: str) -> sources.Resolver:
    """A name server that gives every host these addresses."""

    def resolve(_: str, port: int, **options: Any) -> list[Any]:
        found = [socket.getaddrinfo(address, port, **options) for address in addresses]
        return [entry for entries in found for entry in entries]

    return resolve


def test_one_private_address_among_public_ones_is_refused() -> None:
    with pytest.raises(ImageError, match="leads to the private address 10.0.0.1"):
        fetch_url("http://mixed.test/", resolve=resolver("1.1.1.1", "10.0.0.1"))


def test_redirect_to_a_private_address_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """127.0.0.1 plays the open internet, where alone a test can put its server."""
    monkeypatch.setattr(sources, "_is_public", lambda address: address == "127.0.0.1")
    assert fetch_url(server.url + "/hops/0")
    with pytest.raises(ImageError, match=r"leads to the private address 10\.0\.0\.1"):
        fetch_url(server.url + "/to?http://10.0.0.1/a.png")


def test_connects_to_the_checked_address(server: Server, png: bytes) -> None:
    """Each hop asks once for the name, so a second answer has no chance to differ."""
    asked = []

    def resolve(host: str, port: int, **options: Any) -> list[Any]:
        asked.append(host)
        return socket.getaddrinfo("127.0.0.1", port, **options)

    url = f"http://rebinding.test:{server.server_port}/picture.png"
    assert fetch_url(url, allow_private=True, resolve=resolve) == png
    assert asked == ["rebinding.test"]
    assert server.hosts == [f"rebinding.test:{server.server_port}"]


def test_second_address_when_the_first_is_dead(server: Server, png: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = taken.getsockname()[1]

    def resolve(_: str, port: int, **options: Any) -> list[Any]:
        ports = (dead, port)
        return [socket.getaddrinfo("127.0.0.1", port, **options)[0] for port in ports]

    url = f"http://two.test:{server.server_port}/picture.png"
    assert fetch_url(url, allow_private=True, resolve=resolve) == png


def test_https_verifies_the_name_and_the_issuer(
    server: Server, png: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("pictures.test").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)

    def fetch(host: str) -> bytes:
        url = f"https://{host}:{server.server_port}/picture.png"
        return fetch_url(url, allow_private=True, resolve=resolver("127.0.0.1"))

    with pytest.raises(ImageError, match="certificate is not valid .*unable to get local issuer"):
        fetch("pictures.test")
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    assert fetch("pictures.test") == png
    with pytest.raises(ImageError, match="certificate is not valid .*[Mm]ismatch"):
        fetch("other.test")


def test_https_to_a_server_that_speaks_http(server: Server) -> None:
    with pytest.raises(ImageError, match="cannot be reached"):
        fetch_url(f"https://127.0.0.1:{server.server_port}/", allow_private=True)


# --- the clipboard --------------------------------------------------------------------------------


def copied(monkeypatch: pytest.MonkeyPatch, content: object) -> None:
    def grabclipboard() -> object:
        if isinstance(content, Exception):
            raise content
        return content

    monkeypatch.setattr(ImageGrab, "grabclipboard", grabclipboard)


def test_clipboard(
    tmp_path: Path, picture: Image.Image, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(monkeypatch, Image.open(io.BytesIO(png)))
    (loaded,) = read_sources("clipboard:")
    assert (loaded.name, loaded.format) == ("the clipboard", "PNG")
    assert np.array_equal(np.asarray(loaded.image), np.asarray(picture))
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / name)
    copied(monkeypatch, [str(tmp_path / "b.png"), str(tmp_path / "a.png")])
    assert names("clipboard:") == ["b.png", "a.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the clipboard holds no picture"),
        ([], "the clipboard holds no picture"),
        (["none.png"], "none.png: there is no such file"),
        (NotImplementedError("xclip is required"), "install xclip .*wl-paste"),
        (ChildProcessError("xclip error: Can't open display"), "cannot be read .*display"),
        (UnidentifiedImageError("cannot identify"), "the clipboard holds no picture"),
        (SyntaxError("broken PNG file"), "cannot be read .*broken"),
    ],
    ids=str,
)
def test_clipboard_without_a_picture(
    monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    copied(monkeypatch, content)
    with pytest.raises(ImageError, match=message):
        read_sources("clipboard:")


def test_a_pattern_that_matches_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_MATCHES", 2)
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"not even looked at")
    with pytest.raises(ImageError, match="matches 3 files, and a question can be about 2 at most"):
        read_sources(str(tmp_path / "*.png"))


def test_pictures_of_a_directory_a_pattern_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a10.png", "a9.jpg", "below/deep/b.webp", ".hidden", "below/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"not even looked at")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sources, "MAX_MATCHES", 1)  # is for questions
    everything = ["a9.jpg", "a10.png", "below/deep/b.webp"]
    assert find_pictures(".") == [f"./{name}" for name in everything]
    assert find_pictures("~/below") == [str(tmp_path / "below/deep/b.webp")]
    assert find_pictures("a*") == everything[:2]
    assert find_pictures("a10.png") == ["a10.png"]
    (tmp_path / "empty").mkdir()
    for wrong in ("none", "nul\0", "none*.png", "https://x.invalid/a.png"):
        with pytest.raises(ImageError, match="there is no such file"):
            find_pictures(wrong)
    for wrong in ("empty", "pipe"):
        with pytest.raises(ImageError, match="holds no pictures"):
            find_pictures(wrong)
