"""Pictures for measurements where there are no photographs at hand: the same ones everywhere.

Colour noise whose amplitude falls as 1 / frequency, which is how the spectra of photographs fall
(Field 1987, doi:10.1364/JOSAA.4.002379), with a few shapes on it, for edges and flat surfaces.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .image import Picture, load_image

_SIDE = 512  # pixels; the model does its own resizing
_CHROMA = 0.4  # of photographs, too, most of the contrast is in the brightness


def made_pictures(n: int = 8) -> list[Picture]:
    """`n` pictures of 512 x 512 pixels; the first ones are the same for every `n`."""
    return [
        load_image(_draw(np.random.default_rng(seed)), f"made picture {seed + 1}")
        for seed in range(n)
    ]


def _draw(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    rgb = rng.uniform(0.35, 0.65, 3) + rng.uniform(0.1, 0.25) * _colour_noise(rng)
    y, x = np.mgrid[0:_SIDE, 0:_SIDE] / _SIDE
    for _ in range(rng.integers(3, 8)):
        angle = rng.uniform(0, np.pi)
        dx, dy = x - rng.uniform(0.1, 0.9), y - rng.uniform(0.1, 0.9)
        along = (dx * np.cos(angle) + dy * np.sin(angle)) / rng.uniform(0.05, 0.25)
        across = (dy * np.cos(angle) - dx * np.sin(angle)) / rng.uniform(0.05, 0.25)
        round_ = rng.random() < 0.5
        inside = (np.hypot(along, across) if round_ else np.maximum(abs(along), abs(across))) < 1
        surface = rng.uniform(0, 1, 3) + rng.uniform(0, 0.1) * _colour_noise(rng)
        rgb = np.where(inside[..., None], surface, rgb)
    return np.asarray(np.rint(rgb.clip(0, 1) * 255), np.uint8)


def _colour_noise(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """[side, side, 3] with a mean of 0; each channel is the brightness with a little of its own."""
    brightness, *colours = (_noise(rng) for _ in range(4))
    return np.stack([brightness + _CHROMA * colour for colour in colours], axis=-1)


def _noise(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """[side, side] with a mean of 0 and a standard deviation of 1."""
    frequency = np.hypot(np.fft.fftfreq(_SIDE)[:, None], np.fft.rfftfreq(_SIDE))
    frequency[0, 0] = np.inf  # no mean
    spectrum = np.fft.rfft2(rng.standard_normal((_SIDE, _SIDE))) / frequency
    noise = np.fft.irfft2(spectrum)
    return np.asarray(noise / noise.std())
