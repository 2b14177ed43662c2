"""What a user may write to name a picture -> decoded pictures. Fetches addresses."""

from __future__ import annotations

import base64
import concurrent.futures
import glob
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import string
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

from .errors import ImageError
from .image import Picture, load_image, shorten

MAX_BYTES = 20 * 2**20  # of a picture that comes from anywhere but a file
MAX_SECONDS = 10  # for an address: name lookup, redirects and download together
MAX_REDIRECTS = 5
MAX_MATCHES = 64  # of a pattern: more pictures fit no context, and all of them into memory at once

#: Of what image.py reads; in a directory other files are passed over.
PICTURE_SUFFIXES = tuple(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .heic .heif .avif".split())

_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last four bytes are IPv4
_SITE_LOCAL = ipaddress.ip_network("fec0::/10")  # RFC 3879: deprecated, but private

Resolver = Callable[..., list[Any]]  # called and answering as socket.getaddrinfo


def read_sources(text: str, *, allow_private: bool = False) -> list[Picture]:
    """Reads what `text` names: one picture, or all that a pattern matches.

    `text` is a path, a pattern such as `photos/*.jpg` (unless a file has that very name; in natural
    order: 2 before 10), an `http://` or `https://` address, a `data:` URI, `-` for standard input,
    or `clipboard:`. `~` stands for the home directory. `allow_private` as in `fetch_url`.

    Raises ImageError, which says whether a picture is absent, undecodable, too large, or cannot be
    reached.
    """
    if not text:
        raise ImageError("a picture's name is empty: give a path or an address")
    if text == "-":
        return [load_image(_read_stdin(), "standard input")]
    if text == "clipboard:":
        return _read_clipboard()
    if is_address(text):
        return [read_address(text, allow_private=allow_private)]
    paths = _find_files(text)
    if len(paths) > MAX_MATCHES:
        raise ImageError(
            f"{shorten(text)}: matches {len(paths)} files, and a question can be about "
            f"{MAX_MATCHES} at most; ask about fewer"
        )
    return [load_image(path) for path in paths]


def find_pictures(text: str) -> list[str]:
    """The files that `text` names: one, the pictures in a directory and below it, or a pattern's.

    In natural order. Which of a directory's files are pictures is told by their names; hidden ones
    are left out. Raises ImageError when there are none.
    """
    found = []
    for path in _find_files(text):
        if os.path.isdir(path):
            below = (
                os.path.join(directory, name)
                for directory, _, names in os.walk(path)
                for name in names
                if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")
            )
            found += sorted(filter(os.path.isfile, below), key=_natural)
        elif os.path.isfile(path):
            found.append(path)
    if not found and not os.path.exists(os.path.expanduser(text)):
        raise ImageError(f"{shorten(text)}: there is no such file, nor one that matches it")
    if not found:
        raise ImageError(f"{shorten(text)}: holds no pictures ({' '.join(PICTURE_SUFFIXES)})")
    return found


def is_address(text: str) -> bool:
    """Whether a text is for `read_address`, and no path."""
    return "://" in text or _is_data_uri(text)


def read_address(address: str, *, allow_private: bool = False) -> Picture:
    """Reads an `http://` or `https://` address or a `data:` URI, and never a file of this machine.

    `allow_private` as in `fetch_url`. Raises ImageError as `read_sources`.
    """
    if _is_data_uri(address):
        return load_image(decode_data_uri(address), _data_name(address))
    return load_image(fetch_url(address, allow_private=allow_private), shorten(address))


def decode_data_uri(uri: str, name: str | None = None) -> bytes:
    """The content of a `data:` URI (RFC 2397), base64 or percent-encoded.

    `name` is what messages call it, if not by its beginning. Raises ImageError when it is damaged
    or holds more than MAX_BYTES.
    """
    header, comma, body = uri.partition(",")
    name = name or _data_name(uri)
    if not comma:
        raise ImageError(f"{name}: the data URI is damaged: it has no comma")
    try:
        data = unquote_to_bytes(body)
        if header.lower().endswith(";base64"):
            data = base64.b64decode(b"".join(data.split()), validate=True)
    except ValueError as exc:
        raise ImageError(f"{name}: the data URI is damaged ({exc})") from exc
    return _limited(data, name)


def fetch_url(
    url: str, *, allow_private: bool = False, resolve: Resolver = socket.getaddrinfo
) -> bytes:
    """Downloads an `http://` or `https://` address, directly: proxy variables are not heeded.

    Follows up to MAX_REDIRECTS redirects. Unless `allow_private`, every host on the way must have
    public addresses only, and the connection goes to the very address that was checked, so a name
    that changes its meaning in between gains nothing; TLS still verifies the name.

    Raises ImageError when the address is refused or unreachable, answers with anything but 200,
    sends more than MAX_BYTES, or all of it takes longer than MAX_SECONDS.
    """
    name = shorten(url)
    deadline = time.monotonic() + MAX_SECONDS
    try:
        for _ in range(MAX_REDIRECTS + 1):
            connection, sock = _connect(url, name, deadline, allow_private, resolve)
            with sock:
                response = _request(connection, sock, url, deadline)
                location = response.headers["Location"]
                if response.status in (301, 302, 303, 307, 308) and location:
                    # A header is Latin-1 to Python; the bytes of other characters are kept.
                    location = quote(location, safe=string.punctuation, encoding="latin-1")
                    url = urljoin(url, location)
                    continue
                return _read_body(response, name)
        raise ImageError(f"{name}: is redirected more than {MAX_REDIRECTS} times")
    except (TimeoutError, concurrent.futures.TimeoutError) as exc:
        raise ImageError(f"{name}: took longer than {MAX_SECONDS} s; try again later") from exc
    except socket.gaierror as exc:
        raise ImageError(f"{name}: its host cannot be found ({exc.strerror})") from exc
    except ssl.SSLCertVerificationError as exc:
        raise ImageError(
            f"{name}: the server's certificate is not valid ({exc.verify_message})"
        ) from exc
    except OSError as exc:
        raise ImageError(f"{name}: cannot be reached ({exc.strerror or exc})") from exc
    except http.client.HTTPException as exc:
        raise ImageError(f"{name}: the server's answer is damaged or was cut off") from exc
    except ValueError as exc:
        raise ImageError(f"{name}: is not a valid address ({exc})") from exc


class _TimedSocket(io.RawIOBase):
    """A socket as http.client uses it, of which every operation gets only the time that is left.

    A timeout of the socket's own would start anew with each byte of a slow server.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_left(self._deadline))
        self._sock.sendall(data)

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._deadline))
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        """Nothing: http.client closes before it has read the answer; `fetch_url` closes after."""


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _connect(
    url: str, name: str, deadline: float, allow_private: bool, resolve: Resolver
) -> tuple[http.client.HTTPConnection, socket.socket]:
    """An HTTP connection for one hop, and its open socket."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ImageError(f"{name}: only http and https are fetched, not '{parts.scheme}'")
    if not parts.hostname:
        raise ValueError("it names no host")
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    addresses = _look_up(parts.hostname, port, deadline, resolve)
    for address in addresses:
        if not (allow_private or _is_public(address[4][0])):
            raise ImageError(
                f"{name}: leads to the private address {address[4][0]}, from which nothing is "
                "fetched",
                "--allow-private-urls allows it",
            )
    sock = _open_socket(addresses, deadline)
    if not secure:
        return http.client.HTTPConnection(parts.hostname, port), sock
    context = ssl.create_default_context()
    try:
        sock.settimeout(_left(deadline))
        sock = context.wrap_socket(sock, server_hostname=parts.hostname)
    except BaseException:
        sock.close()
        raise
    return http.client.HTTPSConnection(parts.hostname, port, context=context), sock


def _look_up(host: str, port: int, deadline: float, resolve: Resolver) -> list[Any]:
    """What getaddrinfo says, in a thread, because nothing else can limit its time."""
    found: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()

    def work() -> None:
        try:
            found.set_result(resolve(host, port, type=socket.SOCK_STREAM))
        except Exception as exc:
            found.set_exception(exc)

    threading.Thread(target=work, daemon=True).start()
    return found.result(_left(deadline))


def _is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):  # what stands for an IPv4 address is as public as it
        if ip in _NAT64:
            ip = ipaddress.IPv4Address(ip.packed[-4:])
        else:
            ip = ip.ipv4_mapped or ip.sixtofour or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip in _SITE_LOCAL)


def _open_socket(addresses: list[Any], deadline: float) -> socket.socket:
    """A connection to the first address that answers; none may use up the others' time."""
    error = OSError("its host has no address")
    for i, (family, kind, protocol, _, address) in enumerate(addresses):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_left(deadline) / (len(addresses) - i))
            sock.connect(address)
            return sock
        except OSError as exc:
            sock.close()
            error = exc
    raise error


def _request(
    connection: http.client.HTTPConnection, sock: socket.socket, url: str, deadline: float
) -> http.client.HTTPResponse:
    connection.sock = cast(socket.socket, _TimedSocket(sock, deadline))
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # Spaces and other characters that people paste are encoded; what is encoded stays as it is.
    target = quote(target, safe=string.punctuation)
    headers = {"Accept": "image/*", "Connection": "close", "User-Agent": "omnivlm-edge"}
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


def _read_body(response: http.client.HTTPResponse, name: str) -> bytes:
    if response.status != 200:
        reason = http.client.responses.get(response.status, "")
        raise ImageError(f"{name}: the server answers {response.status} {reason}".rstrip())
    if (response.length or 0) > MAX_BYTES:  # the length that it announces, if any
        raise _too_large(name)
    data = _limited(response.read(MAX_BYTES + 1), name)
    if response.length:
        raise http.client.IncompleteRead(data, response.length)
    return data


def _limited(data: bytes, name: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise _too_large(name)
    return data


def _too_large(name: str) -> ImageError:
    fact = f"{name}: is larger than {MAX_BYTES >> 20} MiB"
    return ImageError(fact, "shrink it, or save it and give its path")


def _is_data_uri(text: str) -> bool:
    return text[:5].lower() == "data:"


def _data_name(uri: str) -> str:
    header, comma, _ = uri.partition(",")
    return shorten(header) + (",…" if comma else "")


def _read_stdin() -> bytes:
    if sys.stdin.isatty():
        raise ImageError("standard input is a terminal: pipe a picture into it (-i - < FILE)")
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
    except OSError as exc:
        raise ImageError(f"standard input cannot be read ({exc.strerror or exc})") from exc
    if not data:
        raise ImageError("standard input is empty: pipe a picture into it (-i - < FILE)")
    return _limited(data, "standard input")


def _read_clipboard() -> list[Picture]:
    """The picture in the clipboard, or the files that were copied there."""
    from PIL import ImageGrab, UnidentifiedImageError

    content = None
    try:
        content = ImageGrab.grabclipboard()
    except UnidentifiedImageError:  # xclip gives text when it is asked for a picture
        pass
    except NotImplementedError as exc:  # Linux has several clipboards and no one door to them
        raise ImageError(
            "the clipboard cannot be read: install xclip (X11) or wl-clipboard (Wayland: wl-paste)"
        ) from exc
    except Exception as exc:  # a failing tool, no display, a damaged picture
        raise ImageError(f"the clipboard cannot be read ({exc})") from exc
    if not content:
        raise ImageError("the clipboard holds no picture: copy one first")
    if isinstance(content, list):
        return [load_image(path) for path in content]
    return [load_image(content, "the clipboard")]


def _find_files(text: str) -> list[str]:
    """The path itself, or the files that match it as a pattern, in natural order."""
    path = os.path.expanduser(text)
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    try:
        matches = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
    except ValueError as exc:  # a null byte
        raise ImageError(f"{shorten(text)}: cannot be read ({exc})") from exc
    if not matches:
        raise ImageError(f"{shorten(text)}: there is no such file, nor one that matches it")
    return sorted(matches, key=_natural)


def _natural(path: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]
