"""Stages 2 and 3: pixels -> image tokens, by the native vision encoder and projector."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ._native import Device, ImportanceCollector, VisionEncoder, VisionHparams


class Vision:
    """The vision path of one mmproj file on one device.

    `precision` is one of VISION_PRECISIONS; on a GPU, `auto` or `ggml`.
    With `low_memory` the weights stay as they are in the file, and are expanded layer by layer
    for every picture. A `collector`, if any, is shown every matrix product (of ggml's).

    Raises ModelFileError when the file cannot be used, DeviceError when the device fails.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        n_threads: int,
        *,
        precision: str = "auto",
        low_memory: bool = False,
        collector: ImportanceCollector | None = None,
    ) -> None:
        if collector is not None:
            precision = "ggml"
        self._encoder = VisionEncoder(
            os.fsencode(path), device.name, n_threads, precision, low_memory
        )
        self._collector = collector

    @property
    def hparams(self) -> VisionHparams:
        return self._encoder.hparams

    @property
    def precision(self) -> str:
        """What `auto` became."""
        return self._encoder.precision

    @property
    def kernels(self) -> str:
        """The instruction set of the kernels; empty where ggml computes."""
        return self._encoder.kernels

    def encode(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """float32 [n, 3, image_size, image_size] -> float32 [n, n_tokens, n_embd_text].

        Releases the GIL; calls from several threads run one after the other.
        """
        return self._encoder.encode(pixels, self._collector)
