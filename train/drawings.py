"""The styles in which things are drawn: where their drawings come from, and one drawing of a thing.

Noto's are in a font of Debian's. The others come from npm packages of fixed version and digest,
which `npm pack` fetches, and lie as PNG files in a cache folder.
"""

import argparse
import hashlib
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from platformdirs import user_cache_path

from errors import TrainError
from things import THINGS, Thing

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CACHE = user_cache_path("omnivlm-edge-train")
SIDE = 128  # pixels of a drawing that is made from curves


@dataclass(frozen=True)
class Package:
    """An npm package of drawings; `lacks` are things that it has none of, `drawn_alone` if its
    pictures are PNG files (of 64 pixels), else they are curves in Iconify's icons.json."""

    name: str
    sha256: str
    licence: str
    drawn_alone: bool = False
    lacks: frozenset[str] = frozenset()


_NEWER = frozenset(("chair", "giraffe", "swan", "head of broccoli", "teddy bear"))
PACKAGES = {
    "twemoji": Package(
        "emoji-datasource-twitter@16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "CC-BY-4.0",
        drawn_alone=True,
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1@1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        lacks=_NEWER,
    ),
    "emojione": Package(
        "@iconify-json/emojione@1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        lacks=_NEWER,
    ),
}
STYLES = ("noto", *PACKAGES)
UNSEEN = "twemoji"  # for tests alone: no training may name it

# Icons that are not called like the thing.
_ICONS = {
    "sheep": "ewe",
    "loaf of bread": "bread",
    "piece of cheese": "cheese-wedge",
    "apple": "red-apple",
    "slice of pizza": "pizza",
    "car": "automobile",
    "boat": "sailboat",
    "cup": "hot-beverage",
    "clock": "alarm-clock",
    "ball": "soccer-ball",
    "fish": "tropical-fish",
    "bee": "honeybee",
    "bunch of grapes": "grapes",
    "slice of watermelon": "watermelon",
    "head of broccoli": "broccoli",
    "donut": "doughnut",
    "cake": "birthday-cake",
    "ice cream cone": "soft-ice-cream",
    "bowl of rice": "cooked-rice",
    "jar of honey": "honey-pot",
    "train": "locomotive",
    "truck": "delivery-truck",
    "book": "closed-book",
    "pair of scissors": "scissors",
    "phone": "mobile-phone",
    "sofa": "couch-and-lamp",
    "box": "package",
    "shoe": "running-shoe",
    "shirt": "t-shirt",
    "hat": "top-hat",
    "tree": "deciduous-tree",
}


def folder(style: str) -> Path:
    """Where the drawings of a style from a package lie."""
    return CACHE / PACKAGES[style].name.split("/")[-1].replace("@", "-")


def file_name(thing: Thing) -> str:
    """The name of its drawing there."""
    return f"{ord(thing.emoji):04x}.png"


def has(style: str, thing: Thing) -> bool:
    """Whether the style has a drawing of it."""
    return style not in PACKAGES or thing.one not in PACKAGES[style].lacks


def drawing(style: str, thing: Thing) -> Image.Image:
    """The thing as the style draws it (RGBA); FileNotFoundError if the style is not installed."""
    if style == "noto":
        if not FONT.exists():
            raise FileNotFoundError(
                f"{FONT}: the font of the drawings is missing; install Debian's package "
                "fonts-noto-color-emoji"
            )
        canvas = Image.new("RGBA", (160, 160))
        font = ImageFont.truetype(FONT, 109)
        ImageDraw.Draw(canvas).text((10, 10), thing.emoji, font=font, embedded_color=True)
        return canvas
    if style not in STYLES:
        raise ValueError(f"style is {style!r}: it must be one of {', '.join(STYLES)}")
    path = folder(style) / file_name(thing)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: the drawings of the style {style} are missing; "
            f"`python train/drawings.py {style}` fetches them"
        )
    return Image.open(path).convert("RGBA")


# ---- fetching ---------------------------------------------------------------------------------


def fetch(style: str, archive: Path | None = None) -> None:
    """Put a style's drawings into its folder, unless they are there.

    Takes them from `archive`, or from the npm registry. TrainError says what to do if it cannot.
    """
    if style not in STYLES:
        raise TrainError(f"there is no style {style!r}; known are {', '.join(STYLES)}")
    if style == "noto":
        if not FONT.exists():
            raise TrainError(f"{FONT} is missing; install Debian's fonts-noto-color-emoji")
        return
    if folder(style).exists():
        return
    package = PACKAGES[style]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        archive = archive or _npm_pack(package, Path(name))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise TrainError(
                f"{archive}: is not npm's {package.name} (its sha256 is {digest}, not "
                f"{package.sha256}); get it with `npm pack`"
            )
        fresh = Path(name) / "drawings"
        fresh.mkdir()
        unpack(package, archive, fresh)
        if not folder(style).exists():  # another process may have been quicker
            fresh.rename(folder(style))


def _npm_pack(package: Package, into: Path) -> Path:
    """The package's archive, fetched into a folder."""
    try:
        subprocess.run(["npm", "pack", "--silent", package.name], cwd=into, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise TrainError(
            f"{package.name} cannot be fetched ({error}): run `npm pack {package.name}` where npm "
            "works and give the file to `python train/drawings.py STYLE --archive`"
        ) from error
    return next(into.glob("*.tgz"))


def unpack(package: Package, archive: Path, into: Path) -> None:
    """Write the drawing of every thing from the package's archive; TrainError if one lacks."""
    wanted = {thing.one: thing for thing in THINGS if thing.one not in package.lacks}
    with tarfile.open(archive) as members:
        found = (
            _png_files(members) if package.drawn_alone else _icons(members, list(wanted.values()))
        )
        for one, png in found:
            if thing := wanted.pop(one, None):
                (into / file_name(thing)).write_bytes(png)
    if wanted:
        raise TrainError(f"{archive}: has no drawing of a {', a '.join(sorted(wanted))}")


def _png_files(archive: tarfile.TarFile) -> Iterable[tuple[str, bytes]]:
    """The pictures of 64 pixels that are named by code points."""
    things = {file_name(thing): thing.one for thing in THINGS}
    for member in archive:
        # "2602-fe0f.png": the variation selector asks for the coloured picture of ☂
        name = Path(member.name).name.replace("-fe0f", "")
        if Path(member.name).parent.name == "64" and name in things:
            file = archive.extractfile(member)
            assert file is not None  # a picture is a regular file
            yield things[name], file.read()


def _icons(archive: tarfile.TarFile, things: list[Thing]) -> Iterable[tuple[str, bytes]]:
    """The icons of things, drawn from Iconify's JSON, whose fields are explained at
    https://iconify.design/docs/types/iconify-json.html."""
    import resvg_py

    file = archive.extractfile("package/icons.json")
    assert file is not None  # it is a regular file
    known = json.load(file)
    for thing in things:
        name = _ICONS.get(thing.one, thing.one.replace(" ", "-"))
        name = known.get("aliases", {}).get(name, {}).get("parent", name)
        if icon := known["icons"].get(name):
            width, height = (icon.get(side, known.get(side, 16)) for side in ("width", "height"))
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
                f"{icon['body']}</svg>"
            )
            png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE)
            yield thing.one, bytes(png)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetch the drawings of a style.")
    parser.add_argument("style", choices=list(PACKAGES))
    parser.add_argument("--archive", type=Path, help="its npm package, if that is there already")
    args = parser.parse_args()
    try:
        fetch(args.style, args.archive)
    except TrainError as error:
        raise SystemExit(f"error: {error}") from None
