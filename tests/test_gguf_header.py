"""The header of GGUF files, against gguf-py's reader, and every way to be wrong."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from omnivlm_edge import ModelFileError
from omnivlm_edge.gguf_header import parse_header, read_header
from omnivlm_edge.model_file import inspect_file
from tiny_gguf import VisionShape, write_gguf, write_mmproj

DEMO = Path(__file__).parents[1] / "src" / "omnivlm_edge" / "demo"
MAGIC = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize("path", sorted(DEMO.glob("*.gguf")), ids=lambda path: path.name)
def test_says_what_gguf_py_says(path: Path) -> None:
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert not header.partial
    values = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and field.types[0] != gguf.GGUFValueType.ARRAY
    }
    assert header.metadata == values
    tensors = [
        (t.name, tuple(t.shape.tolist()), int(t.tensor_type), t.data_offset - reader.data_offset)
        for t in reader.tensors
    ]
    assert [(t.name, t.shape, t.type, t.offset) for t in header.tensors] == tensors
    assert header.size + -header.size % reader.alignment == reader.data_offset


def test_every_type_of_value(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "x")
    for kind, value in {
        "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 4_000_000_000,
        "int32": -2_000_000_000, "uint64": 2**63, "int64": -(2**62), "float32": 0.5,
        "float64": 0.1, "bool": True, "string": "ä",
    }.items():  # fmt: skip
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_array("texts", ["a", "bc", ""])
    writer.add_string("last", "here")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = read_header(tmp_path / "x.gguf").metadata
    assert metadata["uint64"] == 2**63
    assert metadata["int8"] == -100
    assert metadata["bool"] is True
    assert metadata["string"] == "ä"
    assert metadata["float64"] == 0.1
    assert metadata["last"] == "here"
    assert not {"numbers", "texts"} & metadata.keys()


def test_any_beginning_of_a_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    data = write_mmproj(tmp_path / "x.gguf").read_bytes()
    whole = read_header(tmp_path / "x.gguf")
    complete = 0
    for end in range(4, 6000, 7):
        header = parse_header(data[:end], "x.gguf")
        assert header.metadata.items() <= whole.metadata.items()
        assert header.tensors == whole.tensors[: len(header.tensors)]
        if not header.partial:
            assert header == whole
            complete += 1
    assert complete
    (tmp_path / "cut.gguf").write_bytes(data[:1000])
    with pytest.raises(ModelFileError, match=r"cut\.gguf: is damaged or cut off"):
        read_header(tmp_path / "cut.gguf")


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


HUGE = 2**64 - 1
DAMAGED = {
    "nothing": (b"", "is not a GGUF file but empty"),
    "another format": (b"PK\x03\x04 and so on", "is not a GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<I", 1), "is GGUF version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3), "is GGUF version 50331648"),
    "only the magic": (b"GGUF", "is damaged or cut off"),
    "endless keys": (MAGIC + struct.pack("<QQ", 0, HUGE), "cut off"),
    "endless tensors": (MAGIC + struct.pack("<QQ", HUGE, 0), "cut off"),
    "endless name": (MAGIC + struct.pack("<QQQ", 0, 1, HUGE), "cut off"),
    "endless string": (
        MAGIC + struct.pack("<QQ", 0, 1) + key(b"k", 8, struct.pack("<Q", HUGE)), "cut off"
    ),
    "endless numbers": (
        MAGIC + struct.pack("<QQ", 0, 1) + key(b"k", 9, struct.pack("<IQ", 4, HUGE)), "cut off"
    ),
    "endless strings": (
        MAGIC + struct.pack("<QQ", 0, 1) + key(b"k", 9, struct.pack("<IQQ", 8, HUGE, HUGE)),
        "cut off",
    ),
    "unknown type": (MAGIC + struct.pack("<QQ", 0, 1) + key(b"k", 99, b""), "unknown type 99"),
    "array of arrays": (
        MAGIC + struct.pack("<QQ", 0, 1) + key(b"k", 9, struct.pack("<IQ", 9, 1)), "unknown type 9"
    ),
    "dimensions": (
        MAGIC + struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<I", 5), "has 5 dimensions"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=f"x.gguf: .*{message}"):
        read_header(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path, tmp_path / "pipe.gguf"):
        with pytest.raises(ModelFileError, match="is not a file"):
            read_header(path)
    with pytest.raises(ModelFileError, match="there is no such file"):
        read_header(tmp_path / "none.gguf")


def test_kind_width_and_quantization(tmp_path: Path, tiny_model: Path) -> None:
    shape = VisionShape(n_text=48)
    for layout in ("clip", "siglip"):
        file = inspect_file(write_mmproj(tmp_path / f"{layout}.gguf", shape, layout=layout))
        assert (file.kind, file.width, file.merge_factor) == ("vision", 48, 9)
    # Without general.file_type: the type that most values have, whatever the biases are.
    keys = {"general.architecture": "llama", "llama.embedding_length": 64}
    tensors = {f"{i}.weight": np.zeros((64, 64), "float32") for i in range(3)}
    tensors |= {f"{i}.bias": np.zeros(64, "float32") for i in range(9)}
    for dtype in ("q8_0", "bf16"):
        file = inspect_file(write_gguf(tmp_path / f"{dtype}.gguf", keys, tensors, dtype))
        assert (file.kind, file.width, file.quantization) == ("text", 64, dtype.upper())
        assert file.parameters == 3 * 64 * 64 + 9 * 64
    assert {inspect_file(path).quantization for path in tiny_model.glob("*.gguf")} == {"F32"}
