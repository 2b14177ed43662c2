"""A smaller file of either kind, and the plan of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from gguf import LlamaFileType

from ..device import check_threads
from ..errors import ModelFileError
from ..files import digest_file
from ..imatrix import Imatrix, read_imatrix
from ..model_file import inspect_file
from .plan import Job, PlannedTensor, plan_tensors
from .recipes import QuantizeOptions, recipe_name
from .text import quantize_text
from .vision import quantize_vision

Progress: TypeAlias = "Callable[[int, int], None]"  # tensors done, tensors in all

_DEFAULTS = QuantizeOptions()


def quantize_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    type_name: str,
    options: QuantizeOptions = _DEFAULTS,
    *,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the model file `source` as `output`, its matrices in the types of a recipe.

    `type_name` is a name from `recipes.RECIPES`. What `source` is, a text model or a vision file,
    is read from it. `output` appears when it is complete, or not at all; it names the SHA-256 of
    its source in the key `omnivlm.source_sha256`.

    Raises OptionError for an unknown name or options that do not fit, ModelFileError when `source`
    is damaged, of another kind or quantized already, ConvertError when `output` cannot be written
    or is `source` itself.
    """
    file = inspect_file(Path(source))
    imatrix = _imatrix(options)
    tensors = plan_tensors(file, type_name, options, imatrix)
    keys: dict[str, str | int] = {
        "general.file_type": int(LlamaFileType[f"MOSTLY_{recipe_name(type_name).upper()}"]),
        "omnivlm.source_sha256": _digest(file.path),
    }
    if imatrix is not None:  # as llama.cpp's quantizer names them
        keys |= {
            "quantize.imatrix.file": Path(str(options.imatrix)).name,
            "quantize.imatrix.dataset": ", ".join(imatrix.datasets),
            "quantize.imatrix.entries_count": len(imatrix.inputs),
            "quantize.imatrix.chunks_count": imatrix.chunk_count,
        }
    progress = progress or (lambda done, total: None)
    job = Job(file, Path(output), tensors, keys, check_threads(n_threads), progress, imatrix)
    if file.kind == "vision":
        quantize_vision(job)
    else:
        quantize_text(job)
    return job.output


def plan_file(
    source: str | os.PathLike[str], type_name: str, options: QuantizeOptions = _DEFAULTS
) -> list[PlannedTensor]:
    """What `quantize_file` would write, in the order of the file; the errors are the same."""
    return plan_tensors(inspect_file(Path(source)), type_name, options, _imatrix(options))


def output_name(source: Path, type_name: str) -> str:
    """What `source` is called when it is quantized, by convention.

    photo-F16.gguf -> photo-Q8_0.gguf, and its vision file -> mmproj-photo-Q8_0.gguf.
    """
    parts = model_stem(source).split("-")
    if inspect_file(source).kind == "vision":
        parts = ["mmproj", *(part for part in parts if part.lower() != "mmproj")]
    return "-".join([*parts, recipe_name(type_name).upper()]) + ".gguf"


def model_stem(path: Path) -> str:
    """The name of a float file without the type at its end: photo-F16.gguf -> photo."""
    return re.sub(r"[-.](f32|b?f16|fp32|fp16)$", "", path.stem, flags=re.IGNORECASE)


def _imatrix(options: QuantizeOptions) -> Imatrix | None:
    return None if options.imatrix is None else read_imatrix(Path(options.imatrix))


def _digest(path: Path) -> str:
    try:
        return digest_file(path)
    except OSError as exc:
        raise ModelFileError(f"{path}: cannot be read ({exc.strerror})") from exc
