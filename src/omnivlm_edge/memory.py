"""Memory: what a model will need, and what the process has used."""

from __future__ import annotations

import resource
import sys

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


def peak_rss() -> int:
    """The most memory that this process has had resident so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
