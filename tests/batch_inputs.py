"""Pictures that the demo model knows well, and what comes out of a batch run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from command import run

EXAMPLES = Path(__file__).parents[1] / "examples"
QUESTION = "Describe the image"
# One thread: two of ggml's wait for each other where other programs run as well.
PLACE = ("--device", "cpu", "-t", "1")


def write_pictures(folder: Path, count: int) -> Path:
    """`count` different pictures: the examples, each time shifted by some pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = [
        np.asarray(Image.open(EXAMPLES / name).convert("RGB"))
        for name in ("horses.png", "shopping.png")
    ]
    for number in range(count):
        shifted = np.roll(photos[number % 2], 3 * (number // 2), axis=1)
        Image.fromarray(shifted).save(folder / f"{number:03}.png", compress_level=1)
    return folder


def batch(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return run("batch", "demo", *arguments, *PLACE, **env)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answers(path: Path) -> dict[tuple[str, str], Any]:
    """What may not change, by key and prompt, each of which must be there once."""
    rows = read_rows(path)
    lasting = ("answer", "finish_reason", "choices", "error", "prompt_sha256", "model_sha256")
    found = {(row["key"], row["prompt"]): [row[name] for name in lasting] for row in rows}
    assert len(found) == len(rows)
    return found
