"""A small random checkpoint in the original's layout, for every test that needs a model.

    write_checkpoint(tmp_path / "demo")                       # 9 patches -> 1 image token
    write_checkpoint(tmp_path / "demo", image_size=84)        # 36 patches -> 4 image tokens
    write_checkpoint(tmp_path / "demo", merge=1, dtype="bfloat16", shards=2)

The weights are scaled so that a greedy answer depends on the whole prompt and has clear winners.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|ocr_start|>",
    "<|ocr_end|>",
)
PLAIN_ADDED_TOKENS = ("<tool_call>", "</tool_call>")  # found before BPE, but not special

# Text whose first characters are joined: by rank, each line one merge.
_MERGES = ("  ", " t", " th", " the", "th", "the", "in", "an", " a", "er", "re", "\n\n")
_MERGED_UNICODE = ("你", "好", "é", "😀")  # each becomes one token, byte after byte

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Dims:
    """The sizes of the model. A width of 48 is, like the original's 4304, no multiple of 32."""

    image_size: int = 42
    patch_size: int = 14
    vision_hidden: int = 32
    vision_layers: int = 2
    vision_heads: int = 4
    vision_ffn: int = 48
    projector_hidden: int = 64
    text_hidden: int = 64
    text_layers: int = 2
    text_heads: int = 4
    text_kv_heads: int = 2
    text_ffn: int = 96
    vocab: int = 320
    context: int = 4096

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def write_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    merge: int = 9,
    dtype: str = "float32",
    tied: bool = True,
    shards: int = 1,
    image_size: int | None = None,
    head: bool = True,
    scale: float = 2.0,
    dims: Dims | None = None,
) -> None:
    """Write configuration, tokenizer and weights into the new directory `path`.

    `head` stores SigLIP's unused pooling head, `scale` is the gain of the random matrices.
    """
    dims = dims or Dims()
    if image_size is not None:
        dims = replace(dims, image_size=image_size)
    path.mkdir(parents=True)
    _write_json(path / "config.json", config(dims, tied=tied))
    _write_json(path / "preprocessor_config.json", preprocessor_config(dims))
    _write_json(path / "tokenizer.json", tokenizer())
    _write_json(path / "tokenizer_config.json", tokenizer_config())
    weights = dict(tensors(dims, seed=seed, merge=merge, tied=tied, head=head, scale=scale))
    write_weights(path, weights, dtype=dtype, shards=shards)


def config(dims: Dims, *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["OminiVLMForConditionalGeneration"],
        "model_type": "omini_vlm",
        "hidden_size": dims.projector_hidden,
        "mm_hidden_size": dims.vision_hidden,
        "mm_projector_type": "mlp2x_gelu",
        "image_token_index": token_ids()["<|image_pad|>"],
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": dims.vision_hidden,
            "intermediate_size": dims.vision_ffn,
            "num_hidden_layers": dims.vision_layers,
            "num_attention_heads": dims.vision_heads,
            "num_channels": 3,
            "image_size": dims.image_size,
            "patch_size": dims.patch_size,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": dims.text_hidden,
            "intermediate_size": dims.text_ffn,
            "num_hidden_layers": dims.text_layers,
            "num_attention_heads": dims.text_heads,
            "num_key_value_heads": dims.text_kv_heads,
            "vocab_size": dims.vocab,
            "max_position_embeddings": dims.context,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": tied,
            "use_sliding_window": False,
            "sliding_window": 32768,
        },
    }


def preprocessor_config(dims: Dims) -> dict[str, Any]:
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": dims.image_size, "width": dims.image_size},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


# ---- tokenizer ----------------------------------------------------------------------------------


def byte_characters() -> list[str]:
    """For each byte the character that a byte-level vocabulary writes for it."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


def _encode(text: str) -> str:
    characters = byte_characters()
    return "".join(characters[byte] for byte in text.encode())


def merges() -> list[tuple[str, str]]:
    """Each joins everything but the last character of a token with that last character."""
    tokens = [_encode(text) for text in _MERGES]
    for text in _MERGED_UNICODE:
        encoded = _encode(text)
        tokens += [encoded[:end] for end in range(2, len(encoded) + 1)]
    return [(token[:-1], token[-1]) for token in dict.fromkeys(tokens)]


def token_ids() -> dict[str, int]:
    """All tokens, as they are written in the vocabulary, and their ids."""
    joined = [left + right for left, right in merges()]
    tokens = [*byte_characters(), *joined, *SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS]
    return {token: i for i, token in enumerate(tokens)}


def _added_tokens() -> list[dict[str, Any]]:
    ids = token_ids()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": ids[token], "content": token, "special": token in SPECIAL_TOKENS, **flags}
        for token in (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS)
    ]


def tokenizer() -> dict[str, Any]:
    """The content of tokenizer.json."""
    added = _added_tokens()
    outside = {entry["content"] for entry in added}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for token, i in token_ids().items() if token not in outside},
            "merges": [list(pair) for pair in merges()],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": _CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in _added_tokens()
        },
    }


# ---- weights ------------------------------------------------------------------------------------


def tensors(
    dims: Dims, *, seed: int, merge: int, tied: bool, head: bool, scale: float
) -> Iterator[tuple[str, Array]]:
    """Every tensor under its name in the checkpoint."""
    draw = _Draw(np.random.default_rng(seed), scale)
    yield from _vision(draw, dims)
    if head:
        yield from _pooling_head(draw, dims)
    projector = "multi_modal_projector"
    yield from draw.linear(f"{projector}.0", dims.projector_hidden, dims.vision_hidden * merge)
    yield from draw.linear(f"{projector}.2", dims.text_hidden, dims.projector_hidden)
    yield from _text(draw, dims, tied=tied)


def _vision(draw: _Draw, dims: Dims) -> Iterator[tuple[str, Array]]:
    hidden, patch, tower = dims.vision_hidden, dims.patch_size, "vision_tower.vision_model"
    convolution = draw.matrix(hidden, 3 * patch * patch).reshape(hidden, 3, patch, patch)
    yield f"{tower}.embeddings.patch_embedding.weight", convolution
    yield f"{tower}.embeddings.patch_embedding.bias", draw.values(hidden)
    yield f"{tower}.embeddings.position_embedding.weight", draw.values(dims.patches, hidden)
    for layer in range(dims.vision_layers):
        prefix = f"{tower}.encoder.layers.{layer}"
        yield from draw.norm(f"{prefix}.layer_norm1", hidden)
        for part in ("q", "k", "v", "out"):
            yield from draw.linear(f"{prefix}.self_attn.{part}_proj", hidden, hidden)
        yield from draw.norm(f"{prefix}.layer_norm2", hidden)
        yield from draw.linear(f"{prefix}.mlp.fc1", dims.vision_ffn, hidden)
        yield from draw.linear(f"{prefix}.mlp.fc2", hidden, dims.vision_ffn)
    yield from draw.norm(f"{tower}.post_layernorm", hidden)


def _pooling_head(draw: _Draw, dims: Dims) -> Iterator[tuple[str, Array]]:
    hidden, prefix = dims.vision_hidden, "vision_tower.vision_model.head"
    yield f"{prefix}.probe", draw.values(1, 1, hidden)
    yield f"{prefix}.attention.in_proj_weight", draw.matrix(3 * hidden, hidden)
    yield f"{prefix}.attention.in_proj_bias", draw.values(3 * hidden)
    yield from draw.linear(f"{prefix}.attention.out_proj", hidden, hidden)
    yield from draw.norm(f"{prefix}.layernorm", hidden)
    yield from draw.linear(f"{prefix}.mlp.fc1", dims.vision_ffn, hidden)
    yield from draw.linear(f"{prefix}.mlp.fc2", hidden, dims.vision_ffn)


def _text(draw: _Draw, dims: Dims, *, tied: bool) -> Iterator[tuple[str, Array]]:
    hidden, ffn, model = dims.text_hidden, dims.text_ffn, "language_model.model"
    kv = hidden // dims.text_heads * dims.text_kv_heads
    yield f"{model}.embed_tokens.weight", draw.embeddings(dims.vocab, hidden)
    for layer in range(dims.text_layers):
        prefix = f"{model}.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", draw.around_one(hidden)
        yield from draw.linear(f"{prefix}.self_attn.q_proj", hidden, hidden)
        yield from draw.linear(f"{prefix}.self_attn.k_proj", kv, hidden)
        yield from draw.linear(f"{prefix}.self_attn.v_proj", kv, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", draw.matrix(hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", draw.around_one(hidden)
        yield f"{prefix}.mlp.gate_proj.weight", draw.matrix(ffn, hidden)
        yield f"{prefix}.mlp.up_proj.weight", draw.matrix(ffn, hidden)
        yield f"{prefix}.mlp.down_proj.weight", draw.matrix(hidden, ffn)
    # Random signs: with a tied head, the likeliest next token would else be the current one.
    yield f"{model}.norm.weight", draw.around_one(hidden) * draw.signs(hidden)
    if not tied:
        yield "language_model.lm_head.weight", draw.embeddings(dims.vocab, hidden)


@dataclass
class _Draw:
    """Random tensors of the scales that keep activations near one."""

    rng: np.random.Generator
    scale: float

    def values(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape, dtype=np.float32)

    def matrix(self, rows: int, columns: int) -> Array:
        values: Array = self.values(rows, columns) * np.float32(self.scale / columns**0.5)
        return values

    def embeddings(self, rows: int, columns: int) -> Array:
        """Rows without a token are small, as training would leave them: they never win."""
        values = self.values(rows, columns)
        values[len(token_ids()) :] *= np.float32(0.01)
        return values

    def around_one(self, length: int) -> Array:
        values: Array = 1 + np.float32(0.1) * self.values(length)
        return values

    def signs(self, length: int) -> Array:
        signs: Array = np.sign(self.values(length))
        return signs

    def linear(self, name: str, rows: int, columns: int) -> Iterator[tuple[str, Array]]:
        yield f"{name}.weight", self.matrix(rows, columns)
        yield f"{name}.bias", np.float32(0.1) * self.values(rows)

    def norm(self, name: str, length: int) -> Iterator[tuple[str, Array]]:
        yield f"{name}.weight", self.around_one(length)
        yield f"{name}.bias", np.float32(0.1) * self.values(length)


# ---- files --------------------------------------------------------------------------------------


def write_weights(
    path: Path, weights: dict[str, Array], *, dtype: str = "float32", shards: int = 1
) -> None:
    """`model.safetensors`, or `shards` files with an index."""
    if shards == 1:
        write_safetensors(path / "model.safetensors", weights, dtype=dtype)
        return
    names = list(weights)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        write_safetensors(path / file, part, dtype=dtype)
        index |= dict.fromkeys(part, file)
    _write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def write_safetensors(file: Path, weights: dict[str, Array], *, dtype: str = "float32") -> None:
    """The format is short enough to write by hand, and so bfloat16 needs no other package."""
    header: dict[str, Any] = {}
    offset = 0
    for name, array in weights.items():
        end = offset + array.size * (4 if dtype == "float32" else 2)
        header[name] = {
            "dtype": {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for array in weights.values():
            out.write(stored(array, dtype).tobytes())


def stored(array: Array, dtype: str) -> npt.NDArray[Any]:
    """The values as they lie in the file; bfloat16 is a float32's upper half, rounded to even."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
