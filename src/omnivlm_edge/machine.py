"""What this machine is, and the most that it can do: for records of measurements."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from . import _native

# Of all that a CPU says of itself: what the kernels care for, and whether there is a hypervisor.
_FEATURES = re.compile(
    r"avx|amx_|fma$|f16c$|sse4_2$|hypervisor$"
    r"|(asimd|asimddp|asimdhp|fphp|i8mm|bf16|sve|sve2|sme|svei8mm)$"
)
_BANDWIDTH_BYTES = 256_000_000  # more than caches hold
_BANDWIDTH_PASSES = 10
_CHUNK = 16_000_000  # bytes that a thread reads at once


def describe_machine(root: Path = Path("/")) -> dict[str, Any]:
    """CPU, its features, cores, memory in bytes, system, and what else is known of the machine.

    `root` is where the files of a Linux machine hang.
    """
    if platform.system() == "Darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
        features = parse_sysctl(_output("sysctl", "hw.optional"))
        board = _output("sysctl", "-n", "hw.model")
    else:
        name, features = parse_cpuinfo(_read(root / "proc/cpuinfo"))
        board = _read(root / "proc/device-tree/model").strip("\0\n ")
    governor = root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    return {
        "cpu": name or platform.processor() or platform.machine(),
        "features": features,
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "board": board or None,
        "governor": _read(governor).strip() or None,
        "power_mode": parse_nvpmodel(_output("nvpmodel", "-q")),
    }


def parse_cpuinfo(text: str) -> tuple[str, list[str]]:
    """The CPU's name (ARM has none) and features in a Linux /proc/cpuinfo."""
    name = re.search(r"^model name\s*: *(.*)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*: *(.*)$", text, re.M)
    known = flags[1].split() if flags else []
    return name[1].strip() if name else "", sorted(filter(_FEATURES.match, known))


def parse_sysctl(text: str) -> list[str]:
    """The features that `sysctl hw.optional` of a Mac has as 1, in lower case."""
    found = re.findall(r"^hw\.optional\.(?:arm\.FEAT_|arm\.)?(\w+): 1$", text, re.M)
    wanted = re.compile(r"avx|dotprod$|i8mm$|bf16$|fp16$|sme|neon$|fma$")
    return sorted({name.lower() for name in found if wanted.match(name.lower())})


def parse_nvpmodel(text: str) -> str | None:
    """The power mode in the output of a Jetson's `nvpmodel -q`."""
    found = re.search(r"NV Power Mode: *(\S.*)$", text, re.M)
    return found[1].strip() if found else None


def commit(package: Path = Path(__file__).parent) -> str | None:
    """What the installed package was built from, `-dirty` with changes; None where nobody knows.

    CMake writes it down. Nobody knows that of an editable installation.
    """
    return _read(package / "commit.txt").strip() or None


def peak_bandwidth(n_threads: int) -> float:
    """GB (1e9 bytes) a second that so many threads read from memory; the best of ten passes."""
    array = np.ones(_BANDWIDTH_BYTES // 4, np.float32)
    chunks = np.array_split(array, max(n_threads, _BANDWIDTH_BYTES // _CHUNK))
    best = float("inf")
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(_BANDWIDTH_PASSES):
            started = time.perf_counter()
            list(pool.map(np.max, chunks))  # NumPy lets other threads run meanwhile
            best = min(best, time.perf_counter() - started)
    return array.nbytes / best / 1e9


def peak_gops(precision: str, n_threads: int) -> float | None:
    """1e9 operations a second of the vision tower's matrix kernel; None where there is none."""
    return _native.peak_gops(precision, n_threads) or None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    """What a command prints; nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
