"""The published mmproj (architecture `siglip`) -> ours (architecture `clip`).

The tensors keep their types and bytes. What changes: names (the published file calls the widening
half of each MLP ffn_down and the narrowing half ffn_up), keys, and the pooling head is left out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGUFReader, LlamaFileType
from gguf.gguf_reader import ReaderTensor

from ..errors import ModelFileError
from ..gguf_header import read_header
from ..prompt import check_variant, default_variant
from .config import Section, VisionConfig, projector_from_shapes
from .keys import MMPROJ_ARCHITECTURE, add_mmproj_keys
from .output import OutFile, OutTensor, publish, report_unused
from .tensor_map import UNUSED_PUBLISHED, Rule, mmproj_rules

PUBLISHED_ARCHITECTURE = "siglip"

_LAYER_NORM_EPS = 1e-6  # the layout has no key for it; its runtime always used this
_PROJECTOR_WEIGHTS = ("mm.0.weight", "mm.2.weight")


def convert_mmproj(old: Path, out_dir: Path, *, variant: str | None = None) -> Path:
    """Write `old` in our layout into `out_dir`, under the same file name.

    The published layout names no prompt variant: without `variant`, the projector's shape chooses.
    """
    old, out_dir = Path(old), Path(out_dir)
    reader = open_gguf(old)
    values = {key: field.contents() for key, field in reader.fields.items()}
    keys, tensors = Section(values, str(old), ModelFileError), {t.name: t for t in reader.tensors}
    architecture = keys.present("general.architecture")
    if architecture != PUBLISHED_ARCHITECTURE:
        raise ModelFileError(
            f"{old}: has the architecture {architecture!r}; only a published vision file "
            f"({PUBLISHED_ARCHITECTURE!r}) is converted, others are used as they are"
        )
    vision = _vision(keys)
    try:
        first, second = (row_major_shape(_find(tensors, name, old)) for name in _PROJECTOR_WEIGHTS)
        projector = projector_from_shapes(first, second, vision)
    except ValueError as exc:
        raise ModelFileError(f"{old}: mm.*: {exc}") from exc
    variant = check_variant(default_variant(projector.merge) if variant is None else variant)

    planned = [_plan(rule, tensors, old) for rule in mmproj_rules(vision, projector)]
    left = tensors.keys() - {rule.published for rule in mmproj_rules(vision, projector)}
    unknown = sorted(left - UNUSED_PUBLISHED)
    if unknown:
        raise ModelFileError(f"{old}: the tensor {unknown[0]} is not part of this model")
    output = OutFile(
        path=out_dir / old.name,
        architecture=MMPROJ_ARCHITECTURE,
        add_keys=partial(
            add_mmproj_keys,
            name=_text(keys, "general.name", old.stem),
            file_type=_file_type(keys),
            vision=vision,
            projector=projector,
            variant=variant,
        ),
        tensors=planned,
    )
    report_unused(old, left)
    publish([output], inputs=[old])
    return output.path


class _Reader(GGUFReader):
    """gguf-py's reader, but a count or length that points behind the file's end is an error.

    Without this, a damaged array length makes it collect empty items until memory is gone.
    """

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, *rest: Any, **named: Any
             ) -> npt.NDArray[Any]:  # fmt: skip
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends in the middle of a value")
        return super()._get(offset, dtype, count, *rest, **named)


def open_gguf(path: Path) -> GGUFReader:
    """The keys and tensors of a GGUF file. Raises ModelFileError."""
    try:
        reader = _Reader(path)
        for field in reader.fields.values():
            field.contents()
        if reader.byte_order != "I":
            raise ValueError("its bytes are in the other order")
    except FileNotFoundError as exc:
        raise ModelFileError(f"{path} is missing") from exc
    except (OSError, ValueError, KeyError, IndexError, OverflowError, TypeError) as exc:
        if "block size" in str(exc):  # of a tensor that gguf-py does not name
            _refuse_broken_rows(path)
        raise ModelFileError(f"{path} is damaged or not a GGUF file: {exc}") from exc
    return reader


def _refuse_broken_rows(path: Path) -> None:
    """What the first runtime's quantizer did to the rows of 4304 values, which nobody can read."""
    blocks = {int(kind): block for kind, (block, _) in GGML_QUANT_SIZES.items()}
    for tensor in read_header(path).tensors:
        block = blocks.get(tensor.type, 1)
        if tensor.shape and tensor.shape[0] % block:
            raise ModelFileError(
                f"{path}: cannot be read: tensor {tensor.name} has rows of {tensor.shape[0]} "
                f"values, no whole blocks of {block}; take the F16 file and quantize it with "
                "omnivlm-edge quantize"
            )


def _vision(keys: Section) -> VisionConfig:
    prefix = f"{PUBLISHED_ARCHITECTURE}.vision."
    keys.divides(f"{prefix}attention.head_count", f"{prefix}embedding_length")
    image_size = keys.integer(f"{prefix}image_size")
    patch_size = keys.integer(f"{prefix}patch_size")
    if patch_size > image_size:
        raise ModelFileError(
            f"{keys.where}: patch_size {patch_size} is larger than image_size {image_size}"
        )
    std = keys.numbers(f"{prefix}image_std", 3)
    if min(std) <= 0:
        raise ModelFileError(f"{keys.where}: image_std {list(std)} must be positive")
    return VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        channels=3,
        hidden=keys.integer(f"{prefix}embedding_length"),
        ffn=keys.integer(f"{prefix}feed_forward_length"),
        layers=keys.integer(f"{prefix}block_count"),
        heads=keys.integer(f"{prefix}attention.head_count"),
        norm_eps=_LAYER_NORM_EPS,
        image_mean=keys.numbers(f"{prefix}image_mean", 3),
        image_std=std,
    )


def _find(tensors: dict[str, ReaderTensor], name: str, path: Path) -> ReaderTensor:
    if name not in tensors:
        raise ModelFileError(f"{path}: the tensor {name} is missing")
    return tensors[name]


def row_major_shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """Rows first; a GGUF file stores the fastest dimension first."""
    return tuple(int(length) for length in reversed(tensor.shape))


def _plan(rule: Rule, tensors: dict[str, ReaderTensor], path: Path) -> OutTensor:
    tensor = _find(tensors, rule.published, path)
    if row_major_shape(tensor) != rule.shape:
        raise ModelFileError(
            f"{path}: the tensor {rule.published} has the shape {row_major_shape(tensor)}, but the "
            f"file's keys ask for {rule.shape}"
        )
    return OutTensor(
        rule.target, rule.shape, tensor.tensor_type, partial(read_tensor, path, tensor)
    )


def read_tensor(path: Path, tensor: ReaderTensor) -> npt.NDArray[np.uint8]:
    """The bytes, read instead of mapped: mapped pages would stay resident until the end."""
    try:
        data = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.data_offset)
    except OSError as exc:
        raise ModelFileError(f"{path} cannot be read: {exc.strerror}") from exc
    if len(data) != tensor.n_bytes:
        raise ModelFileError(f"{path} became shorter while it was read")
    return data


def _text(keys: Section, key: str, default: str) -> str:
    value = keys.values.get(key)
    return value if isinstance(value, str) and value else default


def _file_type(keys: Section) -> int:
    value = keys.values.get("general.file_type")
    return value if type(value) is int and value >= 0 else int(LlamaFileType.GUESSED)
