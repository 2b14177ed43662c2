"""Draw the example pictures: horses and a duck by the water, and a shopping cart of food.

python train/draw_examples.py examples
"""

import argparse
from pathlib import Path

import numpy as np

from scenes import THINGS, place, render

SIZE = 768
KINDS = {thing.one: kind for kind, thing in enumerate(THINGS)}
EXAMPLES = {
    "horses.png": ("water", 3, {3: "horse", 4: "horse", 5: "duck", 7: "horse"}),
    "shopping.png": (
        "cart",
        5,
        {0: "egg", 1: "glass of milk", 3: "carrot", 4: "egg", 5: "carrot", 8: "egg"},
    ),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, (setting, seed, cells) in EXAMPLES.items():
        kinds = {cell: KINDS[one] for cell, one in cells.items()}
        scene = place(np.random.default_rng(seed), setting, kinds)
        render(scene, SIZE).save(folder / name)


if __name__ == "__main__":
    main()
