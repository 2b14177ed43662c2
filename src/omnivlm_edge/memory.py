"""Memory: what a model will need, and what the process has used."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import resource
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .errors import DeviceError, OptionError
from .model_file import ModelFile

# What a run takes besides the weights and the key-value cache, in bytes; measured at the peak, on a
# CPU, with files of the published sizes and the demo's.
_PROGRAM = 80_000_000  # Python and the libraries
_WORD = 350  # of the vocabulary, with the merges that make it
_COPIES = 25_000_000  # of a quantized text model: what is rearranged and read in the file as well
_BATCH = 256  # positions computed at once
PICTURE_PIXELS = 12_200_000  # a phone's 4032 x 3024; two copies while it is turned
_PIXEL = 4
ALLOWANCE = 280_000_000  # all of it together, at the published sizes

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
    """Bytes that a model takes at most: weights, key-value cache (F16) and what runs beside them.

    That is the program, the vocabulary, what is computed, and the decoding of one picture of
    PICTURE_PIXELS; larger ones take more. `precision`, `low_memory` and `on_cpu` say how pictures
    are encoded. Raises ModelFileError when a header lacks the dimensions.
    """
    n_ctx = min(n_ctx, text.number("context_length") * n_sequences)
    head = text.width // text.number("attention.head_count")
    kv_width = head * text.number("attention.head_count_kv")
    cache = 2 * 2 * text.number("block_count") * kv_width * n_ctx  # keys and values, 2 bytes each
    pictures = _vision_memory(vision, precision, low_memory, on_cpu)
    quantized = text.size < text.parameters * 1.5
    copies = 0 if low_memory or not quantized else _COPIES
    return text.size + pictures + cache + copies + memory_beside(text, vision)


def memory_beside(text: ModelFile, vision: ModelFile) -> int:
    """Bytes besides the weights and the key-value cache."""
    words = max(shape[1] for shape in _shapes(text, "token_embd.weight"))
    n_patches = (vision.number("image_size") // vision.number("patch_size")) ** 2
    hidden = max(shape[1] for shape in _shapes(vision, "v.blk.0.ffn"))
    seen = n_patches * (hidden + 4 * vision.number("embedding_length"))
    read = _BATCH * (2 * text.number("feed_forward_length") + 4 * text.width)
    computed = 4 * (seen + read)  # float32
    return _PROGRAM + _WORD * words + computed + 2 * _PIXEL * PICTURE_PIXELS


def _shapes(file: ModelFile, prefix: str) -> list[Sequence[int]]:
    """Those of a file's matrices whose names begin so."""
    tensors = [tensor for tensor in file.header.tensors if tensor.name.startswith(prefix)]
    return [tensor.shape for tensor in tensors if len(tensor.shape) == 2] or [(0, 0)]


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
    precise = precision, low_memory
    int8, lean = ("int8", low_memory), ("int8", True)
    others = [
        ("--vision-precision int8", int8, False),
        ("--low-memory", lean, False),
        (_QUANTIZE, precise, True),
        (f"{_QUANTIZE}, and --vision-precision int8", int8, True),
        (f"{_QUANTIZE}, and --low-memory", lean, True),
    ]
    sizes: dict[str, int] = {}
    for advice, (how, leaner), smaller in others:
        size = need(precision=how, low_memory=leaner) - saved * smaller
        if size < needed and size not in sizes.values():  # else it changes nothing
            sizes[advice] = size
    fitting = [f"{advice} ({_mb(size)})" for advice, size in sizes.items() if size <= budget]
    least = min([needed, *sizes.values()])
    what = f"the least that it can do with is {_mb(least)}"
    if fitting:
        what = f"what fits: {'; or '.join(fitting)}"
    raise OptionError(
        f"the model needs about {_mb(needed)}, more than the {_mb(budget, math.floor)} allowed: "
        f"{what}"
    )


_QUANTIZE = "files made by `omnivlm-edge quantize … --q4_k_m`"


def _mb(size: int, to_whole: Callable[[float], int] = math.ceil) -> str:
    """In MB below 10 GB; a need is rounded up."""
    whole = to_whole(size / 1e6)
    return f"{whole:,} MB" if whole < 10_000 else f"{to_whole(size / 1e8) / 10:,.1f} GB"


def check_fits(needed: int, total: int, place: str) -> None:
    """Raises DeviceError when a memory of `total` bytes is smaller than what is needed."""
    if needed > total:
        raise DeviceError(
            f"the model needs about {_mb(needed)}, and {place} has {_mb(total, math.floor)} in "
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
