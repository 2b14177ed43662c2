"""Small random mmproj files in both layouts, right or wrong on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class VisionShape:
    """Dimensions of a vision tower and projector; the defaults make a file of about 100 kB."""

    image_size: int = 42
    patch_size: int = 14
    n_embd: int = 32
    n_head: int = 4
    n_layer: int = 2
    n_ff: int = 48
    n_merge: int = 9
    n_proj: int = 40
    n_text: int = 64
    eps: float = 1e-6

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def n_tokens(self) -> int:
        return self.n_patches // self.n_merge


def random_tensors(shape: VisionShape, seed: int = 0) -> Tensors:
    """Weights in row-major order and with the names of our own layout (ffn_up = fc1)."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}

    def linear(name: str, n_in: int, n_out: int) -> None:
        tensors[f"{name}.weight"] = normal(n_out, n_in, scale=n_in**-0.5)
        tensors[f"{name}.bias"] = normal(n_out, scale=0.1)

    def layer_norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + normal(shape.n_embd, scale=0.2)
        tensors[f"{name}.bias"] = normal(shape.n_embd, scale=0.2)

    def normal(*size: int, scale: float) -> npt.NDArray[np.float32]:
        return (rng.standard_normal(size) * scale).astype(np.float32)

    linear("mm.0", shape.n_embd * shape.n_merge, shape.n_proj)
    linear("mm.2", shape.n_proj, shape.n_text)
    side = shape.patch_size
    tensors["v.patch_embd.weight"] = normal(shape.n_embd, 3, side, side, scale=0.1)
    tensors["v.patch_embd.bias"] = normal(shape.n_embd, scale=0.1)
    tensors["v.position_embd.weight"] = normal(shape.n_patches, shape.n_embd, scale=0.5)
    for i in range(shape.n_layer):
        layer_norm(f"v.blk.{i}.ln1")
        layer_norm(f"v.blk.{i}.ln2")
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            linear(f"v.blk.{i}.{part}", shape.n_embd, shape.n_embd)
        linear(f"v.blk.{i}.ffn_up", shape.n_embd, shape.n_ff)
        linear(f"v.blk.{i}.ffn_down", shape.n_ff, shape.n_embd)
    layer_norm("v.post_ln")
    return tensors


def clip_keys(shape: VisionShape) -> dict[str, Any]:
    """Metadata of our own layout."""
    return {
        "general.architecture": "clip",
        "clip.projector_type": "omnivlm",
        **_vision_keys("clip", shape),
        "clip.vision.attention.layer_norm_epsilon": shape.eps,
        "clip.vision.projection_dim": shape.n_text,
        "clip.vision.projector.merge_factor": shape.n_merge,
        "clip.vision.projector.gelu": "erf",
        "clip.omnivlm.prompt_variant": "vlm-81-instruct",
    }


def siglip_keys(shape: VisionShape) -> dict[str, Any]:
    """Metadata of the published layout: no eps, no variant, projection_dim = projector's inside."""
    return {
        "general.architecture": "siglip",
        "siglip.has_omni_vlm_projector": True,
        "general.file_type": 1,
        **_vision_keys("siglip", shape),
        "siglip.vision.projection_dim": shape.n_proj,
    }


def _vision_keys(prefix: str, shape: VisionShape) -> dict[str, Any]:
    return {
        f"{prefix}.vision.image_size": shape.image_size,
        f"{prefix}.vision.patch_size": shape.patch_size,
        f"{prefix}.vision.embedding_length": shape.n_embd,
        f"{prefix}.vision.feed_forward_length": shape.n_ff,
        f"{prefix}.vision.block_count": shape.n_layer,
        f"{prefix}.vision.attention.head_count": shape.n_head,
        f"{prefix}.vision.image_mean": [0.5, 0.5, 0.5],
        f"{prefix}.vision.image_std": [0.5, 0.5, 0.5],
    }


def siglip_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The published files call fc1 ffn_down and fc2 ffn_up."""
    swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    return {
        ".".join(swap.get(part, part) for part in name.split(".")): data
        for name, data in tensors.items()
    }


def write_gguf(
    path: Path,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Any],
    dtype: str = "f32",
    alignment: int = 32,
    packed_dtype: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Writes a GGUF file: matrices in `dtype` where their rows are long enough for its blocks.

    Arrays of bytes are quantized rows already, in `packed_dtype`.
    """
    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    writer.add_custom_alignment(alignment)
    for key, value in keys.items():
        if key != "general.architecture":
            _add_key(writer, key, value)
    matrix_type = gguf.GGMLQuantizationType[dtype.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[matrix_type]
    for name, data in tensors.items():
        is_matrix = data.ndim > 1 and data.shape[-1] % block == 0
        kind = matrix_type if is_matrix and data.dtype == np.float32 else None
        if data.dtype == np.uint8:
            writer.add_tensor(name, data, raw_dtype=packed_dtype)
        elif kind is None:
            writer.add_tensor(name, data)
        else:
            packed = gguf.quants.quantize(data, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_mmproj(
    path: Path,
    shape: VisionShape = VisionShape(),  # noqa: B008  frozen
    *,
    layout: str = "clip",
    dtype: str = "f32",
    seed: int = 0,
) -> Path:
    """A right file of either layout."""
    tensors = random_tensors(shape, seed)
    if layout == "siglip":
        return write_gguf(path, siglip_keys(shape), siglip_names(tensors), dtype)
    return write_gguf(path, clip_keys(shape), tensors, dtype)
