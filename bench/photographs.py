"""How often `run demo` says that a picture looks like a photograph, of which it is unsure.

    python bench/photographs.py PHOTOGRAPHS_DIR DRAWINGS_DIR...

Prints a line for each folder. Pictures are shrunk to 1024 pixels first, because the demo sees 126.
The 27 photographs of the model card: astronaut, brick,
camera, chelsea, coffee, coins, grass, gravel, moon, rocket, retina and clock_motion of
scikit-image, china and flower of scikit-learn, grace_hopper of Matplotlib, and the twelve in
nature/ of Debian's mate-backgrounds; the drawings: build/testset-*/images of `make eval-demo`.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from PIL import Image

from omnivlm_edge import OmniVLM
from omnivlm_edge.image import load_image
from omnivlm_edge.photographs import out_of_depth
from omnivlm_edge.sources import find_pictures


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(folders: tuple[Path, ...]) -> None:
    """Ask the demo about the pictures of FOLDERS."""
    with OmniVLM("demo", device="cpu", disk_cache=False) as engine:
        for folder in folders:
            said = []
            for path in find_pictures(str(folder)):
                image = Image.open(path).convert("RGB")
                image.thumbnail((1024, 1024))
                said.append(out_of_depth(engine, load_image(np.asarray(image), str(path))))
            click.echo(f"{folder}: {sum(said)} of {len(said)}")


if __name__ == "__main__":
    main()
