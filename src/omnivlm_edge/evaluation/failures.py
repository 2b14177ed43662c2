"""Wrong answers as a sheet of pictures: what was shown, asked, answered, and what is right."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import islice

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..batch.inputs import read_source
from ..errors import ImageError
from ..image import load_image
from .benchmark import Picture, Question, opened

COLUMNS, ROWS = 4, 3
SIDE = 280  # pixels of a picture
PADDING = 16
LINE = 19
_SIZE = 15

_INK, _PALE, _WRONG, _RIGHT = "#1b1b1b", "#f2f2f2", "#b3261e", "#1b6e2d"

# Fonts with Chinese, by the names of their files; Pillow looks for them where the system keeps such
_FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf"),
    *("wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf"),
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Light.ttc", "Arial Unicode.ttf"),
)


def draw_sheet(examples: Iterable[tuple[Question, str | None]]) -> bytes | None:
    """A PNG file of the first of the examples, with their answers; None where there are none.

    Below a picture stand the question, in red the answer, in green what is right.
    """
    some = list(islice(examples, COLUMNS * ROWS))
    if not some:
        return None
    font, has_chinese = _font()
    captions = []
    for question, answer in some:
        said = "(failed)" if answer is None else answer or "(nothing)"
        parts = ((question.prompt, _INK, 8), (said, _WRONG, 4), (question.truth, _RIGHT, 4))
        captions.append(
            [
                (line, colour)
                for text, colour, most in parts
                for line in _wrapped(text if has_chinese else _plain(text), font, most)
            ]
        )
    columns = min(COLUMNS, len(some))
    width = SIDE + 2 * PADDING
    rows = range(0, len(some), columns)
    heights = [
        SIDE + 2 * PADDING + LINE * max(map(len, captions[row : row + columns])) for row in rows
    ]
    sheet = Image.new("RGB", (columns * width, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, ((question, _), lines) in enumerate(zip(some, captions, strict=True)):
        left = place % columns * width + PADDING
        top = sum(heights[: place // columns]) + PADDING // 2
        sheet.paste(_picture(question.pictures), (left, top))
        for number, (line, colour) in enumerate(lines):
            below = top + SIDE + PADDING // 2 + number * LINE
            draw.text((left, below), line, fill=colour, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _picture(pictures: tuple[Picture, ...]) -> Image.Image:
    """The first picture, as a square; grey where there is none, or it cannot be shown."""
    square = Image.new("RGB", (SIDE, SIDE), _PALE)
    if not pictures:
        return square
    source = opened(pictures[0])
    if isinstance(source, str):
        return square
    try:
        image = load_image(read_source(source, "picture")).image
    except ImageError:
        return square
    return ImageOps.pad(image, (SIDE, SIDE), color=_PALE)


def _font() -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, bool]:
    """A font, and whether it has Chinese characters."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, _SIZE), True
        except OSError:
            continue
    return ImageFont.load_default(_SIZE), False


def _plain(text: str) -> str:
    """With ? for what Pillow's own font lacks."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most: int
) -> Iterator[str]:
    """Lines as wide as a picture, broken between words or Chinese characters; the last may end …"""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for piece in _pieces(paragraph):
            if line and font.getlength(line + piece.rstrip()) > SIDE:
                lines.append(line.rstrip())
                line = ""
            line += piece
        lines.append(line.rstrip())
    lines = [line for line in lines if line]
    yield from lines[: most - 1]
    if len(lines) == most:
        yield lines[-1]
    elif len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "...") > SIDE:
            last = last[:-1]
        yield last + "..."


def _pieces(text: str) -> Iterator[str]:
    """Words with the space behind them, each Chinese character on its own, long words in parts."""
    word = ""
    for character in text:
        if ord(character) >= 0x2E80 or len(word) >= 24:
            yield word
            word = character
        elif character == " ":
            yield word + " "
            word = ""
        else:
            word += character
    yield word
