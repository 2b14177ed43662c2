"""What the demo says of pictures that it does not know."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from command import run
from omnivlm_edge.made_pictures import made_pictures
from omnivlm_edge.photographs import LIKENESS, likeness

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(ROOT / "train"))

import scenes  # noqa: E402

WARNING = "looks like a photograph; the demo knows drawings alone, and guesses"


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with the spectrum of photographs, dark at the lower border, as a JPEG file."""
    made = made_pictures(1)[0].image
    shade = np.linspace(1, 0.05, made.height)[:, None, None]
    dark = Image.fromarray((np.asarray(made) * shade).astype(np.uint8))
    path = tmp_path_factory.mktemp("photograph") / "photo.jpg"
    dark.filter(ImageFilter.GaussianBlur(1)).save(path, quality=90)
    return path


def test_photographs_and_drawings(photograph: Path) -> None:
    rng = np.random.default_rng(0)
    like = 0
    for number in range(60):
        drawn = scenes.render(scenes.sample_scene(rng, "test"), (126, 252, 512)[number % 3])
        if number % 2:
            file = io.BytesIO()
            drawn.save(file, "JPEG", quality=85)
            drawn = Image.open(file).convert("RGB")
        like += likeness(drawn) > LIKENESS
    assert like < 30
    assert likeness(Image.open(photograph)) > LIKENESS
    assert likeness(Image.new("RGB", (9, 7), "white")) == 0


@pytest.mark.parametrize("more", [(), ("--json",), ("--choices", "yes,no")])
def test_run_says_so_beside_the_answer(photograph: Path, more: tuple[str, ...]) -> None:
    result = run("run", "demo", "-i", photograph, "-p", "Is there an egg?", *more)
    assert f"({photograph}: {WARNING})\n" in result.stderr
    assert WARNING not in result.stdout
    known = run("run", "demo", "-i", EXAMPLES / "horses.png", "-p", "Is there an egg?", *more)
    assert known.stderr == ""


def test_a_chat_says_so_when_the_picture_comes(photograph: Path) -> None:
    result = run(
        "run", "demo", stdin=f"{photograph}\n{EXAMPLES / 'shopping.png'}\nIs there an egg?"
    )
    assert result.stderr.count(WARNING) == 1
    assert result.stdout.startswith("Yes")
