"""Drawn scenes of everyday things: how they are sampled and drawn, and what their patches show.

A scene is one to three kinds of thing, mostly one to three of each, on a jittered 3x3 grid over a
drawn setting. Most things are where they are at home (horses on grass, eggs in a fridge), so that
the training has habits that a model can fall for. Some pairs of things and some numbers of things
together (`held_out`) never come in training; every scene of the other splits has some of its own.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, combinations
from math import pi

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from drawings import drawing, has
from things import COLOURS, KINDS, SETTINGS, THINGS

SPLITS = ("train", "validation", "test")
RELATIONS = ("left", "right", "above", "below", "on", "next")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
MAX_COUNT = 4
TINTS = tuple(colour for colour in COLOURS if colour != "orange")  # too near to red and yellow
SMALL, LARGE = 0.23, 0.34  # a thing's size is below, above


@dataclass(frozen=True)
class Placed:
    """One drawn thing; `x`, `y` (its centre) and `size` are fractions of the picture's side.

    `angle` is in degrees, counter-clockwise; `tint` a colour in which it is drawn, if not its own;
    `style` one of drawings.STYLES; `variant` the number of a change of the drawing (0: none).
    """

    kind: int
    row: int
    column: int
    x: float
    y: float
    size: float
    mirrored: bool
    angle: int = 0
    tint: str = ""
    style: str = "noto"
    variant: int = 0


@dataclass(frozen=True)
class Scene:
    """A setting and the things in it, in reading order; `seed` fixes the setting's details.

    `light` multiplies the setting's red, green and blue, `marks` is the seed of shapes that are no
    things (0: none), `blur` the radius of a blur in pixels of a picture of 126.
    """

    setting: str
    placed: tuple[Placed, ...]
    seed: int
    flipped: bool = False
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    marks: int = 0
    blur: float = 0.0

    @cached_property
    def counts(self) -> dict[int, int]:
        """How many of each kind, in the order in which the kinds first appear."""
        kinds = [thing.kind for thing in self.placed]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def of(self, kind: int) -> list[Placed]:
        """The things of a kind, in reading order."""
        return [thing for thing in self.placed if thing.kind == kind]

    def colour(self, kind: int) -> str:
        """The colour of the things of a kind; "" if there are none or they have no single one."""
        things = self.of(kind)
        return (things[0].tint or THINGS[kind].colour) if things else ""

    def size(self, kind: int) -> int:
        """-1 for small things, 1 for large ones, 0 for those between."""
        size = self.of(kind)[0].size
        return (size > LARGE) - (size < SMALL)

    def seat(self, thing: Placed) -> Placed | None:
        """What the thing stands on: the support right below it."""
        if THINGS[thing.kind].support:
            return None
        for other in self.placed:
            below = (other.row, other.column) == (thing.row + 1, thing.column)
            if below and THINGS[other.kind].support:
                return other
        return None

    def stands(self, relation: str, a: Placed, b: Placed) -> bool:
        """Whether `a` is left of, right of, above, below, on or next to `b`."""
        match relation:
            case "left":
                return a.column < b.column
            case "right":
                return a.column > b.column
            case "above":
                return a.row < b.row
            case "below":
                return a.row > b.row
            case "on":
                return self.seat(a) == b
            case "next":
                return a.row == b.row and abs(a.column - b.column) == 1
        raise ValueError(f"relation is {relation!r}: it must be one of {', '.join(RELATIONS)}")

    def holds(self, relation: str, kind: int, other: int) -> bool:
        """Whether everything of `kind` stands so to everything of `other`, both being there."""
        return all(self.stands(relation, a, b) for a in self.of(kind) for b in self.of(other))

    def relations(self, kind: int, other: int) -> list[str]:
        """How a person would say that a single thing is to another: [] where it is askew."""
        (a,), (b,) = self.of(kind), self.of(other)
        if a.row != b.row and a.column != b.column:
            return []
        said = [relation for relation in RELATIONS if self.holds(relation, kind, other)]
        return [relation for relation in said if relation != "above" or "on" not in said]


# ---- sampling ---------------------------------------------------------------------------------

BACKDROPS = 64  # drawings of each setting in training; the other splits have new ones
HOME_SHARE = 0.75  # of the kinds are drawn from those at home in the setting
PARTNER_SHARE = 0.4  # of those behind another: the other's neighbour in the setting's list
CHANGED_SHARE = 0.5  # of the kinds, where several styles are wanted, look a little different
VARIANTS = 8  # changes of each drawing
VARIED_SIDE = 72  # pixels of a changed drawing
_ANGLES = (-18, -12, -6, 6, 12, 18)
_PAIR_RESIDUES = {"validation": 2, "test": 5}
_NUMBER_RESIDUES = {"validation": 0, "test": 4}


def held_out(kinds: dict[int, int], setting: str) -> set[str]:
    """The splits other than "train" to which these kinds and their counts belong; mostly none.

    Pairs of kinds are held out; numbers are in company (two horses with three cows) or, of a lone
    kind, in a setting. Were they held out by themselves, the training would teach that horses
    never come in twos: a fact, not a composition.
    """
    pairs = [(7 * a + 5 * b) % 11 for a, b in combinations(sorted(kinds), 2)]
    numbers = [
        (7 * a + 3 * m + 5 * b + 2 * n) % 13
        for (a, m), (b, n) in combinations(sorted(kinds.items()), 2)
        if m + n > 2
    ]
    if len(kinds) == 1:
        (kind, count), *_ = kinds.items()
        numbers = [(7 * kind + 3 * count + 5 * list(SETTINGS).index(setting)) % 13]
    return {
        split
        for split in _PAIR_RESIDUES
        if _PAIR_RESIDUES[split] in pairs or _NUMBER_RESIDUES[split] in numbers
    }


def _home_weights(home: tuple[str, ...]) -> tuple[list[int], list[float]]:
    """The kinds at home in a setting, and their weights summed up: the first ones' are largest."""
    return [KINDS[name] for name in home], list(
        accumulate(1 / (rank + 3) for rank in range(len(home)))
    )


_HOME = {name: _home_weights(setting.home) for name, setting in SETTINGS.items()}


def _sample_kinds(
    rng: np.random.Generator, setting: str, number: int, wanted: set[str], home_share: float
) -> dict[int, int]:
    """A number of kinds and how many there are of each, `held_out` for the wanted splits.

    Things that are at home come in couples (horses with cows): each even one of the setting's list
    with the next. So the couples' second halves can be expected where only the first ones are.
    """
    home, weights = _HOME[setting]
    while True:
        kinds: dict[int, int] = {}
        rank = len(home)
        for at_home, partner, which, count in rng.random((number, 4)).tolist():
            if rank < len(home) and partner < PARTNER_SHARE:
                rank ^= 1
            else:
                rank = bisect(weights, which * weights[-1]) if at_home < home_share else len(home)
            kind = home[rank] if rank < len(home) else int(which * len(THINGS))
            kinds[kind] = bisect((0.0, 0.4, 0.7, 0.96), count)
        fits = len(kinds) == number and sum(kinds.values()) <= 9
        if fits and held_out(kinds, setting) == wanted:
            return kinds


def put(
    kind: int,
    cell: int,
    offset: tuple[float, float],
    size: float,
    mirrored: bool,
    angle: int = 0,
    tint: str = "",
) -> Placed:
    """A thing in a cell of the grid (0..8 in reading order), `offset` from its centre."""
    row, column = divmod(cell, 3)
    x, y = 0.2 + 0.3 * column + offset[0], 0.2 + 0.3 * row + offset[1]
    return Placed(kind, row, column, x, y, size, mirrored, angle, tint)


def _arrange(rng: np.random.Generator, cells: dict[int, int]) -> dict[int, int]:
    """The kind by cell; often a thing has moved above a support, or beside or below another.

    So there is something to say of how single things stand to each other.
    """
    kinds = list(cells.values())
    lone = [cell for cell, kind in cells.items() if kinds.count(kind) == 1]
    supports = [cell for cell in lone if THINGS[cells[cell]].support and cell > 2]
    others = [cell for cell in lone if not THINGS[cells[cell]].support]
    way, which, where = rng.random(3).tolist()
    if supports and others and way < 0.9:
        taken, to = others[int(which * len(others))], supports[0] - 3
    elif len(lone) > 1 and way < 0.5:
        taken, fixed = lone[0], lone[-1]  # which of them is chance: the cells are in random order
        row, column = divmod(fixed, 3)
        beside = [3 * row + c for c in range(3) if c != column]
        beside += [3 * r + column for r in range(3) if r != row]
        to = beside[int(where * len(beside))]
    else:
        return cells
    moved = {to: cells[taken]} | ({taken: cells[to]} if to in cells else {})
    return {cell: kind for cell, kind in cells.items() if cell not in (taken, to)} | moved


def _seated(scene: Scene) -> Scene:
    """Things above a support and the support are moved together until they touch."""
    heights = {}
    for thing in scene.placed:
        if support := scene.seat(thing):
            middle = 0.35 + 0.3 * thing.row  # between the two rows
            gap = THINGS[support.kind].support * support.size + 0.43 * thing.size
            heights[thing] = middle - gap / 2
            heights[support] = middle + gap / 2
    placed = (replace(thing, y=heights.get(thing, thing.y)) for thing in scene.placed)
    return replace(scene, placed=tuple(placed)) if heights else scene


def sample_scene(
    rng: np.random.Generator,
    split: str,
    styles: Sequence[str] = ("noto",),
    home_share: float = HOME_SHARE,
) -> Scene:
    """A random scene of "train", "validation" or "test"; ValueError for another split.

    With several styles half of the kinds are drawn in the first one, and some are changed: what
    is there and where it stands does not depend on the styles. With a `home_share` of 0 all kinds
    are as likely in every setting and beside each other, but for what is held out.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}")
    setting = list(SETTINGS)[rng.integers(len(SETTINGS))]
    number = bisect((0.0, 0.3, 0.7), rng.random())  # of kinds, alike in all splits
    wanted = set() if split == "train" else {split}
    kinds = _sample_kinds(rng, setting, number, wanted, home_share)
    total = sum(kinds.values())
    sizes, tints = {}, {}
    for kind, count in kinds.items():
        way = rng.random()
        large = way > 0.85 and count < 3 and total < 6
        sizes[kind] = (0.185, 0.21) if way < 0.12 else (0.37, 0.42) if large else (0.26, 0.31)
        if THINGS[kind].tintable:
            tints[kind] = TINTS[rng.integers(len(TINTS))]
    things = [kind for kind, count in kinds.items() for _ in range(count)]
    cells = dict(zip(rng.permutation(9)[:total].tolist(), things, strict=True))
    cells = _arrange(rng, cells)
    placed = []
    for cell, (x, y, size, mirror, turn, angle) in zip(
        sorted(cells), rng.random((total, 6)).tolist(), strict=True
    ):
        kind = cells[cell]
        low, high = sizes[kind]
        placed.append(
            put(
                kind,
                cell,
                (0.05 * x - 0.025, 0.05 * y - 0.025),
                low + (high - low) * size,
                mirror < 0.5,
                _ANGLES[int(6 * angle)] if turn < 0.6 else 0,
                tints.get(kind, ""),
            )
        )
    bright, *hues, flip, marked, blurred, radius = rng.random(8).tolist()
    scene = Scene(
        setting,
        tuple(placed),
        seed=int(rng.integers(BACKDROPS) if split == "train" else rng.integers(BACKDROPS, 2**31)),
        flipped=flip < 0.5,
        light=tuple((0.82 + 0.26 * bright) * (0.95 + 0.1 * hue) for hue in hues),
        marks=int(rng.integers(1, 2**31)) if marked < 0.4 else 0,
        blur=0.3 + 0.4 * radius if blurred < 0.25 else 0.0,
    )
    return _styled(_seated(scene), rng, styles) if len(styles) > 1 else _seated(scene)


def _styled(scene: Scene, rng: np.random.Generator, styles: Sequence[str]) -> Scene:
    """The scene with a style for each kind, and changed drawings for some."""
    looks = {}
    for kind, (first, which, changed, variant) in zip(
        scene.counts, rng.random((len(scene.counts), 4)).tolist(), strict=True
    ):
        others = [style for style in styles[1:] if has(style, THINGS[kind])]
        style = styles[0] if first < 0.5 or not others else others[int(which * len(others))]
        looks[kind] = style, 1 + int(variant * VARIANTS) if changed < CHANGED_SHARE else 0
    placed = []
    for thing in scene.placed:
        style, variant = looks[thing.kind]
        placed.append(replace(thing, style=style, variant=variant))
    return replace(scene, placed=tuple(placed))


# ---- things -----------------------------------------------------------------------------------

_RGB = {
    "red": (214, 38, 38),
    "yellow": (247, 205, 30),
    "green": (48, 158, 62),
    "blue": (36, 96, 215),
    "purple": (140, 58, 184),
}
_SHADES = {  # of the darkest, the middle and the lightest parts of a tinted thing
    name: (
        tuple(int(0.3 * c) for c in rgb),
        rgb,
        tuple(int(0.55 * c + 0.45 * 255) for c in rgb),
    )
    for name, rgb in _RGB.items()
} | {
    "black": ((6, 6, 8), (38, 38, 42), (104, 104, 110)),
    "white": ((120, 122, 128), (226, 227, 230), (255, 255, 255)),
}


def _tinted(drawing: Image.Image, tint: str) -> Image.Image:
    """The drawing in shades of one colour, which its median becomes."""
    alpha = np.asarray(drawing.getchannel("A"))
    grey = np.asarray(drawing.convert("L")).astype(np.float64)
    low, median, high = np.percentile(grey[alpha > 127], (3, 50, 97))
    levels = min(low, median - 60), median, max(high, median + 60)  # flat drawings remain flat
    rgb = np.stack(
        [np.interp(grey, levels, shade) for shade in zip(*_SHADES[tint], strict=True)], -1
    )
    return Image.fromarray(np.dstack((rgb.astype(np.uint8), alpha)), "RGBA")


def _varied(image: Image.Image, seed: tuple[int, ...], recolour: bool) -> Image.Image:
    """The drawing (RGBA) as another hand might have drawn it: bent, flatter, in other colours.

    With `recolour` its hue may be any; else it stays near what it is.
    """
    rng = np.random.default_rng(seed)
    corners = np.array(((0, 0), (0, 1), (1, 1), (1, 0))) + rng.uniform(-0.14, 0.14, (4, 2))
    bent = (corners * image.size).ravel().tolist()
    image = image.transform(image.size, Image.Transform.QUAD, bent, Image.Resampling.BICUBIC)
    alpha, rgb = image.getchannel("A"), image.convert("RGB")
    flat, levels, hue, any_hue, *strengths = rng.random(7).tolist()
    if flat < 0.5:  # without shades, highlights and thin lines
        rgb = rgb.filter(ImageFilter.MedianFilter(5))
        rgb = rgb.quantize(3 + int(6 * levels)).convert("RGB")
    span = 255 if recolour and any_hue < 0.6 else 12
    h, s, v = rgb.convert("HSV").split()
    turn = int((hue - 0.5) * span)
    rgb = Image.merge("HSV", (h.point(lambda x: (x + turn) % 256), s, v)).convert("RGB")
    saturation = (0.1, 1.6) if recolour else (0.6, 1.4)
    for enhance, (low, high), strength in zip(
        (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness),
        (saturation, (0.65, 1.3), (0.75, 1.15)),
        strengths,
        strict=True,
    ):
        rgb = enhance(rgb).enhance(low + (high - low) * strength)
    rgb.putalpha(alpha)
    return rgb


@lru_cache(maxsize=8192)
def _emoji(style: str, kind: int, tint: str, variant: int, half: bool) -> Image.Image:
    """The thing as the style draws it, maybe at half that size, in a centred square (RGBA)."""
    if half:
        return _emoji(style, kind, tint, variant, False).reduce(2)
    thing = THINGS[kind]
    whole = drawing(style, thing)
    tight = whole.crop(whole.getbbox())
    tight = _tinted(tight, tint) if tint else tight
    square = ImageOps.pad(tight, (max(tight.size),) * 2, color=(0, 0, 0, 0))
    if not variant:
        return square
    square = square.resize((VARIED_SIDE,) * 2, Image.Resampling.LANCZOS)
    return _varied(square, (kind, variant), not (tint or thing.colour))


@lru_cache(maxsize=16384)
def _sprite(
    style: str, kind: int, tint: str, variant: int, pixels: int, mirrored: bool, angle: int
) -> Image.Image:
    """The thing at a size, maybe mirrored and turned (RGBA); turned, it gets larger borders."""
    image = _emoji(style, kind, tint, variant, False)
    if image.width > 2.5 * pixels:  # half as large, it is resized four times as fast
        image = _emoji(style, kind, tint, variant, True)
    sprite = image.resize((pixels, pixels), Image.Resampling.LANCZOS)
    sprite = ImageOps.mirror(sprite) if mirrored else sprite
    return sprite.rotate(angle, Image.Resampling.BICUBIC, expand=True) if angle else sprite


@lru_cache(maxsize=16384)
def _mask(
    style: str, kind: int, variant: int, pixels: int, mirrored: bool, angle: int
) -> Image.Image:
    """Where the thing covers what is behind it (L, 0 or 255)."""
    alpha = _sprite(style, kind, "", variant, pixels, mirrored, angle).getchannel("A")
    return alpha.point(lambda value: 255 * (value > 127))


def _drawn(scene: Scene, size: int) -> list[tuple[Placed, int]]:
    """The things in the order in which they are drawn, with their sides in pixels."""
    drawn = sorted(scene.placed, key=lambda thing: scene.seat(thing) is not None)
    return [(thing, round(thing.size * size)) for thing in drawn]


def _corner(thing: Placed, size: int, turned: int) -> tuple[int, int]:
    """The upper left corner of a sprite which, turned, is so many pixels wide."""
    return round(thing.x * size - turned / 2), round(thing.y * size - turned / 2)


# ---- settings ---------------------------------------------------------------------------------
def _shade(rng: np.random.Generator, colour: tuple[int, int, int], spread: int = 14) -> tuple:
    """The colour, a little lighter or darker and a little off."""
    common, own = rng.integers(-spread, spread + 1), rng.integers(-6, 7, 3)
    return tuple(int(np.clip(c + common + o, 0, 255)) for c, o in zip(colour, own, strict=True))


def _gradient(size: int, top: tuple, bottom: tuple) -> Image.Image:
    """A picture that fades from `top` to `bottom`."""
    fade = np.linspace(np.array(top), np.array(bottom), size).astype(np.uint8)[:, None]
    return Image.fromarray(fade).resize((size, size), Image.Resampling.NEAREST)


def _wave(size: int, y: float, height: float, phase: float, waves: float) -> list:
    """Points of a sine line across the picture, all arguments in fractions of its side."""
    x = np.linspace(0, 1, 33)
    line = y + height * np.sin(2 * pi * (waves * x + phase))
    return list(zip((x * size).tolist(), (line * size).tolist(), strict=True))


def _clouds(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, low: float) -> None:
    """Two to four clouds between the top and `low`."""
    for _ in range(rng.integers(2, 5)):
        x, y, width = rng.uniform(0, 1), rng.uniform(0.05, low), rng.uniform(0.05, 0.09)
        colour = _shade(rng, (244, 247, 251), 6)
        for dx, dy, scale in ((-1.1, 0.2, 0.7), (1.1, 0.2, 0.7), (-0.3, -0.2, 0.9), (0.5, 0, 0.9)):
            cx, cy, r = (x + dx * width) * size, (y + dy * width) * size, width * scale * size
            draw.ellipse((cx - r, cy - 0.7 * r, cx + r, cy + 0.7 * r), fill=colour)


def _water(rng: np.random.Generator, size: int) -> Image.Image:
    """A strip of sky over waves."""
    image = _gradient(size, _shade(rng, (120, 190, 225)), _shade(rng, (22, 84, 150)))
    draw = ImageDraw.Draw(image)
    horizon = rng.uniform(0.08, 0.2)
    draw.rectangle((0, 0, size, horizon * size), fill=_shade(rng, (205, 230, 245), 8))
    for y in np.arange(horizon + 0.05, 1, rng.uniform(0.07, 0.1)):
        line = _wave(size, y, rng.uniform(0.008, 0.018), rng.random(), rng.uniform(3, 7))
        draw.line(line, fill=_shade(rng, (150, 205, 235)), width=max(1, size // 90))
    return image


def _grass(rng: np.random.Generator, size: int) -> Image.Image:
    """Blades of grass on a meadow."""
    image = _gradient(size, _shade(rng, (150, 200, 95)), _shade(rng, (70, 140, 50)))
    draw = ImageDraw.Draw(image)
    for x, y, lean, height in rng.uniform((0, 0, -0.02, 0.03), (1, 1.05, 0.02, 0.08), (70, 4)):
        blade = [(x - 0.008, y), (x + lean, y - height), (x + 0.008, y)]
        green = (60, 130, 40) if lean < 0 else (120, 185, 70)
        draw.polygon([(px * size, py * size) for px, py in blade], fill=_shade(rng, green))
    return image


def _beach(rng: np.random.Generator, size: int) -> Image.Image:
    """Sand with ripples and pebbles below a strip of sea."""
    image = _gradient(size, _shade(rng, (240, 218, 165)), _shade(rng, (222, 186, 120)))
    draw = ImageDraw.Draw(image)
    sea = rng.uniform(0.06, 0.14)
    shore = _wave(size, sea, 0.012, rng.random(), rng.uniform(1, 3))
    draw.polygon([(0, 0), *shore, (size, 0)], fill=_shade(rng, (70, 160, 200)))
    draw.line(shore, fill=(250, 250, 245), width=max(1, size // 60))
    for y in np.arange(sea + 0.1, 1, rng.uniform(0.12, 0.18)):
        line = _wave(size, y, rng.uniform(0.005, 0.012), rng.random(), rng.uniform(1, 3))
        draw.line(line, fill=_shade(rng, (205, 165, 105)), width=max(1, size // 110))
    for x, y in rng.uniform((0, sea + 0.05), (1, 1), (30, 2)):
        dot = (x * size, y * size, (x + 0.012) * size, (y + 0.01) * size)
        draw.ellipse(dot, fill=_shade(rng, (190, 150, 100)))
    return image


def _sky(rng: np.random.Generator, size: int) -> Image.Image:
    """Clouds, and sometimes the sun."""
    image = _gradient(size, _shade(rng, (70, 150, 230)), _shade(rng, (180, 220, 248)))
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.5:
        x, r = rng.uniform(0.1, 0.9) * size, 0.1 * size
        draw.ellipse((x - r, -r / 2, x + r, 1.5 * r), fill=_shade(rng, (255, 225, 110), 8))
    _clouds(draw, rng, size, 0.95)
    return image


def _table(rng: np.random.Generator, size: int) -> Image.Image:
    """Wooden planks with their grain."""
    image = _gradient(size, _shade(rng, (178, 126, 80)), _shade(rng, (150, 98, 58)))
    draw = ImageDraw.Draw(image)
    edges = np.linspace(0, 1, rng.integers(4, 7)) + rng.uniform(-0.02, 0.02)
    for y in edges:
        for _ in range(3):
            grain = _wave(size, y + rng.uniform(0.03, 0.2), 0.006, rng.random(), rng.uniform(1, 2))
            draw.line(grain, fill=_shade(rng, (140, 90, 52)), width=max(1, size // 126))
        draw.line((0, y * size, size, y * size), fill=(84, 52, 30), width=max(1, size // 60))
    return image


def _cart(rng: np.random.Generator, size: int) -> Image.Image:
    """A wire shopping cart, seen from the side, on a shop's tiled floor."""
    image = _gradient(size, _shade(rng, (226, 224, 218)), _shade(rng, (196, 198, 204)))
    draw = ImageDraw.Draw(image)

    def at(x: float, y: float) -> tuple[float, float]:
        """A point of the basket: x and y from 0 to 1 go from its upper left to its lower right."""
        inset = 0.1 * y
        return (0.1 + inset + x * (0.88 - 1.4 * inset)) * size, (0.06 + y * 0.81) * size

    thin, thick = max(1, size // 100), max(2, size // 42)
    for y in np.arange(0.9, 1.06, 0.05):
        draw.line((0, y * size, size, y * size), fill=_shade(rng, (180, 182, 188), 6), width=thin)
    wire, frame = _shade(rng, (128, 136, 148)), _shade(rng, (96, 102, 114))
    for t in np.linspace(0, 1, rng.integers(9, 12)):
        draw.line((*at(t, 0), *at(t, 1)), fill=wire, width=thin)
    for t in np.linspace(0, 1, rng.integers(7, 10)):
        draw.line((*at(0, t), *at(1, t)), fill=wire, width=thin)
    corners = (at(0, 0), at(1, 0), at(1, 1), at(0, 1), at(0, 0))
    draw.line(corners, fill=frame, width=thick)
    handle = (0.01 * size, 0.04 * size, *at(0, 0))
    draw.line(handle, fill=_shade(rng, (205, 60, 55)), width=2 * thick)
    for x in (0.28, 0.8):
        cx, cy, r = x * size, 0.945 * size, 0.045 * size
        draw.line((*at(x, 1), cx, cy), fill=frame, width=thick)
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=(52, 54, 60))
        draw.ellipse((cx - r / 2, cy - r / 2, cx + r / 2, cy + r / 2), fill=(170, 172, 178))
    return image


def _snow(rng: np.random.Generator, size: int) -> Image.Image:
    """White hills under a pale sky, and falling flakes."""
    image = _gradient(size, _shade(rng, (168, 190, 216), 8), _shade(rng, (206, 220, 236), 6))
    draw = ImageDraw.Draw(image)
    for base, colour in ((0.16, (226, 234, 244)), (0.3, (236, 242, 249)), (0.62, (246, 249, 252))):
        hill = _wave(size, base, rng.uniform(0.02, 0.05), rng.random(), rng.uniform(0.6, 1.6))
        draw.polygon([(0, size), *hill, (size, size)], fill=_shade(rng, colour, 4))
        draw.line(hill, fill=(196, 210, 228), width=max(1, size // 110))
    for x, y, r in rng.uniform((0, 0, 0.004), (1, 1, 0.011), (60, 3)):
        box = ((x - r) * size, (y - r) * size, (x + r) * size, (y + r) * size)
        draw.ellipse(box, fill=(255, 255, 255), outline=(190, 205, 224))
    return image


def _road(rng: np.random.Generator, size: int) -> Image.Image:
    """Asphalt with dashed lines between a kerb and a strip of houses' wall."""
    image = _gradient(size, _shade(rng, (104, 106, 112), 10), _shade(rng, (82, 84, 90), 10))
    draw = ImageDraw.Draw(image)
    kerb = rng.uniform(0.05, 0.1)
    draw.rectangle((0, 0, size, kerb * size), fill=_shade(rng, (186, 178, 164)))
    draw.rectangle((0, kerb * size, size, (kerb + 0.02) * size), fill=(222, 222, 218))
    line = (232, 190, 60) if rng.random() < 0.3 else (236, 236, 232)
    length, start = rng.uniform(0.1, 0.16), rng.uniform(-0.2, 0)
    for y in (0.36, 0.65):
        for x in np.arange(start, 1, 1.7 * length):
            draw.rectangle((x * size, y * size, (x + length) * size, (y + 0.018) * size), fill=line)
    draw.rectangle((0, 0.96 * size, size, 0.975 * size), fill=(236, 236, 232))
    return image


def _room(rng: np.random.Generator, size: int) -> Image.Image:
    """A papered wall with a window, a skirting board and a floor."""
    walls = ((226, 200, 172), (190, 208, 196), (206, 196, 216), (222, 212, 160), (216, 186, 182))
    wall = _shade(rng, walls[rng.integers(len(walls))], 8)
    image = _gradient(size, wall, wall)
    draw = ImageDraw.Draw(image)
    stripe = tuple(max(0, c - 10) for c in wall)
    for x in np.arange(rng.uniform(0, 0.08), 1, 0.12):
        draw.rectangle((x * size, 0, (x + 0.05) * size, size), fill=stripe)
    x, y, width = rng.uniform(0.05, 0.6), rng.uniform(0.03, 0.1), rng.uniform(0.28, 0.36)
    pane = (x * size, y * size, (x + width) * size, (y + 0.34) * size)
    frame, thick = (250, 248, 244), max(2, size // 45)
    draw.rectangle(pane, fill=_shade(rng, (172, 208, 232), 8), outline=frame, width=thick)
    middle = (x + width / 2) * size
    draw.line((middle, pane[1], middle, pane[3]), fill=frame, width=thick)
    floor = rng.uniform(0.74, 0.8)
    draw.rectangle((0, floor * size, size, size), fill=_shade(rng, (146, 104, 72)))
    draw.rectangle((0, floor * size, size, (floor + 0.025) * size), fill=frame)
    for y in np.arange(floor + 0.08, 1, 0.07):
        draw.line((0, y * size, size, y * size), fill=(112, 78, 52), width=max(1, size // 126))
    return image


def _fridge(rng: np.random.Generator, size: int) -> Image.Image:
    """The cold white inside, glass shelves under every row, the door's dark seal and a lamp."""
    image = _gradient(size, _shade(rng, (206, 226, 236), 6), _shade(rng, (178, 204, 220), 6))
    draw = ImageDraw.Draw(image)
    seal, body = rng.uniform(0.025, 0.045), _shade(rng, (120, 126, 136), 12)
    lamp = rng.uniform(0.35, 0.55)
    draw.rectangle((lamp * size, 0, (lamp + 0.14) * size, 0.05 * size), fill=(255, 252, 220))
    for y in (0.345, 0.645):
        draw.rectangle(
            (0, y * size, size, (y + 0.022) * size), fill=_shade(rng, (120, 190, 206), 6)
        )
        draw.line((0, y * size, size, y * size), fill=(240, 252, 255), width=max(1, size // 100))
    draw.rectangle((0, 0.94 * size, size, size), fill=_shade(rng, (150, 178, 196), 6))
    draw.line((0, 0.94 * size, size, 0.94 * size), fill=(236, 246, 250), width=max(1, size // 90))
    for left, right in ((0, seal), (1 - seal, 1)):
        draw.rectangle((left * size, 0, right * size, size), fill=body)
    return image


def _forest(rng: np.random.Generator, size: int) -> Image.Image:
    """Dark trunks under leaves, and a mossy ground."""
    image = _gradient(size, _shade(rng, (96, 134, 88), 8), _shade(rng, (58, 90, 54), 8))
    draw = ImageDraw.Draw(image)
    ground = rng.uniform(0.8, 0.88)
    for x, width in rng.uniform((0, 0.025), (1, 0.06), (9, 2)):
        brown = _shade(rng, (84, 64, 46), 10)
        edges = ((x - width / 2) * size, 0, (x + width / 2) * size, (ground + 0.03) * size)
        draw.rectangle(edges, fill=brown)
    draw.rectangle((0, ground * size, size, size), fill=_shade(rng, (72, 76, 40), 8))
    for x, y, r in rng.uniform((0, -0.03, 0.05), (1, 0.1, 0.1), (26, 3)):
        box = ((x - r) * size, (y - r) * size, (x + r) * size, (y + r) * size)
        draw.ellipse(box, fill=_shade(rng, (44, 92, 44), 16))
    for x, y in rng.uniform((0, ground), (1, 1), (20, 2)):
        draw.line((x * size, y * size, (x + 0.02) * size, (y - 0.03) * size), fill=(100, 120, 60))
    return image


def _desert(rng: np.random.Generator, size: int) -> Image.Image:
    """Orange dunes under a yellow sky."""
    image = _gradient(size, _shade(rng, (250, 214, 150), 6), _shade(rng, (244, 196, 120), 6))
    draw = ImageDraw.Draw(image)
    for base, colour in ((0.14, (226, 150, 84)), (0.38, (214, 132, 66)), (0.68, (198, 114, 52))):
        dune = _wave(size, base, rng.uniform(0.03, 0.06), rng.random(), rng.uniform(0.6, 1.4))
        draw.polygon([(0, size), *dune, (size, size)], fill=_shade(rng, colour, 8))
        for down in np.arange(0.05, 0.22, 0.06):
            ripple = [(px, py + down * size) for px, py in dune]
            draw.line(ripple, fill=_shade(rng, colour, 16), width=max(1, size // 110))
    return image


_DRAW = {
    "water": _water,
    "grass": _grass,
    "beach": _beach,
    "sky": _sky,
    "table": _table,
    "cart": _cart,
    "snow": _snow,
    "road": _road,
    "room": _room,
    "fridge": _fridge,
    "forest": _forest,
    "desert": _desert,
}


@lru_cache(maxsize=len(SETTINGS) * BACKDROPS + 100)
def _backdrop(setting: str, seed: int, size: int) -> Image.Image:
    """The setting with a little noise."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(_DRAW[setting](rng, size)).astype(np.int16)
    pixels += rng.integers(-5, 6, (size, size, 1), dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _mark(image: Image.Image, seed: int) -> None:
    """Draw three to seven shapes that are no things: dots, dashes, triangles, crosses."""
    rng, size, draw = np.random.default_rng(seed), image.width, ImageDraw.Draw(image)
    shapes = rng.random((rng.integers(3, 8), 8)).tolist()
    for shape, x, y, radius, angle, *colour in shapes:
        cx, cy, r = x * size, y * size, (0.012 + 0.018 * radius) * size
        fill = tuple(int(40 + 190 * c) for c in colour)
        turn = np.exp(2j * pi * (angle + np.arange(3) / 3)) * r
        if shape < 0.4:
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
        elif shape < 0.7:
            draw.polygon([(cx + z.real, cy + z.imag) for z in turn], fill=fill)
        else:
            dx, dy = 1.5 * turn[0].real, 1.5 * turn[0].imag
            width = max(1, size // 70)
            draw.line((cx - dx, cy - dy, cx + dx, cy + dy), fill=fill, width=width)
            if shape > 0.85:
                draw.line((cx + dy, cy - dx, cx - dy, cy + dx), fill=fill, width=width)


# ---- pictures and labels ----------------------------------------------------------------------


def render(scene: Scene, size: int, style: str = "") -> Image.Image:
    """The scene as an RGB picture of size x size pixels, all of it in one style if that is given.

    Raises FileNotFoundError if the style's drawings are not installed.
    """
    image = _backdrop(scene.setting, scene.seed, size)
    image = ImageOps.mirror(image) if scene.flipped else image.copy()
    if scene.light != (1.0, 1.0, 1.0):
        table = np.outer(scene.light, np.arange(256)).clip(0, 255).astype(np.uint8)
        image = image.point(table.ravel().tolist())
    if scene.marks:
        _mark(image, scene.marks)
    for thing, side in _drawn(scene, size):
        look = (style, thing.kind, thing.tint, 0)
        if not style:
            look = (thing.style, thing.kind, thing.tint, thing.variant)
        sprite = _sprite(*look, side, thing.mirrored, thing.angle)
        image.paste(sprite, _corner(thing, size, sprite.width), sprite)
    return image.filter(ImageFilter.GaussianBlur(scene.blur * size / 126)) if scene.blur else image


def patch_labels(scene: Scene, image_size: int, patch: int) -> np.ndarray:
    """int64 [3, n²], n = image_size // patch: what each patch shows, and how much of it there is.

    The rows: which thing covers the patch, which has its centre there (both as 1 + the kind), and
    how many of the first row's kind the whole scene has. 0 stands for nothing, -100 in the first
    and last row for too little to tell.
    """
    cover = Image.new("L", (image_size, image_size))
    for thing, side in _drawn(scene, image_size):
        look = (thing.style, thing.kind, thing.variant)
        mask = _mask(*look, side, thing.mirrored, thing.angle)
        cover.paste(thing.kind + 1, _corner(thing, image_size, mask.width), mask)
    grid = image_size // patch
    side = grid * patch
    pixels = np.asarray(cover)[:side, :side].reshape(grid, patch, side)
    best = np.zeros((grid, grid))
    covered, numbers = np.zeros((2, grid, grid), np.int64)
    for kind, count in scene.counts.items():
        ones = (pixels == kind + 1).sum(1, dtype=np.uint8 if patch < 256 else np.int32)
        share = ones.reshape(grid, grid, patch).sum(-1) / patch**2
        covered[share > best], numbers[share > best] = kind + 1, count
        best = np.maximum(best, share)
    for row in (covered, numbers):
        row[best <= 0.2] = -100
        row[best <= 0.05] = 0
    centres = np.zeros((grid, grid), np.int64)
    for thing in scene.placed:
        row, column = (min(int(v * image_size / patch), grid - 1) for v in (thing.y, thing.x))
        centres[row, column] = thing.kind + 1
    return np.stack((covered, centres, numbers)).reshape(3, -1)
