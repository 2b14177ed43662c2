"""Write a model with the published sizes and random weights, to measure speed and memory with.

    python bench/synthetic.py OUT_DIR [--layout siglip|clip|both] [--weights normal|trained]
                              [--seed N]

    OUT_DIR/synthetic-F16.gguf                 language model, about 994 MB
    OUT_DIR/siglip/mmproj-synthetic-F16.gguf   the published layout, about 957.5 MB
    OUT_DIR/clip/mmproj-synthetic-F16.gguf     ours, made of the former by `convert_mmproj`

Its answers are noise. The numbers below are the published model's; the same seed gives the same
bytes. `--weights normal` is enough for speed and memory. What quantization costs depends on how
weights are distributed: `trained` gives them what bench/trained_weights.py says of trained ones.
"""

from __future__ import annotations

import random
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFWriter, LlamaFileType, TokenType
from trained_weights import Trained

from omnivlm_edge.convert import convert_mmproj
from omnivlm_edge.convert.config import TextConfig
from omnivlm_edge.convert.keys import TEXT_ARCHITECTURE, add_text_keys, storage_type
from omnivlm_edge.convert.mmproj import PUBLISHED_ARCHITECTURE
from omnivlm_edge.convert.output import OutFile, OutTensor, publish
from omnivlm_edge.convert.tensor_map import text_rules
from omnivlm_edge.convert.tokenizer import Vocabulary, byte_alphabet

IMAGE_SIZE, PATCH_SIZE, CHANNELS = 384, 14, 3
VISION_HIDDEN, VISION_FFN, VISION_LAYERS, VISION_HEADS = 1152, 4304, 27, 16
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
MERGE, PROJECTOR_HIDDEN = 9, 4096

TEXT = TextConfig(
    hidden=896,
    ffn=4864,
    layers=24,
    heads=14,
    kv_heads=2,
    vocab=151936,
    context=32768,
    rope_base=1e6,
    norm_eps=1e-6,
    tied=True,
    eos_token_id=None,
)
FIRST_ADDED = 151643  # ids below are bytes and merges
SPECIAL_TOKENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|ocr_start|>": 151665,
    "<|ocr_end|>": 151666,
}
# Whole words, so that a usual prompt is about as many tokens as with the real vocabulary.
WORDS = (
    "system user assistant You are Nano Omni VLM created by Nexa AI a helpful you is it the this "
    "that these in on at to of and or for with from what which where when who how many does do can "
    "Describe describe What Which Where How Is Are Read image picture photo text please detail "
    "short long answer question color object objects person people left right there read write "
    "visible shown following one sentence words about me my your all each some not as be by"
)


@click.command()
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--layout", type=click.Choice(["siglip", "clip", "both"]), default="both")
@click.option(
    "--weights", type=click.Choice(["normal", "trained"]), default="normal", show_default=True
)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out_dir: Path, layout: str, weights: str, seed: int) -> None:
    """Write the synthetic model into OUT_DIR."""
    source = (
        Trained(seed, dict(published_tensors()), VISION_HEADS, TEXT.layers)
        if weights == "trained"
        else Noise(seed)
    )
    publish([text_file(out_dir / "synthetic-F16.gguf", source, seed)])
    name = "mmproj-synthetic-F16.gguf"
    if layout != "clip":
        publish([published_mmproj(out_dir / "siglip" / name, source)])
    if layout == "both":
        convert_mmproj(out_dir / "siglip" / name, out_dir / "clip")
    if layout == "clip":
        with tempfile.TemporaryDirectory(dir=out_dir) as scratch:
            publish([published_mmproj(Path(scratch) / name, source)])
            convert_mmproj(Path(scratch) / name, out_dir / "clip")


# ---- weights ------------------------------------------------------------------------------------


class Noise:
    """Normal random values, cut from one block; its prime length keeps rows from repeating."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._block = np.random.default_rng(seed).standard_normal(1_048_573, dtype=np.float32)
        self._scaled: Callable[..., npt.NDArray[Any]] = lru_cache(maxsize=8)(self._scale)

    def tensor(
        self, name: str, shape: tuple[int, ...], target: GGMLType, scale: float, mean: float = 0.0
    ) -> npt.NDArray[Any]:
        """Values with this mean and deviation; the name decides where in the block they begin."""
        block = self._scaled(target, scale, mean)
        out = np.empty(prod(shape), block.dtype)
        start = zlib.crc32(f"{self._seed} {name}".encode()) % len(block)
        filled = 0
        while filled < len(out):
            part = block[start : start + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled, start = filled + len(part), 0
        return out.reshape(shape)

    def _scale(self, target: GGMLType, scale: float, mean: float) -> npt.NDArray[Any]:
        values = self._block * np.float32(scale) + np.float32(mean)
        dtype = np.float16 if target is GGMLType.F16 else np.float32
        scaled: npt.NDArray[Any] = values.astype(dtype)
        return scaled

    def plan(self, name: str, shape: tuple[int, ...], target: GGMLType) -> OutTensor:
        """Scales under which activations neither explode nor vanish."""
        if name.endswith(("norm.weight", "ln.weight", "ln1.weight", "ln2.weight")):
            scale, mean = 0.1, 1.0
        elif len(shape) == 1 or name.endswith(("bias", "embd.weight")) and "patch" not in name:
            scale, mean = 0.05, 0.0
        else:
            scale, mean = prod(shape[1:]) ** -0.5, 0.0  # 1/sqrt(fan in)
        read = partial(self.tensor, name, shape, target, scale, mean)
        return OutTensor(name, shape, target, read)


# ---- the published mmproj -----------------------------------------------------------------------


def published_mmproj(path: Path, weights: Noise | Trained) -> OutFile:
    planned = []
    for name, shape in published_tensors():
        # Its converter halved what is 4-D, or 2-D and called ".weight".
        halved = len(shape) == 4 or (len(shape) == 2 and name.endswith(".weight"))
        planned.append(weights.plan(name, shape, GGMLType.F16 if halved else GGMLType.F32))
    return OutFile(path, PUBLISHED_ARCHITECTURE, _add_published_keys, planned)


def published_tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """All 452 tensors in file order: the projector, then the tower as its modules are declared."""
    hidden, ffn = VISION_HIDDEN, VISION_FFN
    yield from _linear("mm.0", PROJECTOR_HIDDEN, MERGE * hidden)
    yield from _linear("mm.2", TEXT.hidden, PROJECTOR_HIDDEN)
    yield "v.patch_embd.weight", (hidden, CHANNELS, PATCH_SIZE, PATCH_SIZE)
    yield "v.patch_embd.bias", (hidden,)
    yield "v.position_embd.weight", (PATCHES, hidden)
    for layer in range(VISION_LAYERS):
        block = f"v.blk.{layer}"
        for part in ("k", "v", "q", "out"):
            yield from _linear(f"{block}.attn_{part}", hidden, hidden)
        yield from _norm(f"{block}.ln1")
        yield from _linear(f"{block}.ffn_down", ffn, hidden)  # the two names are swapped there
        yield from _linear(f"{block}.ffn_up", hidden, ffn)
        yield from _norm(f"{block}.ln2")
    yield from _norm("v.post_ln")
    yield "v.head.probe", (hidden,)
    yield "v.head.attention.in_weight", (3 * hidden, hidden)
    yield "v.head.attention.in_bias", (3 * hidden,)
    yield from _linear("v.head.attention.out", hidden, hidden)
    yield from _norm("v.head.ln")
    yield from _linear("v.head.ffn_down", ffn, hidden)
    yield from _linear("v.head.ffn_up", hidden, ffn)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (VISION_HIDDEN,)
    yield f"{name}.bias", (VISION_HIDDEN,)


def _add_published_keys(writer: GGUFWriter) -> None:
    """With general.architecture, which the writer puts first, the 14 keys in their order."""
    vision = f"{PUBLISHED_ARCHITECTURE}.vision"
    writer.add_bool(f"{PUBLISHED_ARCHITECTURE}.has_omni_vlm_projector", True)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_name("omni-vlm")
    writer.add_description("image encoder for omni-vlm")
    writer.add_uint32(f"{vision}.image_size", IMAGE_SIZE)
    writer.add_uint32(f"{vision}.embedding_length", VISION_HIDDEN)
    writer.add_uint32(f"{vision}.attention.head_count", VISION_HEADS)
    writer.add_uint32(f"{vision}.patch_size", PATCH_SIZE)
    writer.add_uint32(f"{vision}.block_count", VISION_LAYERS)
    writer.add_uint32(f"{vision}.feed_forward_length", VISION_FFN)
    writer.add_uint32(f"{vision}.projection_dim", PROJECTOR_HIDDEN)
    writer.add_array(f"{vision}.image_mean", [0.5] * CHANNELS)
    writer.add_array(f"{vision}.image_std", [0.5] * CHANNELS)


# ---- the language model -------------------------------------------------------------------------


def text_file(path: Path, weights: Noise | Trained, seed: int) -> OutFile:
    planned = [
        weights.plan(rule.target, rule.shape, storage_type(rule.shape, "f16"))
        for rule in text_rules(TEXT, head=False)
    ]
    embeddings = planned[0]
    planned[0] = OutTensor(
        embeddings.name, embeddings.shape, embeddings.type, partial(_quiet_added, embeddings)
    )
    add_keys = partial(
        add_text_keys,
        name="synthetic",
        file_type=LlamaFileType.MOSTLY_F16,
        text=TEXT,
        vocabulary=vocabulary(seed),
    )
    return OutFile(path, TEXT_ARCHITECTURE, add_keys, planned)


def _quiet_added(embeddings: OutTensor) -> npt.NDArray[Any]:
    """Small rows for the added tokens: none wins, so no answer ends before its length limit."""
    values = embeddings.read()
    values[FIRST_ADDED:] *= values.dtype.type(0.01)
    return values


def vocabulary(seed: int) -> Vocabulary:
    """Bytes, words that are learned as BPE learns them, then letters joined at random."""
    alphabet = byte_alphabet()
    space = alphabet[ord(" ")]
    merges = _learn(sorted({form for word in WORDS.split() for form in (word, space + word)}))
    tokens = [alphabet[byte] for byte in range(256)]
    tokens += [left + right for left, right in merges]
    known = set(tokens)
    stems = [t for t in tokens if t.lstrip(space).isascii() and t.lstrip(space).isalpha()]
    tails = [token for token in stems if len(token) < 4 and not token.startswith(space)]
    rng = random.Random(seed)
    while len(tokens) < FIRST_ADDED:
        pair = rng.choice(stems), rng.choice(tails)
        joined = "".join(pair)
        if joined in known:
            continue
        known.add(joined)
        tokens.append(joined)
        merges.append(pair)
        if len(joined) < 8:  # so tokens are about as long as the real ones
            stems.append(joined)
    return _with_added(tokens, [" ".join(pair) for pair in merges])


def _with_added(tokens: list[str], merges: list[str]) -> Vocabulary:
    types = [TokenType.NORMAL] * len(tokens) + [TokenType.UNUSED] * (TEXT.vocab - len(tokens))
    tokens = tokens + [f"[PAD{i}]" for i in range(len(tokens), TEXT.vocab)]
    for token, token_id in SPECIAL_TOKENS.items():
        tokens[token_id], types[token_id] = token, TokenType.CONTROL
    eos, pad = SPECIAL_TOKENS["<|im_end|>"], SPECIAL_TOKENS["<|endoftext|>"]
    return Vocabulary(tokens=tokens, types=types, merges=merges, eos=eos, pad=pad)


def _learn(words: list[str]) -> list[tuple[str, str]]:
    """Join the commonest pair until every word is one token."""
    pieces = [list(word) for word in words]
    merges = []
    while pairs := Counter(pair for piece in pieces for pair in zip(piece, piece[1:])):  # noqa: B905
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = [_join(piece, best) for piece in pieces]
    return merges


def _join(piece: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for token in piece:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


if __name__ == "__main__":
    main()
