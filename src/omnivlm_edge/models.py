"""A model name, directory or file -> the two GGUF files of one model, paired by metadata."""

from __future__ import annotations

import os
from pathlib import Path

from . import _native
from .errors import ModelFileError
from .values import ModelFiles

# llama.cpp calls a vision file `clip`; the published OmniVLM ones say `siglip`.
MMPROJ_ARCHITECTURES = ("clip", "siglip")


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
    name = os.fspath(model)
    path = Path(__file__).parent / "demo" if name == "demo" else Path(name)
    if not name or not path.exists():
        raise ModelFileError(
            f"'{name}': there is no such file or directory, nor a model of that name; "
            "name a directory with a text model and its mmproj, a text model's file, or demo"
        )
    directory = path if path.is_dir() else path.parent
    beside = _architectures(directory) if path.is_dir() or mmproj is None else {}
    if path.is_dir():
        texts = [file for file, kind in beside.items() if kind not in MMPROJ_ARCHITECTURES]
        text = _only(directory, texts, "text model", "give the file itself as MODEL")
    else:
        text = path
        if _architecture(path) in MMPROJ_ARCHITECTURES:
            raise ModelFileError(
                f"{path}: is a vision file; name the text model's GGUF file instead"
            )
    if mmproj is None:
        vision_files = [file for file, kind in beside.items() if kind in MMPROJ_ARCHITECTURES]
        projector = _only(directory, vision_files, "mmproj", "name one with --mmproj")
    else:
        projector = Path(mmproj)
        if not projector.exists():
            raise ModelFileError(
                f"{projector}: there is no such file; check the path of the mmproj"
            )
    return ModelFiles(text=text, mmproj=projector, variant=variant)


def _architectures(directory: Path) -> dict[Path, str]:
    return {path: _architecture(path) for path in sorted(directory.glob("*.gguf"))}


def _architecture(path: Path) -> str:
    return _native.gguf_architecture(os.fsencode(path))


def _only(directory: Path, candidates: list[Path], what: str, advice: str) -> Path:
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise ModelFileError(f"{directory}: holds no {what} (a GGUF file); {advice}")
    names = ", ".join(path.name for path in candidates)
    raise ModelFileError(f"{directory}: holds several files for {what} ({names}); {advice}")
