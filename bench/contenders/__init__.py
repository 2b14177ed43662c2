"""Ways to run the same model, one file each, for bench/side_by_side.py.

A contender's module has `LIBRARIES`, the packages whose versions are recorded; `prepare(files,
**options)`, which makes the files that it needs where they are missing; and `load(files, threads,
**options)`, which gives an `Encoder` or an `Answerer` (see base.py). It may import what is not
installed everywhere: the import is tried in a process of its own.
"""

from __future__ import annotations

from .base import Contender

STOCK_ENCODER = "llama.cpp F16"
STOCK_ANSWERER = "llama.cpp F16, text F16"

#: Encode pictures, and load nothing else: their memory is that of the vision path.
ENCODERS = (
    Contender(STOCK_ENCODER, "stock"),
    Contender("ours int8", "ours", {"precision": "int8"}),
    Contender("ours int8-fast", "ours", {"precision": "int8-fast"}),
    Contender("ours int8-block32", "ours", {"precision": "int8-block32"}),
    Contender("ours bf16", "ours", {"precision": "bf16"}),
    Contender("ours f32", "ours", {"precision": "f32"}),
    Contender("OpenVINO INT8", "ov", {"precision": "int8"}),
    Contender("OpenVINO bf16", "ov", {"precision": "bf16"}),
    Contender("PyTorch bf16", "pytorch"),
)

#: Answer questions about pictures: their memory is that of the whole program.
ANSWERERS = (
    Contender(STOCK_ANSWERER, "stock", {"text": "f16"}),
    Contender("llama.cpp F16, text Q4_K_M", "stock", {"text": "q4_k_m"}),
    Contender("ours, F16 files", "ours", {"precision": "auto", "build": "f16"}),
    Contender("ours, 4-bit files", "ours", {"precision": "auto", "build": "4-bit"}),
)
