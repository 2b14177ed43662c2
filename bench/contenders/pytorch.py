"""PyTorch in bfloat16, on transformers' SigLIP."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Files, Pixels, Tokens
from .siglip import Siglip, normalised

LIBRARIES = ("torch", "transformers")


def prepare(files: Files) -> None:
    """Nothing: the weights are drawn when it is loaded."""


class TorchEncoder:
    def __init__(self, files: Files, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = Siglip(files.mmproj).to(torch.bfloat16)
        self.side = self._model.side

    def convert(self, pixels: Pixels) -> Tensor:
        return torch.from_numpy(normalised(pixels)).to(torch.bfloat16)

    @torch.inference_mode()
    def encode(self, converted: Tensor) -> Tokens:
        tokens: Tokens = self._model(converted).float().numpy()
        return tokens


load = TorchEncoder
