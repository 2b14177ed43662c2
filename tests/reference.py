"""The vision path and projector in NumPy float64, written from MODEL.md, independent of ggml."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from tiny_gguf import VisionShape

Array = npt.NDArray[np.float64]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu_tanh(x: Array) -> Array:
    """Hendrycks and Gimpel 2016 (arXiv:1606.08415), the approximation."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: Array) -> Array:
    """The same, exact."""
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def encode(
    weights: Mapping[str, npt.NDArray[np.float32]],
    shape: VisionShape,
    pixels: npt.NDArray[np.float32],
    projector_gelu: str = "erf",
    inputs: dict[str, Array] | None = None,
) -> Array:
    """pixels [3, H, W] -> image tokens [n_tokens, n_text].

    `inputs` gets what each matrix is applied to: its name -> [rows, n_in].
    """
    w = {name: data.astype(np.float64) for name, data in weights.items()}

    def linear(name: str, x: Array) -> Array:
        if inputs is not None:
            inputs[f"{name}.weight"] = x
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(name: str, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        normed = centred / np.sqrt(variance + shape.eps)
        return normed * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(block: str, x: Array) -> Array:
        d_head = shape.n_embd // shape.n_head
        q, k, v = (
            linear(f"{block}.attn_{part}", x).reshape(-1, shape.n_head, d_head) for part in "qkv"
        )
        scores = np.einsum("phd,qhd->hpq", q, k) / math.sqrt(d_head)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        return linear(f"{block}.attn_out", np.einsum("hpq,qhd->phd", scores, v).reshape(x.shape))

    side, patch = shape.image_size // shape.patch_size, shape.patch_size
    x = np.empty((shape.n_patches, shape.n_embd))
    for row in range(side):
        for col in range(side):
            window = pixels[:, row * patch : (row + 1) * patch, col * patch : (col + 1) * patch]
            x[row * side + col] = np.einsum("dcyx,cyx->d", w["v.patch_embd.weight"], window)
    x += w["v.patch_embd.bias"] + w["v.position_embd.weight"]

    for i in range(shape.n_layer):
        block = f"v.blk.{i}"
        x = x + attention(block, layer_norm(f"{block}.ln1", x))
        hidden = gelu_tanh(linear(f"{block}.ffn_up", layer_norm(f"{block}.ln2", x)))
        x = x + linear(f"{block}.ffn_down", hidden)
    x = layer_norm("v.post_ln", x)

    merged = x.reshape(shape.n_tokens, shape.n_merge * shape.n_embd)
    gelu = gelu_erf if projector_gelu == "erf" else gelu_tanh
    return linear("mm.2", gelu(linear("mm.0", merged)))
