"""Makes an importance matrix:

pictures, prompts -> the runtime itself, watched by native/importance.cpp -> sums -> Imatrix
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from ._native import ImportanceCollector
from .engine import OmniVLM
from .errors import ImageError, ModelFileError
from .image import ImageSource, load_image
from .imatrix import Imatrix, Inputs
from .values import GenerateOptions, ModelFiles

Notify: TypeAlias = "Callable[[str], None]"
Progress: TypeAlias = "Callable[[int, int], None]"  # questions done, questions in all

PROMPTS = (
    "Describe the image",
    "What is in the middle of the picture?",
    "Is there a person in the picture?",
)
DEFAULT_MAX_TOKENS = 64


def collect(
    files: ModelFiles,
    images: Sequence[ImageSource],
    prompts: Sequence[str] = PROMPTS,
    *,
    datasets: Sequence[str] = (),
    max_tokens: int = DEFAULT_MAX_TOKENS,
    n_threads: int | None = None,
    notify: Notify | None = None,
    progress: Progress | None = None,
) -> Imatrix:
    """Asks a model each prompt about each picture, and adds up what its weights meet meanwhile.

    That is each picture once, and each prompt in full with the greedy answer to it, of at most
    `max_tokens` tokens. A model that takes no questions reads each picture once. `notify` is told
    of pictures that cannot be used; they are left out.

    Raises ImageError when none can be used, and what `OmniVLM` and its `answer` raise.
    """
    notify = notify or (lambda message: None)
    progress = progress or (lambda done, total: None)
    options = GenerateOptions(max_tokens=max_tokens)
    collector = ImportanceCollector()
    n_used = 0
    with OmniVLM(
        files.text,
        files.mmproj,
        variant=files.variant,
        n_threads=n_threads,
        disk_cache=False,  # what is found there is not computed
        collector=collector,
    ) as model:
        if not model.takes_questions:
            prompts = prompts[:1]
        total = len(images) * len(prompts)
        for i, image in enumerate(images):
            try:
                picture = load_image(image)
            except ImageError as exc:
                notify(f"left out: {exc}")
                continue
            n_used += 1
            embedding = model.encode(picture)
            for j, prompt in enumerate(prompts, 1):
                model.answer(embedding, prompt, options)
                progress(i * len(prompts) + j, total)
        chunk_size = model.n_ctx
    if n_used == 0:
        raise ImageError("none of the pictures can be used; name others")
    inputs = {
        name: Inputs(
            np.array(sums.squares, np.float32), sums.n_rows, np.array(sums.values, np.float32)
        )
        for name, sums in collector.sums().items()
    }
    for name, sums in inputs.items():
        if not np.isfinite(sums.squares).all():
            raise ModelFileError(
                f"{files.text}: the inputs of {name} are no numbers: "
                "download or convert the model again"
            )
    return Imatrix(inputs, tuple(datasets), n_used * len(prompts), chunk_size)
