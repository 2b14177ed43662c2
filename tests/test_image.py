"""Pictures from everywhere, in every mode, right and wrong."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import ExifTags, Image

from omnivlm_edge import ImageError
from omnivlm_edge.image import Picture, load_image, normalise, preprocess, resize, shrink


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def solid(picture: Picture) -> tuple[int, int, int]:
    """The colour of a picture of one colour."""
    assert picture.image.mode == "RGB"
    colours = picture.image.getcolors(maxcolors=1)
    assert colours is not None, "more than one colour"
    return colours[0][1]


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "TIFF", "GIF"])
def test_every_kind_of_source_gives_the_same_pixels(
    tmp_path: Path, picture: Image.Image, format: str
) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(picture, format, **options)
    path = tmp_path / "picture with spaces.bin"  # the name's ending does not matter
    path.write_bytes(data)
    want = np.asarray(picture)
    with path.open("rb") as file:
        for source in (path, str(path), data, bytearray(data), io.BytesIO(data), file, picture):
            loaded = load_image(source)
            assert np.array_equal(np.asarray(loaded.image), want)
            assert loaded.format == (None if source is picture else format)
            assert load_image(loaded) is loaded
    assert np.array_equal(np.asarray(load_image(want).image), want)


def test_shrinking_changes_nothing_that_a_model_sees(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    loaded = load_image(encoded(picture, "PNG", exif=exif))
    small = shrink(loaded, 84)
    assert small.image.size == (84, 84)
    assert (small.original_size, small.format, small.turned) == ((130, 90), "PNG", True)
    assert np.array_equal(preprocess(small, 84).data, preprocess(loaded, 84).data)
    assert preprocess(small, 84).seconds > small.seconds > 0


def test_the_caller_s_picture_stays_as_it_is(picture: Image.Image) -> None:
    picture.getexif()[ExifTags.Base.Orientation] = 6
    loaded = load_image(picture)
    assert (loaded.turned, loaded.image.size, picture.size) == (True, (90, 130), (130, 90))
    loaded.image.paste("black", (0, 0, 90, 130))
    assert picture.getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "AVIF", "HEIF"])
def test_kinds_that_lose_a_little(picture: Image.Image, format: str) -> None:
    loaded = load_image(heic(picture) if format == "HEIF" else encoded(picture, format, quality=95))
    assert (loaded.format, loaded.original_size, loaded.turned) == (format, (130, 90), False)
    difference = np.asarray(loaded.image, int) - np.asarray(picture, int)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("brand", [b"heic", b"avif", b"mif1"])
def test_heic_and_avif_without_a_library(monkeypatch: pytest.MonkeyPatch, brand: bytes) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # its import fails
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in ("HEIF", "AVIF")])
    with pytest.raises(ImageError, match=r'pip install "omnivlm-edge\[heif\]"'):
        load_image(b"\0\0\0\x18ftyp" + brand + bytes(60))


def test_a_film_is_no_picture() -> None:
    with pytest.raises(ImageError, match="is not a picture of a kind"):
        load_image(b"\0\0\0\x18ftypisom" + bytes(60))


def test_what_messages_call_it(tmp_path: Path) -> None:
    assert load_image(np.zeros((2, 2), np.uint8)).name == "the array"
    assert load_image(np.zeros((2, 2), np.uint8), "frame 7").name == "frame 7"
    long = tmp_path / ("a" * 200 + ".png")
    with pytest.raises(ImageError) as caught:
        load_image(long)
    assert str(caught.value).startswith(str(long)[:40])
    assert "…" in str(caught.value)
    assert ".png: there is no such file" in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture: Image.Image, orientation: int) -> None:
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = picture if undo is None else picture.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = load_image(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(upright.image), np.asarray(picture))
    assert upright.original_size == stored.size
    assert upright.turned == (orientation > 1)


def test_heic_is_turned_by_its_decoder(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the encoder writes it as HEIC's own rotation too, as phones do
    upright = load_image(heic(picture.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes()))
    assert (upright.image.size, upright.original_size) == (picture.size, picture.size)
    assert not upright.turned
    difference = np.asarray(upright.image, int) - np.asarray(picture, int)
    assert np.abs(difference).mean() < 3


def heic(image: Image.Image, **info: object) -> bytes:
    file = pillow_heif.from_pillow(image)
    file.info.update(info)
    buffer = io.BytesIO()
    file.save(buffer, quality=95)
    return buffer.getvalue()


RED, HALF_RED = (255, 0, 0), (255, 127, 127)


def palette_with_transparency() -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return encoded(image, "PNG", transparency=1)


def sixteen_bit_grey(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((4, 4), value, np.uint16)), "PNG")


def sixteen_bit_colour() -> bytes:
    """A red PNG of 3 times 16 bits, which Pillow cannot write."""
    row = b"\0" + struct.pack(">HHH", 0xFFFF, 0, 0) * 4
    return png(struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0), row * 4)


def png(header: bytes, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        size, checksum = struct.pack(">I", len(body)), struct.pack(">I", zlib.crc32(kind + body))
        return size + kind + body + checksum

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), (255, 255, 255)),
        (encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 255))), RED),
        (encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128))), HALF_RED),
        (encoded(Image.new("LA", (4, 4), (0, 0))), (255, 255, 255)),
        (palette_with_transparency(), (255, 255, 255)),
        (encoded(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), RED),
        (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=95), (254, 0, 0)),
        (encoded(Image.new("RGB", (4, 4), RED).quantize(2), "PNG"), RED),
        (sixteen_bit_colour(), RED),
        (sixteen_bit_grey(0xFFFF), (255, 255, 255)),
        (sixteen_bit_grey(0x4D00), (77, 77, 77)),
    ],
    ids=[
        "transparent",
        "opaque",
        "half",
        "grey-alpha",
        "palette",
        "grey",
        "bilevel",
        "cmyk",
        "cmyk jpeg",
        "indexed",
        "16bit colour",
        "16bit",
        "16bit-77",
    ],
)
def test_every_mode_becomes_rgb(data: bytes, colour: tuple[int, int, int]) -> None:
    got = solid(load_image(data))
    assert max(abs(a - b) for a, b in zip(got, colour, strict=True)) <= 1


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert solid(load_image(data)) == RED


def test_grey_and_alpha_arrays() -> None:
    assert solid(load_image(np.full((3, 5), 9, np.uint8))) == (9, 9, 9)
    assert solid(load_image(np.full((3, 5, 1), 9, np.uint8))) == (9, 9, 9)
    assert solid(load_image(np.zeros((3, 5, 4), np.uint8))) == (255, 255, 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "must be uint8"),
        (np.zeros((4, 4, 2), np.uint8), "must be uint8"),
        (np.zeros(4, np.uint8), "must be uint8"),
        (np.zeros((0, 4, 3), np.uint8), "holds no pixels"),
    ],
    ids=["float", "two channels", "flat", "empty"],
)
def test_wrong_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(array)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no such file"):
        load_image(tmp_path / "none.png")


def test_directory_device_and_impossible_path(tmp_path: Path) -> None:
    for path in (tmp_path, "/dev/zero", ""):
        with pytest.raises(ImageError, match="is not a file"):
            load_image(path)
    with pytest.raises(ImageError, match="cannot be read"):
        load_image("a\0b.png")


@pytest.mark.parametrize(
    "data", [b"", b"hello, I am text", b"\x89PNG\r\n\x1a\n", b"GIF89a"], ids=repr
)
def test_not_a_picture(data: bytes) -> None:
    with pytest.raises(ImageError, match="is not a picture of a kind|is damaged"):
        load_image(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_cut_pictures_are_refused(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), format)
    with pytest.raises(ImageError):
        load_image(data[: len(data) // 2])


def test_damaged_pictures_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
        valid = encoded(Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)), format)
        for _ in range(100):
            data = bytearray(valid)
            data[rng.integers(len(data))] = rng.integers(256)
            with contextlib.suppress(ImageError):
                assert load_image(bytes(data)).image.mode == "RGB"


def test_decompression_bomb() -> None:
    """A PNG that claims 50,000 x 50,000 pixels in a few bytes."""
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(png(struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0), bytes(99)))


def test_file_objects_that_give_no_bytes(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="binary mode"):
        load_image(io.StringIO("text"))  # type: ignore[arg-type]
    closed = io.BytesIO(b"")
    closed.close()
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(closed)


@pytest.mark.parametrize(("value", "grey"), [(0.5, 127), (77.0, 77), (float("nan"), 0)])
def test_float_pictures(value: float, grey: int) -> None:
    data = encoded(Image.new("F", (4, 4), value), "TIFF")
    assert solid(load_image(data)) == (grey, grey, grey)


def test_wide_integers_with_8_bit_values() -> None:
    assert solid(load_image(Image.new("I", (4, 4), 77))) == (77, 77, 77)
    assert solid(load_image(Image.new("I", (4, 4), 77 * 256))) == (77, 77, 77)


def test_unknown_kind_of_source() -> None:
    with pytest.raises(ImageError, match="cannot be made from int"):
        load_image(3)  # type: ignore[arg-type]


def test_resize_and_normalise_as_in_training(picture: Image.Image) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    resized = resize(picture, 27)
    assert resized.dtype == np.uint8
    pillows = np.asarray(picture.resize((27, 27), Image.Resampling.BICUBIC))
    assert np.array_equal(resized, pillows)
    pixels = normalise(resized, mean, std)
    assert pixels.shape == (3, 27, 27)
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    want = (pillows.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(pixels, want.transpose(2, 0, 1), atol=1e-6)
