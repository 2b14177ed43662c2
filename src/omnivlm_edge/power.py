"""Watts and unified memory while something runs, from a tool of the system that tells them.

On a Jetson that is tegrastats; on a Mac powermetrics, which only root may run. Elsewhere there is
none.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

INTERVAL_MS = 200


@dataclass(frozen=True)
class Reading:
    """One line of the tool: what it tells of the machine, None where it tells nothing of it."""

    watts: float | None = None
    memory_bytes: int | None = None  # in use, by the whole machine


Parser = Callable[[str], Reading | None]

# A Jetson's rails: the board's input where it has such a sensor, else all that there are.
_INPUTS = ("VDD_IN", "POM_5V_IN")
_RAIL = re.compile(r"\b((?:VDD|POM|VIN)_\w+) (\d+)(?:mW)?(?:/\d+(?:mW)?)?")
_POWER = (
    re.compile(r"^Combined Power \(CPU \+ GPU \+ ANE\): ([\d.]+) (m?W)"),
    re.compile(r"^Intel energy model derived package power .*: ([\d.]+) ?(m?W)"),
)


def parse_tegrastats(line: str) -> Reading | None:
    """One line of a Jetson's tegrastats; None for any other line.

    Boards without a sensor at their input have their rails added up.
    """
    ram = re.search(r"\bRAM (\d+)/\d+MB", line)
    if ram is None:
        return None
    rails = {name: int(value) / 1e3 for name, value in _RAIL.findall(line)}
    whole = next((rails[name] for name in _INPUTS if name in rails), None)
    watts = whole if whole is not None or not rails else sum(rails.values())
    return Reading(watts, int(ram[1]) * 2**20)


def parse_powermetrics(line: str) -> Reading | None:
    """One line of macOS's powermetrics; None for any but the one with the whole chip's power."""
    for pattern in _POWER:
        if found := pattern.match(line):
            return Reading(watts=float(found[1]) / (1e3 if found[2] == "mW" else 1))
    return None


def find_meter() -> Meter | None:
    """The meter of this machine, if it has one that may be used."""
    if tegrastats := shutil.which("tegrastats"):
        command = [tegrastats, "--interval", str(INTERVAL_MS)]
        return Meter("tegrastats", command, parse_tegrastats)
    if platform.system() == "Darwin" and os.geteuid() == 0:
        command = ["/usr/bin/powermetrics", "-i", str(INTERVAL_MS)]
        command += ["--samplers", "cpu_power,gpu_power"]
        return Meter("powermetrics", command, parse_powermetrics)
    return None


class Meter:
    """Runs a tool that prints readings for ever, and keeps them: use it in a `with` block.

    A tool that cannot be started, or stops, leaves fewer readings and is no error.
    """

    def __init__(self, name: str, command: Sequence[str], parse: Parser) -> None:
        self.name = name
        self._command = command
        self._parse = parse
        self._readings: list[tuple[float, Reading]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Meter:
        self._readings = []
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
            )
        except OSError:
            return self
        threading.Thread(target=self._collect, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def between(self, start: float, end: float) -> list[Reading]:
        """The readings between two times of `time.monotonic`."""
        return [reading for when, reading in list(self._readings) if start <= when <= end]

    def _collect(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                reading = self._parse(line)
                if reading is not None:
                    self._readings.append((time.monotonic(), reading))


def watts(readings: Sequence[Reading]) -> dict[str, float] | None:
    """Mean and maximum in W; None without readings."""
    found = [reading.watts for reading in readings if reading.watts is not None]
    return {"mean_w": sum(found) / len(found), "max_w": max(found)} if found else None


def memory_growth(readings: Sequence[Reading]) -> int | None:
    """How far above the first reading the memory in use rose, in bytes; None without readings."""
    found = [reading.memory_bytes for reading in readings if reading.memory_bytes is not None]
    return max(found) - found[0] if found else None
