"""Memory: what a model will need, and what the process has used."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import struct
from pathlib import Path

from .errors import DeviceError
from .model_file import ModelFile

# What a run takes besides the weights and the key-value cache: Python, the libraries and the
# activations. Measured: 2,080 MB at the peak with files of 957.6 and 993.9 MB and 2048 positions
# (full-size model, F16, CPU; bench/results/full_size.jsonl), rounded up.
ALLOWANCE = 130_000_000


def memory_needed(text: ModelFile, vision: ModelFile, n_ctx: int) -> int:
    """Bytes that a model takes: weights, key-value cache (F16) and the allowance for the rest.

    Raises ModelFileError when the text model's header lacks its dimensions.
    """
    head = text.width // text.number("attention.head_count")
    kv_width = head * text.number("attention.head_count_kv")
    cache = 2 * 2 * text.number("block_count") * kv_width * n_ctx  # keys and values, 2 bytes each
    return text.size + vision.size + cache + ALLOWANCE


def check_fits(needed: int, total: int, place: str) -> None:
    """Raises DeviceError when a memory of `total` bytes is smaller than what is needed."""
    if needed > total:
        raise DeviceError(
            f"the model needs about {needed / 1e9:.1f} GB, and {place} has {total / 1e9:.1f} GB in "
            "all: take a smaller quantization"
        )


def peak_rss() -> int:
    """The most memory that this process has had resident so far, in bytes.

    Linux's `ru_maxrss` would count what the process that started this one had.
    """
    try:
        return parse_peak(Path("/proc/self/status").read_text())
    except (OSError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024


def parse_peak(status: str) -> int:
    """The peak in bytes of a /proc/PID/status. Raises ValueError where there is none."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.M)
    if found is None:
        raise ValueError("no VmHWM")
    return int(found[1]) * 1024


_RUSAGE_INFO_V4 = 4
_RUSAGE_V4_SIZE = 296  # struct rusage_info_v4 of sys/resource.h: 16 bytes and 35 uint64
_FOOTPRINT_OFFSET = 16 + 28 * 8  # ri_lifetime_max_phys_footprint


def peak_footprint() -> int | None:
    """macOS: the largest physical footprint of this process so far, in bytes; elsewhere None.

    That is Activity Monitor's "Memory": it counts Metal's buffers and compressed pages, but not
    those of mapped files.
    """
    if platform.system() != "Darwin":
        return None
    usage = ctypes.create_string_buffer(_RUSAGE_V4_SIZE)
    library = ctypes.CDLL("/usr/lib/libproc.dylib")
    if library.proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, usage) != 0:
        return None
    return parse_rusage(usage.raw)


def parse_rusage(usage: bytes) -> int:
    """The largest footprint in a `rusage_info_v4`, in bytes."""
    (peak,) = struct.unpack_from("=Q", usage, _FOOTPRINT_OFFSET)
    return int(peak)
