"""A model name, directory or file -> the two GGUF files of one model, paired by metadata."""

from __future__ import annotations

import os
from pathlib import Path

from . import _native
from .errors import ModelFileError
from .values import ModelFiles

# llama.cpp calls a vision file `clip`; the published OmniVLM ones say `siglip`.
_MMPROJ_ARCHITECTURES = ("clip", "siglip")


def find_model(
    model: str | os.PathLike[str],
    mmproj: str | os.PathLike[str] | None = None,
    variant: str | None = None,
) -> ModelFiles:
    """Finds the text model and its mmproj.

    `model` is `demo` (the small model that ships with the package), a directory that holds one
    text model and one mmproj, or the text model's GGUF file. Without `mmproj` the directory is
    searched for it. Which file is which is read from the files, never guessed from their names.

    Raises ModelFileError when a file is missing, ambiguous or not of the right kind.
    """
    path = Path(__file__).parent / "demo" if os.fspath(model) == "demo" else Path(model)
    if not path.exists():
        raise ModelFileError(
            f"{path}: there is no such file or directory, nor a model of that name"
        )
    directory = path if path.is_dir() else path.parent
    if path.is_dir():
        text = _only(directory, _gguf_files(directory, mmproj=False), "text model", "MODEL")
    else:
        text = path
        if _native.gguf_architecture(str(path)) in _MMPROJ_ARCHITECTURES:
            raise ModelFileError(
                f"{path}: is a vision file; name the text model's GGUF file instead"
            )
    if mmproj is None:
        projector = _only(directory, _gguf_files(directory, mmproj=True), "mmproj", "--mmproj")
    else:
        projector = Path(mmproj)
        if not projector.exists():
            raise ModelFileError(f"{projector}: there is no such file")
    return ModelFiles(text=text, mmproj=projector, variant=variant)


def _gguf_files(directory: Path, *, mmproj: bool) -> list[Path]:
    return [
        path
        for path in sorted(directory.glob("*.gguf"))
        if (_native.gguf_architecture(str(path)) in _MMPROJ_ARCHITECTURES) == mmproj
    ]


def _only(directory: Path, candidates: list[Path], what: str, option: str) -> Path:
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise ModelFileError(f"{directory}: holds no {what} (a GGUF file); name one with {option}")
    names = ", ".join(path.name for path in candidates)
    raise ModelFileError(
        f"{directory}: holds several files for {what} ({names}); name one with {option}"
    )
