"""A model name, directory or file -> the two GGUF files of one model, paired by metadata."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .errors import ModelFileError, OptionError
from .hub import Consent, Notify, parse_reference, resolve
from .model_file import ModelFile, fitting_texts, fitting_vision, inspect_all, inspect_file
from .values import ModelFiles


def find_model(
    model: str | os.PathLike[str],
    mmproj: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    *,
    offline: bool = False,
    consent: Consent | None = None,
    make_vision: bool = False,
    notify: Notify | None = None,
) -> ModelFiles:
    """Finds the text model and its mmproj.

    `model` is `demo` (the small model that ships with the package), the name of a published model
    (see `hub.parse_reference`; downloaded when it is not here yet, unless `offline`), a directory
    that holds one text model and one mmproj, or the text model's GGUF file. Without `mmproj` the
    directory is searched for it. Which file is which is read from the files, never guessed from
    their names; a file that is damaged or of another model does not stand in the way of a pair.
    `consent`, `make_vision` and `notify` are those of `hub.pull`.

    Raises ModelFileError when a file is missing, ambiguous or not of the right kind, OptionError
    when `model` can be no name.
    """
    try:
        name = os.fsdecode(model)
    except TypeError as exc:
        raise OptionError(f"model is {model!r}: it must be a name or a path") from exc
    try:
        mmproj = None if mmproj is None else Path(os.fsdecode(mmproj))
    except TypeError as exc:
        raise OptionError(f"mmproj is {mmproj!r}: it must be a path") from exc
    reference = parse_reference(name) if isinstance(model, str) else None
    if mmproj is not None and not mmproj.exists():
        raise ModelFileError(f"{mmproj}: there is no such file; check the path of the mmproj")
    if reference is not None:
        files = resolve(
            name, offline=offline, consent=consent, make_vision=make_vision, notify=notify
        )
    else:
        path = Path(__file__).parent / "demo" if name == "demo" else Path(name)
        if not name or not path.exists():
            raise ModelFileError(
                f"'{name}': there is no such file or directory, nor a model of that name; name "
                "a directory with a text model and its mmproj, a text model's file, "
                "demo, omnivision or hf:USER/REPO"
            )
        files = _find_local(path, mmproj)
    return replace(
        files,
        mmproj=files.mmproj if mmproj is None else mmproj,
        variant=files.variant if variant is None else variant,
    )


def _find_local(path: Path, mmproj: Path | None) -> ModelFiles:
    directory = path if path.is_dir() else path.parent
    beside: list[ModelFile] = []
    problems: list[str] = []
    if path.is_dir() or mmproj is None:
        beside, problems = inspect_all(sorted(directory.glob("*.gguf")))
    if path.is_dir():
        texts = [file for file in beside if file.kind == "text"]
        if mmproj is None:
            texts = fitting_texts(beside) or texts
        text = _only(directory, texts, "text model", "give the file itself as MODEL", problems)
    else:
        text = inspect_file(path)
        if text.kind == "vision":
            raise ModelFileError(
                f"{path}: is a vision file; name the text model's GGUF file instead"
            )
    if mmproj is None:
        # One of another width is better named by the engine than not found.
        vision = fitting_vision(beside, text) or [file for file in beside if file.kind == "vision"]
        mmproj = _only(directory, vision, "mmproj", "name one with --mmproj", problems).path
    return ModelFiles(text=text.path, mmproj=mmproj)


def _only(
    directory: Path, files: Sequence[ModelFile], what: str, advice: str, problems: list[str]
) -> ModelFile:
    if len(files) == 1:
        return files[0]
    if not files:
        if problems:  # each says what to do
            raise ModelFileError(f"{directory}: holds no usable {what}; {'; '.join(problems)}")
        raise ModelFileError(f"{directory}: holds no {what} (a GGUF file); {advice}")
    names = ", ".join(file.path.name for file in files)
    raise ModelFileError(f"{directory}: holds several files for {what} ({names}); {advice}")
