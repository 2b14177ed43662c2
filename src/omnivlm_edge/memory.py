"""Memory: what a model will need, and what the process has used."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import struct
from functools import partial
from pathlib import Path

from .errors import DeviceError, OptionError
from .model_file import ModelFile

# What a run takes besides the weights and the key-value cache: Python, the libraries, the
# vocabulary and the activations. Measured with files of the published sizes on a CPU, at the peak.
ALLOWANCE = 145_000_000

# Memory of a packed vision weight. `ggml` uses the file as it is.
_BYTES_PER_WEIGHT = {"int8": 1.03, "int8-fast": 1.01, "int8-block32": 1.26, "bf16": 2.0, "f32": 4.0}
# A text weight under q4_k_m, at the published shapes.
_SMALL_BYTES_PER_WEIGHT = 0.582


def memory_needed(
    text: ModelFile,
    vision: ModelFile,
    n_ctx: int,
    *,
    n_sequences: int = 1,
    precision: str = "auto",
    low_memory: bool = False,
    on_cpu: bool = True,
) -> int:
    """Bytes that a model takes: weights, key-value cache (F16) and the allowance for the rest.

    `precision`, `low_memory` and `on_cpu` say how pictures are encoded. Raises ModelFileError when
    the text model's header lacks its dimensions.
    """
    n_ctx = min(n_ctx, text.number("context_length") * n_sequences)
    head = text.width // text.number("attention.head_count")
    kv_width = head * text.number("attention.head_count_kv")
    cache = 2 * 2 * text.number("block_count") * kv_width * n_ctx  # keys and values, 2 bytes each
    pictures = _vision_memory(vision, precision, low_memory, on_cpu)
    return text.size + pictures + cache + ALLOWANCE


def _vision_memory(vision: ModelFile, precision: str, low_memory: bool, on_cpu: bool) -> int:
    from ._native import cpu_precision  # here, because commands that load no model need no ggml

    resolved = cpu_precision(precision) if on_cpu else "ggml"
    if resolved == "ggml":
        return vision.size
    # With low_memory one matrix at a time is expanded, while the text model's pages are given back.
    return 0 if low_memory else round(vision.parameters * _BYTES_PER_WEIGHT[resolved])


def check_budget(
    budget: int,
    text: ModelFile,
    vision: ModelFile,
    n_ctx: int,
    *,
    n_sequences: int,
    precision: str,
    low_memory: bool,
    on_cpu: bool,
) -> None:
    """Raises OptionError for a model that takes more than `budget` bytes; says what would fit."""
    need = partial(memory_needed, text, vision, n_ctx, n_sequences=n_sequences, on_cpu=on_cpu)
    needed = need(precision=precision, low_memory=low_memory)
    if needed <= budget:
        return
    saved = max(0, text.size - round(text.parameters * _SMALL_BYTES_PER_WEIGHT))
    others = [
        ("vision precision int8", need(precision="int8", low_memory=low_memory)),
        ("low_memory (--low-memory)", need(precision=precision, low_memory=True)),
        ("its q4_k_m build", need(precision=precision, low_memory=low_memory) - saved),
        ("its q4_k_m build and low_memory", need(precision=precision, low_memory=True) - saved),
    ]
    fitting = [f"{what} (about {_gb(size)})" for what, size in others if size <= budget]
    least = min(size for _, size in others)
    advice = f"take {fitting[0]}" if fitting else f"the least that it can do with is {_gb(least)}"
    raise OptionError(
        f"the model needs about {_gb(needed)}, more than the {_gb(budget)} allowed: {advice}"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


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
