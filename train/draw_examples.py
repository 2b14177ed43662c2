"""Draw the example pictures: horses and a duck by the water, and a shopping cart of food.

python train/draw_examples.py examples
"""

import argparse
from pathlib import Path

import numpy as np

from scenes import Scene, put, render
from things import KINDS

SIZE = 768
EXAMPLES = {
    "horses.png": ("water", 3, {3: "horse", 4: "horse", 5: "duck", 7: "horse"}),
    "shopping.png": (
        "cart",
        5,
        {0: "egg", 1: "glass of milk", 3: "carrot", 4: "egg", 5: "carrot", 8: "egg"},
    ),
}


def example(name: str) -> Scene:
    """The scene of an example picture, by the picture's name."""
    setting, seed, cells = EXAMPLES[name]
    rng = np.random.default_rng(seed)
    placed = tuple(
        put(
            KINDS[one],
            cell,
            (rng.uniform(-0.025, 0.025), rng.uniform(-0.025, 0.025)),
            rng.uniform(0.25, 0.32),
            bool(rng.random() < 0.5),
        )
        for cell, one in cells.items()
    )
    return Scene(setting, placed, int(rng.integers(2**31)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name in EXAMPLES:
        render(example(name), SIZE).save(folder / name)


if __name__ == "__main__":
    main()
