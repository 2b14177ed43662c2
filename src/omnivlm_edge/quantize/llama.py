"""llama.cpp's quantizer; run by text.py in a child process.

It keeps what it is told: one type and one vector of importance for each matrix by its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import re
import sys
import threading
import time
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as c
import numpy as np

_ROWS_IN_MEMORY = 256 << 20  # bytes; llama.cpp's own limit is 8 GiB


def main() -> None:
    """Follows the order on stdin, with llama.cpp's log on stderr; exits with its status."""
    parent, order = pickle.load(sys.stdin.buffer)
    threading.Thread(target=end_with, args=(parent, order["output"]), daemon=True).start()
    sys.exit(quantize(**order))


def end_with(parent: int, output: bytes) -> None:
    """Ends this process, and what it has written, when its parent has been killed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    with contextlib.suppress(OSError):
        os.unlink(output)
    os._exit(1)


def quantize(
    source: bytes,
    output: bytes,
    types: dict[str, int],
    importance: dict[str, Any],
    keys: dict[str, str | int],
    n_threads: int,
    allow_requantize: bool,
) -> int:
    """0 when `output` is written.

    `types` are numbers of ggml types, `importance` float32 [n_per_row] for each of their tensors,
    `keys` metadata to add: text or unsigned numbers.
    """
    default = ctypes.cast(ctypes.c_void_p(0), llama_cpp.llama_log_callback)
    llama_cpp.llama_log_set(default, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0  # any quantized one, or no types are asked for
    params.nthread = n_threads
    params.allow_requantize = allow_requantize
    params.max_buf_size = _ROWS_IN_MEMORY
    # Each array ends with an entry of zeros.
    overrides = (c.llama_model_tensor_override * (len(types) + 1))()
    for override, (name, number) in zip(overrides, types.items(), strict=False):
        override.pattern, override.type = f"^{re.escape(name)}$".encode(), number
    params.tt_overrides = overrides
    weights = (c.llama_model_imatrix_data * (len(importance) + 1))()
    for weight, (name, values) in zip(weights, importance.items(), strict=False):
        data = np.ctypeslib.as_ctypes(values)
        weight.name, weight.size = name.encode(), len(values)
        weight.data = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
    params.imatrix = weights
    entries = (c.llama_model_kv_override * (len(keys) + 1))()
    for entry, (key, value) in zip(entries, keys.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = c.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            entry.tag = c.LLAMA_KV_OVERRIDE_TYPE_STR
            entry.value.val_str = value.encode()[:127]  # the length of its field
    params.kv_overrides = entries
    return int(llama_cpp.llama_model_quantize(source, output, ctypes.byref(params)))
