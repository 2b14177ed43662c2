"""Contenders in processes of their own, of which one at a time runs.

No two of them may load their libraries into one process: llama.cpp's bindings load a second copy
of ggml. One that waits for its turn is stopped by a signal, so that its threads do not spin.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .base import Contender, Files, Question, SkippedError, Timed, peak_megabytes

GRACE = 5  # seconds
_CONTEXT = multiprocessing.get_context("spawn")


class ChildError(Exception):
    """A contender ended: `status` is `skipped` (it cannot run here) or `failed`."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Child:
    """A process with one contender in it. What it logs goes into a file in the scratch directory.

    Raises ChildError, as every method does.
    """

    def __init__(self, contender: Contender, files: Files) -> None:
        name = "".join(c if c.isalnum() else "-" for c in contender.name.lower())
        self._log = files.scratch / f"{name}.log"
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_serve, args=(theirs, contender, files, self._log), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of `Worker` returns, in the child; it runs until it has answered."""
        pid = self._process.pid
        assert pid is not None
        os.kill(pid, signal.SIGCONT)
        try:
            self._pipe.send((method, arguments))
            status, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            status, value = "failed", f"ended with {self._process.exitcode}; see {self._log.name}"
        if status != "ok":
            self.close()
            raise ChildError(status, value)
        os.kill(pid, signal.SIGSTOP)
        return value

    def close(self) -> None:
        """Ends the process: by itself within some seconds, or by force."""
        self._pipe.close()
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGCONT)
        self._process.join(GRACE)
        self._process.kill()
        self._process.join()


class Worker:
    """The child's side: a contender that is made ready, loaded and measured."""

    def __init__(self, contender: Contender, files: Files) -> None:
        self._contender, self._files = contender, files
        self._module = importlib.import_module(f"{__package__}.{contender.module}")
        self._loaded: Any = None

    def prepare(self) -> None:
        """Makes the files that the contender needs."""
        self._module.prepare(self._files, **self._contender.options)

    def load(self, threads: int) -> float:
        """Seconds from the files to something that can be asked, libraries not counted."""
        started = time.perf_counter()
        self._loaded = self._module.load(self._files, threads, **self._contender.options)
        return time.perf_counter() - started

    def libraries(self) -> dict[str, str]:
        return {name: version(name) for name in self._module.LIBRARIES}

    def encode(self, picture: Path, count: int) -> float:
        """Seconds in which the picture is encoded, `count` times in one call."""
        pixels = read_picture(picture, self._loaded.side)
        converted = self._loaded.convert(np.repeat(pixels[None], count, 0))
        started = time.perf_counter()
        tokens = self._loaded.encode(converted)
        seconds = time.perf_counter() - started
        if len(tokens) != count or not tokens.size or not np.isfinite(tokens).all():
            raise ValueError(f"encoded into {list(tokens.shape)} values, or into what is no number")
        return seconds

    def answer(self, question: Question) -> Timed:
        timed: Timed = self._loaded.answer(question)
        return timed

    def peak(self) -> int:
        return peak_megabytes()


def read_picture(path: Path, side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A file -> uint8 [side, side, 3], as our package resizes it."""
    with Image.open(path) as image:
        resized = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def _serve(pipe: Connection, contender: Contender, files: Files, log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    worker = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:  # the parent is done with it
            return
        try:
            worker = worker or Worker(contender, files)
            reply = "ok", getattr(worker, method)(*arguments)
        except (ImportError, SkippedError) as exc:
            reply = "skipped", str(exc)
        except Exception as exc:
            reply = "failed", f"{type(exc).__name__}: {exc}"
        pipe.send(reply)
