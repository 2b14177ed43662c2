"""Stages 1 to 3 in one: a picture -> its embedding, computed once.

image.py, vision.py (native/), and cache.py for what was encoded before.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import image as images
from . import prompt as prompts
from ._native import Device, ImportanceCollector, VisionHparams
from .cache import DiskCache, EmbeddingCache, Found, cache_key
from .errors import ModelFileError
from .files import identity, loaded_digest
from .image import ImageSource, Pixels
from .paths import cache_dir
from .values import ImageEmbedding
from .vision import Vision


class PictureEncoder:
    """The vision path of one mmproj file on one device, and what it encoded before.

    `disk_cache` keeps encoded pictures and the file's hash on disk, for other processes too.
    `precision` and `low_memory` are Vision's. `collector`, if any, is shown the matrix products of
    each picture that is encoded.

    Raises ModelFileError when the file cannot be used, DeviceError when the device fails.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        n_threads: int,
        *,
        disk_cache: bool,
        precision: str = "auto",
        low_memory: bool = False,
        collector: ImportanceCollector | None = None,
    ) -> None:
        self._path = path
        self._device = device.name
        if path.exists():  # else Vision says so
            self._loaded = identity(path)
        self._vision = Vision(
            path,
            device,
            n_threads,
            precision=precision,
            low_memory=low_memory,
            collector=collector,
        )
        self._cache = self._new_cache(cache_dir() / "embeddings" if disk_cache else None)
        self._scope: str | None = None  # the vision file's digest
        #: Where files' hashes are remembered.
        self.hashes = cache_dir() / "file-hashes.json" if disk_cache else None

    @property
    def hparams(self) -> VisionHparams:
        return self._vision.hparams

    @property
    def precision(self) -> str:
        """How pictures are encoded: what `auto` became."""
        return self._vision.precision

    @property
    def kernels(self) -> str:
        """The instruction set of the kernels; empty where ggml computes."""
        return self._vision.kernels

    def prompt_variant(self, wanted: str | None) -> str:
        """The wanted variant, or the file's own. Raises OptionError for one that does not exist."""
        if wanted is None:
            wanted = self.hparams.prompt_variant or prompts.default_variant(self.hparams.n_merge)
        return prompts.check_variant(wanted)

    def check_text_model(self, path: str | Path, n_embd: int) -> None:
        """Raises ModelFileError unless the text model takes embeddings of this file's width."""
        if n_embd != self.hparams.n_embd_text:
            raise ModelFileError(
                f"{self._path}: makes image tokens of {self.hparams.n_embd_text} values, but "
                f"{path} takes {n_embd}: the two files are of different models"
            )

    def preprocess(self, image: ImageSource, name: str | None = None) -> Pixels:
        """Stage 1 alone, which several threads may do at once. Raises as `image.load_image`."""
        return images.preprocess(image, self.hparams.image_size, name)

    def encode(self, image: ImageSource | Pixels) -> ImageEmbedding:
        """Encodes one picture; see `encode_batch`."""
        return self.encode_batch([image])[0]

    def encode_batch(self, pictures: Sequence[ImageSource | Pixels]) -> list[ImageEmbedding]:
        """Encodes pictures together, but for those that are found in memory or on disk.

        They are found by their resized pixels, the vision file's content, the device, the
        precision and this package's version.

        Raises ImageError (see `image.load_image`), DeviceError, and ModelFileError when what comes
        out is no number: the file is damaged, or the device computes wrongly.
        """
        seen = [p if isinstance(p, Pixels) else self.preprocess(p) for p in pictures]
        started = time.perf_counter()
        keys = [self._cache_key(pixels.data) for pixels in seen]
        found: dict[str, Found] = {}
        new: dict[str, Pixels] = {}
        for key, pixels in zip(keys, seen, strict=True):
            known = self._cache.get(key)
            if known is None:
                new[key] = pixels
            else:
                found[key] = known
        for key, data in zip(new, self._compute(list(new.values())), strict=True):
            self._cache.put(key, data)
            found[key] = data, ""
        share = (time.perf_counter() - started) / max(1, len(seen))  # of each in what all took
        return [
            ImageEmbedding(found[key][0], pixels.seconds, share, pixels.name, found[key][1])
            for key, pixels in zip(keys, seen, strict=True)
        ]

    def _compute(self, pictures: Sequence[Pixels]) -> Iterator[npt.NDArray[np.float32]]:
        """Stages 2 and 3: float32 [n_tokens, n_embd_text], read-only, of each picture."""
        if not pictures:
            return
        mean, std = self.hparams.image_mean, self.hparams.image_std
        batch = np.stack([images.normalise(pixels.data, mean, std) for pixels in pictures])
        rows = self._vision.encode(batch)  # [n, n_tokens, n_embd_text]
        for data, pixels in zip(rows, pictures, strict=True):
            if not np.isfinite(data).all():
                raise ModelFileError(
                    f"{self._path}: makes no numbers of {pixels.name} on {self._device}: download "
                    "or convert it again, or try --device cpu"
                )
            data = data.copy()  # a view would keep all of the batch in memory
            data.flags.writeable = False
            yield data

    def forget(self) -> None:
        """Forgets the pictures in memory; those on disk stay."""
        self._cache.forget()

    def _cache_key(self, pixels: npt.NDArray[np.uint8]) -> str:
        if self._scope is None and self.hashes is not None:
            self._scope = loaded_digest(self._path, self._loaded, self.hashes)
        if self._scope is None:  # for this object alone
            self._scope = ""
            self._cache = self._new_cache(None)
        seen = hashlib.sha256(pixels.data).hexdigest()
        return cache_key(
            self._scope, self._device, self.precision, self.kernels, pixels.shape, seen
        )

    def _new_cache(self, directory: Path | None) -> EmbeddingCache:
        shape = self.hparams.n_tokens, self.hparams.n_embd_text
        return EmbeddingCache(shape, DiskCache(directory))
