"""Random weights with the statistics of trained transformers, for bench/synthetic.py.

Weights of one normal distribution are kind to quantization where it loses most (large values within
a block, large channels) and cruel where trained networks are robust: errors grow from layer to
layer. The published weights could not be had while this was written. Where the numbers are from:

- W: measured on the encoder of OpenAI's Whisper tiny.en, built like SigLIP's tower (layer norm
  before each part, GELU, biases), 4 layers of width 384, while it heard two spoken sentences.
  Ranges are over its layers and kinds of matrices.
- D: measured on our demo model and its activations on held-out scenes.
- H: Heimersheim and Turner 2023, "Residual stream norms grow exponentially over the forward pass".
- L: Dettmers et al. 2022, LLM.int8(): six channels up to 20 times as large as the others.
- Q: what is commonly reported of Qwen2.5; from memory, not measured.

The vision file's are fitted to activations, the text model's are not: its values are distributed
alike, but nothing is known of how errors spread in it.
"""

from __future__ import annotations

import re
import zlib
from functools import partial
from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GGMLType

from omnivlm_edge.convert.output import OutTensor

Array = npt.NDArray[np.float32]

# ---- the values of a matrix
TAIL = 8.0  # Student's t, kurtosis 4.5. W: 3.6 to 7 with all rows and columns scaled to one norm
SPREAD = 0.2  # deviation of the logarithm of rows' norms, and of columns'. W: 0.1 to 0.45
# Part of a matrix's energy lies in an eighth of its dimensions. That makes its effective rank (the
# squared sum of the squared singular values over the sum of their squares, of all) 0.33 for squares
# and 0.46 for 4:1, and the largest singular value 4.3 times the median. W: 0.28 to 0.42; 0.37 to
# 0.44; 4 to 6. Independent values: 0.5; 0.8; 2.5.
LOW_RANK_ENERGY, LOW_RANK = 0.3, 8
# Queries and keys have less rank: 0.24. W: 0.12 to 0.39, mean 0.26. They share these dimensions, so
# that tokens look at tokens like them; of keys that are independent of the queries they would all
# look at the average, and become equal to each other within a few layers.
QUERY_KEY_ENERGY = 0.5
PROJECTOR_SPREAD = 0.03, 0.1  # rows, columns. D; there all dimensions have about equal energy

# ---- deviations of matrices, times the root of the inputs' number
QUERY_KEY = 1.0  # D: 0.95 to 1.05. W: 0.51 to 0.62
VALUE = 0.55  # W: 0.53 to 0.61
FFN_IN = 0.52  # W: 0.51 to 0.60
PATCH = 1.45  # D
PROJECTOR = {"mm.0": 2.9, "mm.2": 1.2}  # D

# How much more a matrix makes of what it reads than it would of noise as large, with the mean left
# out of both. This is why errors shrink on their way through a trained network (W, D: an error in
# the stream, relative to it, by 5 to 20 % a layer) and grow in a random one. Means of W and D.
ALIGNED = {"attn_q": 1.2, "attn_k": 1.2, "attn_v": 1.1, "attn_out": 1.25, "ffn": 1.25}
ALIGNED |= {"mm.0": 1.8, "mm.2": 1.5}  # D
DIRECTIONS = 32  # in which that is so: 0.9 and more of what is read

# ---- the residual stream
START = {"v.blk": 0.7, "blk": 0.015}  # rms: PATCH by pixels of rms 0.5; Qwen2.5's embeddings (Q)
# Updates of this part of the stream make it grow by 4.5 % a layer (H); the first and the last
# layer's are larger. W: 0.5 to 0.85, 0.84 to 1.4. D: 0.5 to 0.8, 0.3 to 0.7.
UPDATE, FIRST_UPDATE, LAST_UPDATE = 0.21, 0.7, 0.8
ATTENTION, HIDDEN = 1.1, 0.26  # rms of what attn_out and fc2 make of what they read
POSITION = 0.2  # rms. D: 0.18
OUTLIERS, OUTLIER = 6, 20.0  # channels, the same for all tokens (L). W: 5, of 4 to 12
OUTLIER_ROW = 3.0  # of matrices that write to these channels. W: 2 to 4
OUTLIER_GAIN = 0.7  # of others; norms read them with it. W: 0.3 to 0.7

# ---- norms and biases
GAIN_SPREAD = 0.3  # W: deviation 0.25 to 0.7 of the mean
# Layer norms take away this part of what is the same for all tokens, and are as large as this. W:
# 0.3 of the stream's energy differs between tokens, and 0.65 to 0.85 behind a norm; rms 1.4.
CENTRED, NORMED = 0.6, 1.4
FFN_BIAS, FFN_BIAS_SPREAD = -1.6, 0.7  # so few units are active. W: -1.6 to -2.6; 0.7 to 1.1
BIAS = 0.1  # W: median 0.02 to 0.4
TEXT_GAIN, OUTPUT_GAIN = 1.8, 6.0  # W; such that the text model's logits deviate by about 2.5
KEY_BIAS = 2.0  # of the text model: many times those of other matrices (Q)

_QUERY_KEY = re.compile(r"attn_[qk]\.")


class Trained:
    """Plans tensors of the published layouts; the name decides about a tensor's values."""

    def __init__(
        self, seed: int, vision: dict[str, tuple[int, ...]], heads: int, text_layers: int
    ) -> None:
        """`vision` has the shapes of the vision file's tensors, `heads` is its tower's."""
        self._seed = seed
        self._vision = vision
        self._heads = heads
        vision_layers = sum(name.endswith("ln1.weight") for name in vision)
        self._layers = {"v.blk": vision_layers, "blk": text_layers}
        self._norms: dict[str, Array] = {}
        self._read_by: dict[str, Array] = {}  # orthonormal directions of a matrix's inputs, by name
        tails = np.random.default_rng(seed).standard_t(TAIL, 1_048_573)  # a prime, as in Noise
        self._block: Array = (tails / sqrt(TAIL / (TAIL - 2))).astype(np.float32)
        self._fit()

    def plan(self, name: str, shape: tuple[int, ...], target: GGMLType) -> OutTensor:
        """The tensor `name`; it is computed when its turn comes."""
        return OutTensor(name, shape, target, partial(self._read, name, shape, target))

    def _read(self, name: str, shape: tuple[int, ...], target: GGMLType) -> npt.NDArray[Any]:
        dtype = np.float16 if target is GGMLType.F16 else np.float32
        return self._values_of(name, shape).astype(dtype)

    def _values_of(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if name in self._norms:
            return self._norms[name]
        return self._vector(name, *shape) if len(shape) == 1 else self._matrix(name, shape)

    # ---- matrices

    def _matrix(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        rows, columns = shape[0], prod(shape[1:])
        row_spread = column_spread = SPREAD
        shared = name.replace("attn_k", "attn_q")
        values = self._tails(name, rows, columns)
        if name.startswith("mm."):
            row_spread, column_spread = PROJECTOR_SPREAD
        else:
            rank = min(rows, columns) // LOW_RANK
            energy = QUERY_KEY_ENERGY if _QUERY_KEY.search(name) else LOW_RANK_ENERGY
            left = self._tails(f"{shared} left", rows, rank)
            right = self._tails(f"{shared} right", rank, columns)
            values *= np.float32(sqrt(1 - energy))
            values += left @ (right * np.float32(sqrt(energy / rank)))
        scale, writes = self._scale(name, rows, columns)
        by_row = self._lognormal(f"{name} rows", rows, row_spread)
        if writes:
            by_row[self._outliers(rows)] *= OUTLIER_ROW
        by_row *= np.float32(scale / sqrt(columns))
        values *= by_row[:, None]
        values *= self._lognormal(f"{name} columns", columns, column_spread)
        if name in self._read_by:
            directions = self._read_by[name]
            aligned = next(value for part, value in ALIGNED.items() if part in name)
            left = self._tails(f"{shared} aligned", rows, len(directions)) * by_row[:, None]
            values += left @ (directions * np.float32(sqrt(aligned**2 - 1)))
        return values.reshape(shape)

    def _scale(self, name: str, rows: int, columns: int) -> tuple[float, bool]:
        """Deviation times the root of the inputs' number; whether the stream is written to."""
        if name.startswith("v.head."):  # unused
            return VALUE, False
        if ".attn_out" in name:
            return self._update(name) / ATTENTION, True
        if ".ffn_" in name:  # the published vision file swaps the two directions' names
            return (FFN_IN, False) if rows > columns else (self._update(name) / HIDDEN, True)
        if "patch_embd" in name:
            return PATCH, True
        if "position_embd" in name:
            return POSITION * sqrt(columns), False
        if "token_embd" in name:
            return START["blk"] * sqrt(columns), False
        if _QUERY_KEY.search(name):
            return QUERY_KEY, False
        return PROJECTOR.get(name[:4], VALUE), False

    def _tails(self, name: str, rows: int, columns: int) -> Array:
        """[rows, columns] of deviation 1, cut from the block."""
        start = self._hash(name) % len(self._block)
        return np.resize(np.roll(self._block, -start), (rows, columns))

    # ---- vectors

    def _vector(self, name: str, length: int) -> npt.NDArray[Any]:
        values = self._tails(name, 1, length)[0]
        outliers = self._outliers(length)
        if name.endswith("norm.weight"):
            return self._gain(name, length) * (OUTPUT_GAIN if "output" in name else TEXT_GAIN)
        if re.match(r"v\.blk.*ffn_down\.bias$", name):  # fc1 in the published file
            return values * FFN_BIAS_SPREAD + FFN_BIAS
        if re.match(r"blk.*attn_k\.bias$", name):
            return values * KEY_BIAS
        values *= BIAS
        if name == "v.patch_embd.bias":
            values[outliers] += OUTLIER * START["v.blk"]
        if re.match(r"v\.blk.*ffn_up\.bias$", name):  # fc2: the large channels grow with the stream
            before, after = self._stream(name, 0), self._stream(name, 2)
            values[outliers] += OUTLIER * (after - before)
        return values

    def _gain(self, name: str, length: int) -> Array:
        gain = self._lognormal(name, length, GAIN_SPREAD)
        gain[self._outliers(length)] *= OUTLIER_GAIN
        return gain

    def _outliers(self, length: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, length]).choice(length, OUTLIERS, replace=False)

    def _lognormal(self, name: str, length: int, spread: float) -> Array:
        """Factors whose mean square is 1."""
        normal = np.random.default_rng(self._hash(name)).standard_normal(length)
        return np.exp(spread * normal - spread**2).astype(np.float32)

    def _hash(self, name: str) -> int:
        return zlib.crc32(f"{self._seed} {name}".encode())

    # ---- what the vision file's tensors read decides about some of them

    def _fit(self) -> None:
        """Runs the tower on 128 patches of noise with the 1/f spectrum of pictures (Field 1987).

        Finds the layer norms, and the directions in which the matrices' inputs lie.
        """

        def tensor(name: str) -> Array:
            return self._values_of(name, self._vision[name]).astype(np.float32)

        def linear(name: str, x: Array) -> Array:
            if "patch" not in name:
                self._read_by[f"{name}.weight"] = _directions(x)
            weight = tensor(f"{name}.weight")
            return x @ weight.reshape(len(weight), -1).T + tensor(f"{name}.bias")

        def norm(name: str, x: Array) -> Array:
            gain = self._gain(name, x.shape[1])
            centred = x - x.mean(1, keepdims=True)
            y = centred / centred.std(1, keepdims=True) * gain
            shift = -CENTRED * y.mean(0)
            scale = NORMED / np.sqrt(np.square(y + shift).mean())
            self._norms |= {f"{name}.weight": gain * scale, f"{name}.bias": shift * scale}
            return (y + shift) * scale

        patches = _noise_patches(self._seed, self._vision["v.patch_embd.weight"][1:])
        position = tensor("v.position_embd.weight")
        x = linear("v.patch_embd", patches) + position[: len(patches)]
        for layer in range(self._layers["v.blk"]):
            block = f"v.blk.{layer}"
            y = norm(f"{block}.ln1", x)
            qkv = [linear(f"{block}.attn_{part}", y) for part in "qkv"]
            x = x + linear(f"{block}.attn_out", _attention(*qkv, self._heads))
            y = linear(f"{block}.ffn_down", norm(f"{block}.ln2", x))  # the names are swapped
            x = x + linear(f"{block}.ffn_up", _gelu(y))
        x = norm("v.post_ln", x)
        merge = self._vision["mm.0.weight"][1] // x.shape[1]
        joined = np.random.default_rng(self._seed).integers(len(x), size=(len(x), merge))
        linear("mm.2", _gelu(linear("mm.0", x[joined].reshape(len(x), -1))))

    # ---- the stream's growth

    def _update(self, name: str) -> float:
        """The rms that the part of a block which `name` belongs to adds to the stream."""
        part = 1 if ".ffn_" in name else 0
        stack, layer = self._place(name)
        return self._share(stack, layer) * self._stream(name, part)

    def _stream(self, name: str, parts: int) -> float:
        """The stream's rms when so many of the two parts of a tensor's block are done."""
        stack, layer = self._place(name)
        growth = [1 + self._share(stack, i) ** 2 for i in range(layer + 1)]
        return START[stack] * sqrt(prod(growth[:layer]) ** 2 * growth[layer] ** parts)

    def _share(self, stack: str, layer: int) -> float:
        if layer == 0:
            return FIRST_UPDATE
        return LAST_UPDATE if layer == self._layers[stack] - 1 else UPDATE

    def _place(self, name: str) -> tuple[str, int]:
        """The stack of blocks and the block's number."""
        stack, layer, *_ = re.split(r"\.(\d+)\.", name)
        return stack, int(layer)


def _noise_patches(seed: int, shape: tuple[int, ...], count: int = 128) -> Array:
    """Pixels of deviation 0.5, one patch a row, out of four pictures."""
    channels, side, _ = shape
    n = side * 24
    rng = np.random.default_rng(seed)
    x = np.fft.fftfreq(n)
    spectrum = 1 / np.maximum(np.hypot(x[:, None], x), 1 / n)
    grey, colour = rng.standard_normal((4, 1, n, n)), rng.standard_normal((4, channels, n, n))
    pictures = np.fft.ifft2(np.fft.fft2(grey + 0.3 * colour) * spectrum).real
    pictures *= 0.5 / pictures.std()
    patches = pictures.reshape(4, channels, 24, side, 24, side).transpose(0, 2, 4, 1, 3, 5)
    rows = patches.reshape(4 * 24 * 24, -1)
    return rows[:: len(rows) // count][:count].astype(np.float32)


def _directions(x: Array) -> Array:
    """The DIRECTIONS of unit length, orthogonal to each other, in which the rows differ most."""
    x = x - x.mean(0)
    energies, combinations = np.linalg.eigh(x @ x.T)  # in ascending order
    rows: Array = combinations[:, -DIRECTIONS:].T @ x / np.sqrt(energies[-DIRECTIONS:, None])
    return rows


def _attention(q: Array, k: Array, v: Array, heads: int) -> Array:
    """[tokens, width] each -> [tokens, width]."""
    q, k, v = (x.reshape(len(x), heads, -1) for x in (q, k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.float32(sqrt(q.shape[2]))
    weights = np.exp(scores - scores.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(len(q), -1)


def _gelu(x: Array) -> Array:
    return x * np.float32(0.5) * (1 + np.tanh(0.7978846 * (x + 0.044715 * x**3)))
