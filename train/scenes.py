"""Drawn scenes of everyday things, and questions about them with known answers.

A scene is one to three kinds of thing, one to three of each, on a jittered 3x3 grid over a drawn
setting. Thing pairs in `HELD_OUT` never meet in a training scene; a held-out scene has such a pair.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import pi

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NUMBERS = ("no", "one", "two", "three")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
IMAGE_SIZE = 126
PATCH = 14


@dataclass(frozen=True)
class Thing:
    """A kind of thing: its emoji, its names, and a bare word ("bread") if it has one."""

    emoji: str
    one: str
    many: str
    category: str
    bare: str = ""

    @property
    def some(self) -> str:
        """The name without a number: "eggs", but "bread"."""
        return self.bare or self.many

    def counted(self, count: int) -> str:
        """As in "one egg", "two eggs", "no eggs"."""
        return f"{NUMBERS[count]} {self.one if count == 1 else self.many}"


THINGS = (
    Thing("🐎", "horse", "horses", "animal"),
    Thing("🐄", "cow", "cows", "animal"),
    Thing("🐑", "sheep", "sheep", "animal"),
    Thing("🐖", "pig", "pigs", "animal"),
    Thing("🐕", "dog", "dogs", "animal"),
    Thing("🐈", "cat", "cats", "animal"),
    Thing("🦆", "duck", "ducks", "animal"),
    Thing("🐓", "rooster", "roosters", "animal"),
    Thing("🐇", "rabbit", "rabbits", "animal"),
    Thing("🐘", "elephant", "elephants", "animal"),
    Thing("🦋", "butterfly", "butterflies", "animal"),
    Thing("🥚", "egg", "eggs", "food"),
    Thing("🍞", "loaf of bread", "loaves of bread", "food", "bread"),
    Thing("🥛", "glass of milk", "glasses of milk", "food", "milk"),
    Thing("🧀", "piece of cheese", "pieces of cheese", "food", "cheese"),
    Thing("🍎", "apple", "apples", "food"),
    Thing("🍌", "banana", "bananas", "food"),
    Thing("🥕", "carrot", "carrots", "food"),
    Thing("🍅", "tomato", "tomatoes", "food"),
    Thing("🍋", "lemon", "lemons", "food"),
    Thing("🍓", "strawberry", "strawberries", "food"),
    Thing("🍍", "pineapple", "pineapples", "food"),
    Thing("🍕", "slice of pizza", "slices of pizza", "food", "pizza"),
    Thing("🚗", "car", "cars", "vehicle"),
    Thing("🚌", "bus", "buses", "vehicle"),
    Thing("🚲", "bicycle", "bicycles", "vehicle"),
    Thing("⛵", "boat", "boats", "vehicle"),
    Thing("🚜", "tractor", "tractors", "vehicle"),
    Thing("🪑", "chair", "chairs", "household"),
    Thing("☕", "cup", "cups", "household"),
    Thing("🔑", "key", "keys", "household"),
    Thing("☂", "umbrella", "umbrellas", "household"),
    Thing("⏰", "clock", "clocks", "household"),
    Thing("⚽", "ball", "balls", "household"),
)
SETTINGS = {
    "water": "near the water",
    "grass": "on the grass",
    "beach": "on the beach",
    "sky": "in the sky",
    "table": "on a table",
    "cart": "in a shopping cart",
}
HELD_OUT = frozenset(
    pair for pair in combinations(range(len(THINGS)), 2) if (pair[0] * 7 + pair[1] * 5) % 11 == 3
)


@dataclass(frozen=True)
class Placed:
    """One drawn thing; `x`, `y` (its centre) and `size` are fractions of the picture's side."""

    kind: int
    row: int
    column: int
    x: float
    y: float
    size: float
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    """A setting and the things in it, in reading order; `seed` fixes the setting's details."""

    setting: str
    placed: tuple[Placed, ...]
    seed: int

    @property
    def counts(self) -> dict[int, int]:
        """How many of each kind, in the order in which the kinds first appear."""
        kinds = [thing.kind for thing in self.placed]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


@dataclass(frozen=True)
class Question:
    """A question about a scene; `kind` is describe, count, yesno, where or setting."""

    kind: str
    question: str
    answer: str


# ---- sampling ---------------------------------------------------------------------------------


def place(rng: np.random.Generator, setting: str, cells: dict[int, int]) -> Scene:
    """A scene with kind `cells[c]` in cell c (0..8 in reading order), jittered."""
    placed = tuple(
        Placed(
            kind=cells[cell],
            row=cell // 3,
            column=cell % 3,
            x=0.2 + 0.3 * (cell % 3) + rng.uniform(-0.025, 0.025),
            y=0.2 + 0.3 * (cell // 3) + rng.uniform(-0.025, 0.025),
            size=rng.uniform(0.25, 0.32),
            mirrored=bool(rng.random() < 0.5),
        )
        for cell in sorted(cells)
    )
    return Scene(setting, placed, int(rng.integers(2**31)))


def sample_kinds(rng: np.random.Generator, held_out: bool) -> list[int]:
    """One to three kinds; some pair of them is in `HELD_OUT` exactly if `held_out`."""
    while True:
        number = int(rng.integers(2 if held_out else 1, 4))
        kinds = [int(kind) for kind in rng.choice(len(THINGS), number, replace=False)]
        if held_out == any(pair in HELD_OUT for pair in combinations(sorted(kinds), 2)):
            return kinds


def sample_scene(rng: np.random.Generator, held_out: bool) -> Scene:
    """A random scene."""
    things = [k for k in sample_kinds(rng, held_out) for _ in range(rng.integers(1, 4))]
    cells = rng.choice(9, len(things), replace=False)
    setting = list(SETTINGS)[rng.integers(len(SETTINGS))]
    return place(rng, setting, dict(zip(cells.tolist(), things, strict=True)))


# ---- drawing ----------------------------------------------------------------------------------


@lru_cache(maxsize=len(THINGS))
def _emoji(kind: int) -> Image.Image:
    """The thing as drawn by the font, cropped to a centred square (RGBA)."""
    canvas = Image.new("RGBA", (160, 160))
    font = ImageFont.truetype(FONT, 109)
    ImageDraw.Draw(canvas).text((10, 10), THINGS[kind].emoji, font=font, embedded_color=True)
    tight = canvas.crop(canvas.getbbox())
    return ImageOps.pad(tight, (max(tight.size),) * 2, color=(0, 0, 0, 0))


@lru_cache(maxsize=8192)
def _sprite(kind: int, pixels: int, mirrored: bool) -> Image.Image:
    """The thing at a size, maybe mirrored (RGBA)."""
    sprite = _emoji(kind).resize((pixels, pixels), Image.Resampling.LANCZOS)
    return ImageOps.mirror(sprite) if mirrored else sprite


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


_DRAW = {
    "water": _water,
    "grass": _grass,
    "beach": _beach,
    "sky": _sky,
    "table": _table,
    "cart": _cart,
}


def _box(thing: Placed, size: int) -> tuple[int, int, int]:
    """Left, top and side of a thing in pixels."""
    side = round(thing.size * size)
    return round(thing.x * size - side / 2), round(thing.y * size - side / 2), side


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """The scene as an RGB picture of size x size pixels."""
    rng = np.random.default_rng(scene.seed)
    image = _DRAW[scene.setting](rng, size)
    pixels = np.asarray(image).astype(np.int16)
    pixels += rng.integers(-5, 6, (size, size, 1), dtype=np.int16)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    for thing in scene.placed:
        left, top, side = _box(thing, size)
        sprite = _sprite(thing.kind, side, thing.mirrored)
        image.paste(sprite, (left, top), sprite)
    return image


def patch_labels(scene: Scene) -> np.ndarray:
    """int64 [3, 81] for the patches: what is there, what has its centre there, how many there are.

    Things are 1 + their kind; the number is that of the first row's kind in the whole scene.
    0 stands for nothing, -100 in the first and last row for too little to tell.
    """
    cover = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    for thing in scene.placed:
        left, top, side = _box(thing, IMAGE_SIZE)
        mask = _sprite(thing.kind, side, thing.mirrored).getchannel("A")
        cover.paste(thing.kind + 1, (left, top), mask.point(lambda alpha: 255 * (alpha > 127)))
    grid, classes = IMAGE_SIZE // PATCH, len(THINGS) + 1
    patches = np.asarray(cover).reshape(grid, PATCH, grid, PATCH).swapaxes(1, 2)
    patches = patches.reshape(grid * grid, PATCH * PATCH).astype(np.int64)
    offsets = classes * np.arange(grid * grid)[:, None]
    counts = np.bincount((patches + offsets).ravel(), minlength=grid * grid * classes)
    counts = counts.reshape(grid * grid, classes)[:, 1:]
    share = counts.max(1) / PATCH**2
    covered = np.where(share > 0.2, 1 + counts.argmax(1), np.where(share > 0.05, -100, 0))
    centres = np.zeros_like(covered)
    for thing in scene.placed:
        centres[int(thing.y * grid) * grid + int(thing.x * grid)] = thing.kind + 1
    numbers = covered.copy()
    for kind, count in scene.counts.items():
        numbers[covered == kind + 1] = count
    return np.stack((covered, centres, numbers))


# ---- questions --------------------------------------------------------------------------------

DESCRIBE = (
    "Describe the image",
    "Describe the image.",
    "Describe this image for me",
    "Describe this picture.",
    "What is in the picture?",
    "What is in the image?",
    "What do you see?",
    "What can you see in this picture?",
)
SETTING = ("Where is this?", "Where was this picture taken?", "What is the setting?")
COUNT = (
    "How many {many} are there?",
    "How many {many} are in the picture?",
    "How many {many} do you see?",
    "How many {many} do I have?",
)
IS_THERE = ("Is there {a} {one}?", "Is there {a} {one} in the picture?", "Do you see {a} {one}?")
ARE_THERE = (
    "Are there any {many}?",
    "Are there any {many} in the picture?",
    "Do I have {some}?",
    "Do I have any {some}?",
    "Do you see any {some}?",
)
WHERE = ("Where is the {one}?", "Where is the {one} in the picture?")


def _pick(rng: np.random.Generator, choices: tuple | list):
    return choices[rng.integers(len(choices))]


def _ask(rng: np.random.Generator, templates: tuple[str, ...], thing: Thing) -> str:
    article = "an" if thing.one[0] in "aeiou" else "a"
    template = _pick(rng, templates)
    return template.format(a=article, one=thing.one, many=thing.many, some=thing.some)


def there_are(thing: Thing, count: int) -> str:
    """As in "there is one egg", "there are two eggs", "there are no eggs"."""
    return f"there {'is' if count == 1 else 'are'} {thing.counted(count)}"


def describe(scene: Scene) -> str:
    """As in "The image shows three horses and one duck near the water.": in reading order."""
    names = [THINGS[kind].counted(count) for kind, count in scene.counts.items()]
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return f"The image shows {listed} {SETTINGS[scene.setting]}."


def _count(rng: np.random.Generator, kind: int, count: int) -> Question:
    thing = THINGS[kind]
    return Question("count", _ask(rng, COUNT, thing), f"{there_are(thing, count)}.".capitalize())


def _yes_no(rng: np.random.Generator, kind: int, count: int) -> Question:
    thing = THINGS[kind]
    single = bool(rng.random() < 0.5)
    question = _ask(rng, IS_THERE if single else ARE_THERE, thing)
    if count:
        return Question("yesno", question, f"Yes, {there_are(thing, count)}.")
    absent = f"there is no {thing.one}" if single else f"there are no {thing.many}"
    return Question("yesno", question, f"No, {absent}.")


def _where(rng: np.random.Generator, thing: Placed) -> Question:
    name = THINGS[thing.kind].one
    place = f"{ROWS[thing.row]} {COLUMNS[thing.column]}"
    place = "in the middle" if place == "middle middle" else f"at the {place}"
    return Question("where", _ask(rng, WHERE, THINGS[thing.kind]), f"The {name} is {place}.")


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """A random set of questions on the scene: as many with yes as with no for an answer.

    Half of the absent things asked for are of the category of a present thing.
    """
    counts = scene.counts
    present = list(counts)
    absent = [kind for kind in range(len(THINGS)) if kind not in counts]
    categories = {THINGS[kind].category for kind in present}
    similar = [kind for kind in absent if THINGS[kind].category in categories]
    lone = [thing for thing in scene.placed if counts[thing.kind] == 1]

    def missing() -> int:
        return _pick(rng, similar if rng.random() < 0.5 else absent)

    asked = [Question("describe", _pick(rng, DESCRIBE), describe(scene))]
    asked += [_yes_no(rng, kind, counts[kind]) for kind in (_pick(rng, present) for _ in range(2))]
    asked += [_yes_no(rng, missing(), 0) for _ in range(2)]
    asked += [_count(rng, kind, counts[kind]) for kind in (_pick(rng, present) for _ in range(2))]
    asked += [_count(rng, missing(), 0)] if rng.random() < 0.5 else []
    asked += [_where(rng, _pick(rng, lone))] if lone else []
    asked += [Question("setting", _pick(rng, SETTING), f"It is {SETTINGS[scene.setting]}.")]
    return asked
