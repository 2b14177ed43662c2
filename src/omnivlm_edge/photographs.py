"""Whether a picture is out of the demo's depth: it knows drawn scenes, and no photographs.

Drawings are light and of flat surfaces with a few sharp edges; photographs have dark parts and
some change of brightness nearly everywhere. That does not tell all of them apart, so that the
model's own doubt is asked as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .values import GenerateOptions

if TYPE_CHECKING:
    from .engine import OmniVLM
    from .image import Picture

SIDE = 126  # pixels at which pictures are compared: what the demo sees
DARK = 40  # brightness, of 255
LIKENESS = 0.4  # from here on a picture is like a photograph
DOUBT = 0.1  # nats a token: above, the demo is unsure of its description
DESCRIBE = "Describe the image"


def likeness(image: Image.Image) -> float:
    """How much an RGB picture is like a photograph, from 0 to 4.

    Twice the share of dark pixels, and the median step of brightness between neighbours as a share
    of the mean one: near 0 where most of a picture is flat.
    """
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grey = np.asarray(small).astype(np.float32)
    steps = np.maximum(np.abs(np.diff(grey, axis=0)[:, 1:]), np.abs(np.diff(grey, axis=1)[1:]))
    return float(2 * (grey < DARK).mean() + np.median(steps) / max(steps.mean(), 1e-6))


def doubt(engine: OmniVLM, picture: Picture) -> float:
    """How unsure the model is of its greedy description: nats a token."""
    answer = engine.answer(picture, DESCRIBE, GenerateOptions(max_tokens=48, top_logprobs=0))
    return -float(np.mean([token.logprob for token in answer.logprobs] or [0.0]))


def out_of_depth(engine: OmniVLM, picture: Picture) -> bool:
    """Whether a picture looks like a photograph and the demo is unsure of what it shows.

    bench/photographs.py tells how often it is so; MODEL_CARD.md has the result.
    """
    return likeness(picture.image) > LIKENESS and doubt(engine, picture) > DOUBT
