"""A folder that fills -> the same stream of items, without an end."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import ImageError, OptionError
from ..image import load_image
from .inputs import Item, is_picture, walk

SETTLE_SECONDS = 1.0  # a file that nobody has written to for so long may be complete
GIVE_UP_SECONDS = 30.0  # one that cannot be decoded for so long is damaged
_RESCAN_SECONDS = 60.0  # events get lost: on network file systems, or when too many come
_TICK_MS = 250


def watch_folder(folder: str, stop: threading.Event) -> Iterator[Item]:
    """The pictures in a folder and below it, and those that come later, until `stop`.

    A picture may come several times: whoever takes them looks at the key. One that is still being
    copied waits until it is there: its size and time stand still, and all of it can be decoded.
    """
    try:
        from watchfiles import watch
    except ImportError as exc:
        raise OptionError(
            'watching a folder needs watchfiles: pip install "omnivlm-edge[batch]"'
        ) from exc
    if not os.path.isdir(folder):
        raise ImageError(f"{folder}: there is no such folder")
    waiting: dict[str, _Arrival] = {}
    scanned = float("-inf")
    # An empty set comes after each tick: the watch has begun before the folder is read.
    for changes in watch(
        folder,
        watch_filter=None,
        stop_event=stop,
        debounce=_TICK_MS,
        rust_timeout=_TICK_MS,
        yield_on_timeout=True,
        raise_interrupt=False,
        ignore_permission_denied=True,
    ):
        for _, path in changes:
            inside = os.path.relpath(path, os.path.realpath(folder))
            if any(part.startswith(".") for part in inside.split(os.sep)):
                continue
            path = os.path.join(folder, inside)
            if os.path.isdir(path):  # one that was moved here with all its pictures
                if not os.path.islink(path):
                    yield from _scan(path, waiting)
            elif is_picture(os.path.basename(path)):
                waiting.setdefault(path, _Arrival(path))
        if time.monotonic() - scanned > _RESCAN_SECONDS:
            scanned = time.monotonic()
            yield from _scan(folder, waiting)
        for path, arrival in list(waiting.items()):
            if arrival.is_over():
                del waiting[path]
                if arrival.exists:
                    yield Item(path, Path(path))


class _Arrival:
    """A file that may still be written to."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._state: tuple[int, ...] = ()
        self._since = time.monotonic()
        self._tried = False
        self.exists = True

    def is_over(self) -> bool:
        """Whether it is complete, or hopeless, or gone."""
        now = time.monotonic()
        try:
            found = os.stat(self._path)
        except OSError:
            self.exists = False
            return True
        if not stat.S_ISREG(found.st_mode):
            self.exists = False
            return True
        state = (found.st_size, found.st_mtime_ns, found.st_ino)
        if state != self._state:
            self._state, self._since, self._tried = state, now, False
            return False
        if now - self._since > GIVE_UP_SECONDS:
            return True
        if self._tried or now - self._since < SETTLE_SECONDS:
            return False
        self._tried = True
        return _is_decodable(self._path)


def _scan(folder: str, waiting: dict[str, _Arrival]) -> Iterator[Item]:
    """Files of long ago are complete; the others wait."""
    for item in walk(folder):
        if item.source is None:
            yield item
        elif item.key not in waiting:
            if _age(item.key) > GIVE_UP_SECONDS:
                yield item
            else:
                waiting[item.key] = _Arrival(item.key)


def _age(path: str) -> float:
    try:
        return time.time() - os.stat(path).st_mtime
    except OSError:
        return 0.0


def _is_decodable(path: str) -> bool:
    try:
        load_image(path)
    except ImageError:
        return False
    return True
