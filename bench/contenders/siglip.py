"""The vision path in PyTorch, of a file's shapes and with random weights: for PyTorch, OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from omnivlm_edge.image import normalise

from .base import Pixels


class Siglip(nn.Module):
    """SigLIP's tower, nine patches joined, Linear-GELU-Linear; float32."""

    def __init__(self, mmproj: Path) -> None:
        super().__init__()
        reader = GGUFReader(mmproj)
        number = {
            name.removeprefix("clip.vision."): field.contents()
            for name, field in reader.fields.items()
            if name.startswith("clip.vision.")
        }
        torch.manual_seed(0)
        config = SiglipVisionConfig(
            hidden_size=number["embedding_length"],
            intermediate_size=number["feed_forward_length"],
            num_hidden_layers=number["block_count"],
            num_attention_heads=number["attention.head_count"],
            image_size=number["image_size"],
            patch_size=number["patch_size"],
            layer_norm_eps=number["attention.layer_norm_epsilon"],
            vision_use_head=False,
            attn_implementation="sdpa",
        )
        self.side = config.image_size
        self.tower = SiglipVisionModel(config)
        self.joined = config.hidden_size * number["projector.merge_factor"]
        inner = next(int(t.shape[1]) for t in reader.tensors if t.name == "mm.0.weight")
        self.projector = nn.Sequential(
            nn.Linear(self.joined, inner), nn.GELU(), nn.Linear(inner, number["projection_dim"])
        )
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 3, side, side] -> [n, n_tokens, width of the text model]."""
        patches = self.tower(pixel_values=pixels).last_hidden_state
        tokens: Tensor = self.projector(patches.reshape(len(pixels), -1, self.joined))
        return tokens


def normalised(pixels: Pixels) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """uint8 [n, side, side, 3] -> float32 [n, 3, side, side] from -1 to 1."""
    return np.stack([normalise(picture, [0.5] * 3, [0.5] * 3) for picture in pixels])
