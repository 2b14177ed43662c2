"""Stage 1: a picture from anywhere -> normalised float32 pixels.

Follows the training's preprocessing (Pillow convert and bicubic resize straight to the square that
the model sees, no cropping, no padding), not the original runtime's own resampling.
"""

from __future__ import annotations

import io
import os
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .errors import ImageError

# How HEIC and AVIF files begin, from their fifth byte on (ISO/IEC 23008-12; MIAF; AVIF 1.1).
_HEIF_BRANDS = frozenset(
    b"ftyp" + brand
    for brand in b"heic heix heim heis hevc hevx hevm hevs mif1 msf1 avif avis".split()
)

# No others of Pillow's: some hand strangers' bytes to outside programs (EPS: Ghostscript).
_FORMATS = "JPEG MPO PNG WEBP GIF BMP DIB TIFF PPM ICO AVIF HEIF".split()

_READABLE = "JPEG, PNG, WebP, GIF, BMP and TIFF"

_READINGS = 3  # of a file that changes meanwhile

_warnings_lock = threading.Lock()  # the filters that catch_warnings restores are the process's


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture: `image` is RGB and upright, transparency on white.

    `name` is what messages call it, `original_size` (width, height) as its file stores it, `format`
    Pillow's name of the file's kind (None for pixels that came from no file), `turned` whether an
    EXIF orientation was applied. A HEIC decoder turns the picture itself: its size is upright and
    `turned` is false. `seconds` were spent on shrinking it.
    """

    image: Image.Image
    name: str
    original_size: tuple[int, int]
    format: str | None
    turned: bool
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Pixels:
    """A picture as a model sees it: `data` is uint8 [size, size, 3].

    `name` is the picture's, `seconds` what it took to make them.
    """

    data: npt.NDArray[np.uint8]
    name: str
    seconds: float


_Undecoded: TypeAlias = (
    "str | os.PathLike[str] | bytes | BinaryIO | Image.Image | npt.NDArray[np.uint8]"
)
ImageSource: TypeAlias = "Picture | _Undecoded"


def load_image(
    source: ImageSource, name: str | None = None, *, max_pixels: int | None = None
) -> Picture:
    """Opens a picture as RGB: upright by its EXIF orientation, transparency on white, first frame.

    `source` is a path, the bytes of an image file, a binary file object, a Pillow image, a uint8
    array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], or a Picture, which is returned as it is.
    `name` is what messages call it, if not by its path.

    Raises ImageError when the file is absent, is no picture, is damaged, or has so many pixels
    that decoding it could exhaust the memory (`max_pixels`, or Pillow's decompression-bomb limit).
    """
    if isinstance(source, Picture):
        return source
    name, opened = _open(source, name)
    readable = True
    try:
        if isinstance(opened, Image.Image):
            image = opened
        else:
            readable = not _is_heif(opened) or _register_heif()
            # Pillow only warns between one and two times its pixel limit (such phone pictures are
            # real), and about formats that it was built without, of which our error tells.
            with _warnings_lock, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Image.init()  # knows all formats from here on
                image = Image.open(
                    opened, formats=[name for name in _FORMATS if name in Image.OPEN]
                )
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise Image.DecompressionBombError
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        size, format = image.size, image.format
        if image is opened:  # the caller's, which stays as it is
            image = ImageOps.exif_transpose(image)
        else:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # a copy would double the memory
        return Picture(_to_rgb(image), name, size, format, turned)
    except Image.DecompressionBombError as exc:
        raise ImageError(f"{name}: has too many pixels to be decoded safely; shrink it") from exc
    except UnidentifiedImageError as exc:
        if not readable:
            raise ImageError(
                f"{name}: is a HEIC or AVIF picture, which cannot be read here; {_READABLE} can",
                'pip install "omnivlm-edge[heif]" adds it',
            ) from exc
        raise ImageError(
            f"{name}: is not a picture of a kind that can be read here, such as {_READABLE}"
        ) from exc
    except MemoryError as exc:
        raise ImageError(f"{name}: does not fit into memory; shrink it") from exc
    except Exception as exc:  # Pillow's decoders raise whatever damaged data leads them to
        raise ImageError(f"{name}: is damaged and cannot be decoded ({exc})") from exc


def preprocess(source: ImageSource, size: int, name: str | None = None) -> Pixels:
    """A picture from anywhere -> the square of `size` pixels that a model sees.

    `name` and errors as for `load_image`.
    """
    started = time.perf_counter()
    picture = load_image(source, name)
    data = resize(picture.image, size)
    return Pixels(data, picture.name, picture.seconds + time.perf_counter() - started)


def shrink(picture: Picture, size: int) -> Picture:
    """A picture of which only the square is kept that a model sees: `preprocess` adds nothing."""
    started = time.perf_counter()
    image = picture.image.resize((size, size), Image.Resampling.BICUBIC)
    return replace(picture, image=image, seconds=time.perf_counter() - started)


def resize(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """RGB image -> uint8 [size, size, 3], by Pillow's bicubic filter."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def normalise(
    pixels: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]
) -> npt.NDArray[np.float32]:
    """uint8 [size, size, 3] -> float32 [3, size, size]: (x / 255 - mean) / std."""
    scaled = pixels.astype(np.float32) / 255
    normalised = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), np.float32)


def shorten(name: str) -> str:
    """A path or an address as messages show it: of a long one its beginning and its end."""
    return name if len(name) <= 100 else f"{name[:60]}…{name[-39:]}"


def _open(source: _Undecoded, name: str | None) -> tuple[str, Image.Image | BinaryIO]:
    """A name for messages and what Pillow shall open."""
    if isinstance(source, Image.Image):
        return name or "the image", source
    if isinstance(source, np.ndarray):
        return name or "the array", _from_array(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return name or "the image data", io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        name = name or shorten(str(source))
        return name, _read_file(Path(source), name)
    if hasattr(source, "read"):
        return name or str(getattr(source, "name", "the file object")), _read_object(source)
    raise ImageError(
        f"a picture cannot be made from {type(source).__name__}: "
        "give a path, bytes, a file object, a Pillow image or a uint8 array"
    )


def _is_heif(file: BinaryIO) -> bool:
    beginning = file.read(12)
    file.seek(0)
    return beginning[4:] in _HEIF_BRANDS


def _register_heif() -> bool:
    """Teaches Pillow to read HEIC, if the `heif` extra is installed; AVIF it knows by itself."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _read_file(path: Path, name: str) -> BinaryIO:
    try:
        if path.exists() and not path.is_file():
            raise ImageError(f"{name}: is not a file; give the path of a picture")
        return io.BytesIO(_read_unchanged(path, name))
    except FileNotFoundError as exc:
        raise ImageError(f"{name}: there is no such file; check the picture's path") from exc
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ImageError(f"{name}: cannot be read ({reason})") from exc


def _read_unchanged(path: Path, name: str) -> bytes:
    """A file's content, of one moment: half of an old picture and half of a new one is none."""
    for _ in range(_READINGS):
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            data = file.read()
            after = os.fstat(file.fileno())
        unchanged = before.st_mtime_ns == after.st_mtime_ns and before.st_size == after.st_size
        if unchanged and len(data) == after.st_size:
            return data
    raise ImageError(f"{name}: is changed while it is read; try again when it is complete")


def _read_object(source: BinaryIO) -> BinaryIO:
    try:
        data = source.read()
    except (OSError, ValueError) as exc:
        raise ImageError(f"the file object cannot be read ({exc})") from exc
    if not isinstance(data, bytes):
        raise ImageError("the file object gives text: open the file in binary mode ('rb')")
    return io.BytesIO(data)


def _from_array(array: npt.NDArray[np.uint8]) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            f"an array of shape {list(array.shape)} and type {array.dtype} is no picture: "
            "it must be uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        )
    if array.size == 0:
        raise ImageError(f"an array of shape {list(array.shape)} holds no pixels")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Grey of 16 bits; Pillow's own conversion would clip at 255 instead of scaling. Mode I may
        # also hold 8-bit values in wider integers, which are taken as they are.
        grey = np.asarray(image).astype(np.int64)
        if image.mode != "I" or grey.max(initial=0) > 255:
            grey >>= 8
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if image.mode == "F":
        # Floats from 0 to 1, or on the scale of 8 bits; Pillow's own conversion knows the latter.
        grey = np.nan_to_num(np.asarray(image))
        scale = 255 if grey.max(initial=0) <= 1 else 1
        image = Image.fromarray(np.clip(grey * scale, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")
