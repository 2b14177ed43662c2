"""The models on this machine: listed, described, removed.

They lie in the Hugging Face cache, which other programs use too, and in `paths.models_dir()`.
Nothing outside of these two places is ever removed.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelFileError
from .hub import (
    KNOWN,
    Reference,
    cached_snapshots,
    fresh,
    made_files,
    parse_reference,
    repo_cache,
)
from .memory import memory_needed
from .model_file import ModelFile, fitting_texts, inspect_file, pair
from .models import find_model
from .paths import models_dir
from .prompt import default_variant
from .values import DEFAULT_N_CTX


@dataclass(frozen=True)
class StoredModel:
    """A pair of files that can be run; `name` is what one types after `run`."""

    name: str
    text: ModelFile
    vision: ModelFile
    place: str

    @property
    def size(self) -> int:
        """Bytes of both files; the vision file may serve other models as well."""
        return self.text.size + self.vision.size


def list_models() -> list[StoredModel]:
    """Every model that can be run without a network, by name."""
    demo = find_model("demo")
    models = [StoredModel("demo", *_inspect(demo.text, demo.mmproj), "package")]
    for repo in _repos():
        made = made_files(repo)
        by_quantization: dict[str, StoredModel] = {}
        for files in cached_snapshots(repo) or [[]]:
            usable = [*files, *fresh(made, files)]
            for text in fitting_texts(usable):
                found = pair(usable, text.quantization)
                if found is not None:
                    place = "made here" if found[0] in made else "hub cache"
                    name = str(Reference(_name(repo), repo, text.quantization))
                    model = StoredModel(name, *found, place)
                    by_quantization.setdefault(text.quantization, model)
        models += by_quantization.values()
    return sorted(models, key=lambda model: model.name)


def describe_model(model: str) -> dict[str, object]:
    """What is known of a model on this machine, or of one of its files, from the files' headers.

    The keys: `name`; `text` and `vision`, each with `file`, `size` (bytes), `architecture`,
    `parameters`, `quantization`; `text` also with `context_length`, `vision` with `image_size`
    (pixels) and `image_tokens`; `variant`; and for a pair `memory` (bytes).

    Raises ModelFileError when it is not here or damaged.
    """
    path = Path(model)
    if parse_reference(model) is None and path.is_file():
        file = inspect_file(path)
        details = _describe_text(file) if file.kind == "text" else _describe_vision(file)
        return {"name": model, file.kind: details}
    files = find_model(model, offline=True)
    text, vision = _inspect(files.text, files.mmproj)
    about_vision = _describe_vision(vision)
    return {
        "name": model,
        "text": _describe_text(text),
        "vision": {**about_vision, "variant": files.variant or about_vision["variant"]},
        "memory": memory_needed(text, vision, DEFAULT_N_CTX),
    }


def remove(model: str) -> int:
    """Removes a named model, or one quantization of it. Returns the bytes that were freed.

    One quantization is its text model and what was made here; a published vision file stays as
    long as another text model needs it. Raises ModelFileError for what is not in the store.
    """
    wanted = parse_reference(model)
    if wanted is None:
        reason = "belongs to the package" if model == "demo" else "is no name of a stored model"
        raise ModelFileError(f"'{model}': {reason} and is not removed; see `omnivlm-edge ls`")
    cache, made = repo_cache(wanted.repo), models_dir() / wanted.repo.replace("/", "--")
    stored = [file for files in cached_snapshots(wanted.repo) for file in files]
    stored += made_files(wanted.repo)
    unfinished: list[Path] = []
    if wanted.quantization is None:
        doomed, unfinished = stored, list(cache.glob("blobs/*.incomplete"))
    else:
        doomed = [
            file
            for file in stored
            if file.quantization == wanted.quantization
            and (file.kind == "text" or made in file.path.parents)
        ]
        if all(file in doomed for file in stored if file.kind == "text"):
            doomed = stored if doomed else []
    if not doomed and not unfinished:
        raise ModelFileError(f"{wanted}: is not on this machine; see `omnivlm-edge ls`")
    before = _disk_usage(cache) + _disk_usage(made)
    for file in doomed:
        _delete(file.path, cache / "blobs")
    # One quantization may have neighbours that are none of ours; a whole repository goes as such.
    snapshots = cache / "snapshots"
    if wanted.quantization is None or not any(path.is_file() for path in snapshots.rglob("*")):
        for directory in (cache, cache.parent / ".locks" / cache.name):
            shutil.rmtree(directory, ignore_errors=True)
    if wanted.quantization is None or not made_files(wanted.repo):
        shutil.rmtree(made, ignore_errors=True)
    return before - _disk_usage(cache) - _disk_usage(made)


def _repos() -> list[str]:
    """The repositories of which something may be here."""
    cache = repo_cache("x/y").parent
    folders = [path.name.removeprefix("models--") for path in cache.glob("models--*--*")]
    folders += [path.name for path in models_dir().glob("*--*")]
    return sorted({name.replace("--", "/", 1) for name in folders})


def _name(repo: str) -> str:
    return next((name for name, known in KNOWN.items() if known.repo == repo), f"hf:{repo}")


def _inspect(text: Path, vision: Path) -> tuple[ModelFile, ModelFile]:
    return inspect_file(text), inspect_file(vision)


def _describe(file: ModelFile) -> dict[str, object]:
    return {
        "file": str(file.path),
        "size": file.size,
        "architecture": file.architecture,
        "parameters": file.parameters,
        "quantization": file.quantization,
    }


def _describe_text(file: ModelFile) -> dict[str, object]:
    context = file.header.metadata.get(f"{file.architecture}.context_length")
    return {**_describe(file), "context_length": context}


def _describe_vision(file: ModelFile) -> dict[str, object]:
    image_size, merge = file.number("image_size"), file.merge_factor
    patches = (image_size // file.number("patch_size")) ** 2
    variant = file.header.metadata.get("clip.omnivlm.prompt_variant") or default_variant(merge)
    return {
        **_describe(file),
        "image_size": image_size,
        "image_tokens": patches // merge,
        "variant": variant,
    }


def _delete(path: Path, blobs: Path) -> None:
    """A file, and the blob of the cache that it links to. Other places are none of ours."""
    if path.is_symlink():
        blob = path.parent / os.readlink(path)
        if blob.parent.resolve() == blobs.resolve():
            blob.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _disk_usage(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if not path.is_symlink())
