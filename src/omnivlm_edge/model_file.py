"""One GGUF file of a model, known by its header: what it is, and which partner fits.

The same description serves a file on disk and one on a hub of which only the header was read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

from .errors import ModelFileError
from .gguf_header import Header, read_header

# llama.cpp calls a vision file `clip`; the published OmniVLM ones say `siglip`.
MMPROJ_ARCHITECTURES = ("clip", "siglip")

# What is taken when nobody asks for a quantization, the first that there is. Text: Q8_0 answers as
# F16 does at half the size. Vision: the type of the text file, else the first of these.
TEXT_ORDER = ("Q8_0", "F16", "BF16", "Q6_K", "Q5_K_M", "Q4_K_M", "Q5_K_S", "Q4_K_S", "Q4_0", "F32")
VISION_ORDER = ("F16", "BF16", "Q8_0", "F32")


@dataclass(frozen=True)
class ModelFile:
    """A text model or a vision file that this program can use.

    `path` is where it lies, or its name in a repository; `size` is in bytes; `etag` is the sha256
    of its content (git's sha1 for a file outside of LFS), or empty where no hub has told it.
    """

    path: Path
    header: Header
    kind: Literal["text", "vision"]
    size: int
    etag: str = ""

    @property
    def architecture(self) -> str:
        return str(self.header.metadata["general.architecture"])

    @property
    def width(self) -> int:
        """Width of one position of the text model: what the projector makes and the text takes."""
        if self.kind == "vision":
            return _projector_output(self.header) or 0
        return self.number("embedding_length")

    @cached_property
    def quantization(self) -> str:
        """`F16`, `Q8_0`, `Q4_K_M` …: what the file says, else the type that most values have."""
        from gguf import GGMLQuantizationType, LlamaFileType  # slow to load

        number = self.header.metadata.get("general.file_type")
        if isinstance(number, int) and number in set(LlamaFileType):
            return _name_of(number)
        sizes: Counter[int] = Counter()
        for tensor in self.header.tensors:
            sizes[tensor.type] += prod(tensor.shape)
        most = max(sizes, key=sizes.__getitem__, default=None)
        return GGMLQuantizationType(most).name if most in set(GGMLQuantizationType) else "unknown"

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.header.tensors)

    def number(self, key: str) -> int:
        """A count or size of the model: `block_count`, `image_size` … in any of the layouts."""
        prefix = f"{self.architecture}.vision" if self.kind == "vision" else self.architecture
        value = self.header.metadata.get(f"{prefix}.{key}")
        if not isinstance(value, int) or value < 1:
            raise ModelFileError(
                f"{self.path}: key {prefix}.{key} is missing or no positive number"
            )
        return value

    @property
    def merge_factor(self) -> int:
        """How many patches the projector of a vision file joins into one token."""
        inputs = [tensor.shape[0] for tensor in self.header.tensors if tensor.name == "mm.0.weight"]
        merge = inputs[0] // self.number("embedding_length") if inputs else 0
        if merge < 1:
            raise ModelFileError(f"{self.path}: tensor mm.0.weight is missing or too narrow")
        return merge


def inspect_file(path: Path) -> ModelFile:
    """Raises ModelFileError when the file is damaged, or of no kind that this program can use."""
    return describe(path, read_header(path), path.stat().st_size)


def describe(path: Path, header: Header, size: int, etag: str = "") -> ModelFile:
    """Classifies a file by its metadata. Raises ModelFileError for one that is of no use here."""
    architecture = header.metadata.get("general.architecture")
    if architecture in MMPROJ_ARCHITECTURES:
        projector = header.metadata.get("clip.projector_type", "")
        if architecture == "clip" and projector != "omnivlm":
            raise ModelFileError(
                f"{path}: is a clip file with projector type '{projector}', not 'omnivlm': "
                "it belongs to another model"
            )
        if _projector_output(header) is None:
            raise ModelFileError(f"{path}: is a vision file without a projector (no mm.2.weight)")
        return ModelFile(path, header, "vision", size, etag)
    if not isinstance(header.metadata.get(f"{architecture}.embedding_length"), int):
        raise ModelFileError(f"{path}: is neither a text model nor a vision file of OmniVLM")
    return ModelFile(path, header, "text", size, etag)


def inspect_all(paths: Iterable[Path]) -> tuple[list[ModelFile], list[str]]:
    """The files that can be used, and for each of the others the reason why not."""
    files, problems = [], []
    for path in paths:
        try:
            files.append(inspect_file(path))
        except ModelFileError as exc:
            problems.append(str(exc))
    return files, problems


def fitting_texts(files: Sequence[ModelFile]) -> list[ModelFile]:
    """The text models for which there is a vision file of their width."""
    widths = {file.width for file in files if file.kind == "vision"}
    return [file for file in files if file.kind == "text" and file.width in widths]


def fitting_vision(files: Sequence[ModelFile], text: ModelFile) -> list[ModelFile]:
    return [file for file in files if file.kind == "vision" and file.width == text.width]


def best(files: Sequence[ModelFile], *order: str) -> ModelFile:
    """The file whose quantization comes first in `order`; those not named in it come last."""

    def rank(file: ModelFile) -> int:
        return order.index(file.quantization) if file.quantization in order else len(order)

    return min(files, key=rank)


def pair(
    files: Sequence[ModelFile], quantization: str | None
) -> tuple[ModelFile, ModelFile] | None:
    """The text model of that quantization (None: the best) and its best partner, if both exist."""
    texts = fitting_texts(files)
    if quantization is not None:
        texts = [file for file in texts if file.quantization == quantization]
    if not texts:
        return None
    text = best(texts, *TEXT_ORDER)
    return text, best(fitting_vision(files, text), text.quantization, *VISION_ORDER)


def check_quantization(tag: str) -> str:
    """`fp16`, `q4_k_m` … -> `F16`, `Q4_K_M`. Raises ModelFileError for a name that nobody uses."""
    from gguf import LlamaFileType

    name = tag.upper().replace("FP", "F")
    known = [_name_of(value) for value in LlamaFileType if value != LlamaFileType.GUESSED]
    if name not in known:
        raise ModelFileError(
            f"'{tag}': is no quantization; the names are {', '.join(map(str.lower, known))}"
        )
    return name


def _name_of(file_type: int) -> str:
    from gguf import LlamaFileType

    return LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _projector_output(header: Header) -> int | None:
    """The rows of the projector's last matrix: its width in both layouts."""
    shapes = [tensor.shape for tensor in header.tensors if tensor.name == "mm.2.weight"]
    return shapes[0][1] if shapes and len(shapes[0]) == 2 else None
