"""Stages 2 and 3: pixels -> image tokens, by the native vision encoder and projector."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ._native import Device, ImportanceCollector, VisionEncoder, VisionHparams


class Vision:
    """The vision path of one mmproj file on one device.

    A `collector`, if any, is shown every matrix product.

    Raises ModelFileError when the file cannot be used, DeviceError when the device fails.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        n_threads: int,
        precision: str = "auto",
        low_memory: bool = False,
        collector: ImportanceCollector | None = None,
    ) -> None:
        self._encoder = VisionEncoder(os.fsencode(path), device.name, n_threads, precision, low_memory)
        self._collector = collector

    @property
    def hparams(self) -> VisionHparams:
        return self._encoder.hparams

    def encode(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """float32 [n, 3, image_size, image_size] -> float32 [n, n_tokens, n_embd_text].

        Releases the GIL; calls from several threads run one after the other.
        """
        return self._encoder.encode(pixels, self._collector)
