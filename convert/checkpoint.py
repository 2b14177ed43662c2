"""A Hugging Face checkpoint directory -> mmproj and text GGUF.

Everything is checked before the first byte is written; then one tensor after the other is read,
rounded to its type and written.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ..errors import ConvertError
from ..prompt import check_variant, default_variant
from ..values import ModelFiles
from .config import (
    ProjectorConfig,
    Section,
    TextConfig,
    VisionConfig,
    check_outtype,
    projector_from_shapes,
    read_model_config,
)
from .keys import (
    FILE_TYPES,
    MMPROJ_ARCHITECTURE,
    TEXT_ARCHITECTURE,
    add_mmproj_keys,
    add_text_keys,
    storage_type,
)
from .output import OutFile, OutTensor, publish, report_unused
from .tensor_map import (
    LM_HEAD,
    PROJECTOR,
    PROJECTOR_WEIGHTS,
    TOKEN_EMBEDDING,
    UNUSED,
    Rule,
    mmproj_rules,
    text_rules,
)
from .tokenizer import read_vocabulary
from .weights import SourceTensor, open_weights, same_values


def convert_checkpoint(
    checkpoint: Path,
    out_dir: Path,
    outtype: str = "f16",
    *,
    name: str | None = None,
    variant: str | None = None,
) -> ModelFiles:
    """Write `mmproj-<name>-<OUTTYPE>.gguf` and `<name>-<OUTTYPE>.gguf` into `out_dir`.

    `name` is the directory's unless given; `variant` is the prompt variant that the mmproj will
    name, by default the one that the projector's shape suggests.
    """
    check_outtype(outtype)
    checkpoint, out_dir = Path(checkpoint), Path(out_dir)
    if not checkpoint.is_dir():
        raise ConvertError(f"{checkpoint} is not a directory; give the checkpoint's directory")
    name = _file_name(checkpoint.resolve().name if name is None else name)

    root, vision, text = read_model_config(checkpoint)
    vocabulary = read_vocabulary(checkpoint, text.vocab, text.eos_token_id)
    tensors = open_weights(checkpoint)
    projector = _projector(checkpoint, root, tensors, vision, text)
    variant = check_variant(default_variant(projector.merge) if variant is None else variant)

    head = _stores_head(checkpoint, text, tensors)
    vision_rules = _match(mmproj_rules(vision, projector), tensors, checkpoint)
    language_rules = _match(text_rules(text, head=head), tensors, checkpoint)
    unused = _unused(vision_rules + language_rules, tensors, checkpoint, tied=bool(text.tied))

    mmproj = OutFile(
        path=out_dir / f"mmproj-{name}-{outtype.upper()}.gguf",
        architecture=MMPROJ_ARCHITECTURE,
        add_keys=partial(
            add_mmproj_keys,
            name=name,
            file_type=FILE_TYPES[outtype],
            vision=vision,
            projector=projector,
            variant=variant,
            single_turn=root.flag("single_turn"),
        ),
        tensors=_plan(vision_rules, tensors, outtype),
    )
    language = OutFile(
        path=out_dir / f"{name}-{outtype.upper()}.gguf",
        architecture=TEXT_ARCHITECTURE,
        add_keys=partial(
            add_text_keys,
            name=name,
            file_type=FILE_TYPES[outtype],
            text=text,
            vocabulary=vocabulary,
        ),
        tensors=_plan(language_rules, tensors, outtype),
    )
    report_unused(checkpoint, unused)
    publish([mmproj, language], inputs=sorted({tensor.file for tensor in tensors.values()}))
    return ModelFiles(text=language.path, mmproj=mmproj.path)


def _file_name(name: str) -> str:
    if not name or Path(name).name != name or "\\" in name:
        raise ConvertError(f"the name {name!r} cannot be part of a file name; choose another")
    return name


def _projector(
    checkpoint: Path,
    root: Section,
    tensors: dict[str, SourceTensor],
    vision: VisionConfig,
    text: TextConfig,
) -> ProjectorConfig:
    for weight in PROJECTOR_WEIGHTS:
        if weight not in tensors:
            raise ConvertError(f"{checkpoint}: the tensor {weight} is missing")
    first, second = (tensors[weight].shape for weight in PROJECTOR_WEIGHTS)
    try:
        projector = projector_from_shapes(first, second, vision)
    except ValueError as exc:
        raise ConvertError(f"{checkpoint}: {PROJECTOR}.*: {exc}") from exc
    if root.values.get("hidden_size", projector.hidden) != projector.hidden:
        raise ConvertError(
            f"{checkpoint}: the tensor {PROJECTOR_WEIGHTS[0]} has {projector.hidden} rows, but "
            f"config.json gives the projector the hidden_size {root.values['hidden_size']!r}"
        )
    if projector.output != text.hidden:
        raise ConvertError(
            f"{checkpoint}: the projector's output {PROJECTOR_WEIGHTS[1]} is {projector.output} "
            f"wide, but the language model is {text.hidden} wide"
        )
    return projector


def _stores_head(checkpoint: Path, text: TextConfig, tensors: dict[str, SourceTensor]) -> bool:
    """Whether the language model has an output matrix of its own."""
    if text.tied is None:
        return LM_HEAD in tensors
    if not text.tied:
        return True
    head, embedding = tensors.get(LM_HEAD), tensors.get(TOKEN_EMBEDDING)
    if head is not None and embedding is not None and not same_values(head, embedding):
        raise ConvertError(
            f"{checkpoint}: tie_word_embeddings is true, but {LM_HEAD} differs from "
            f"{TOKEN_EMBEDDING}; set it to false if the stored matrix is right"
        )
    return False


def _match(rules: Iterable[Rule], tensors: dict[str, SourceTensor], checkpoint: Path) -> list[Rule]:
    """The rules, each of which has found its tensor with the expected shape."""
    matched = []
    for rule in rules:
        if rule.source not in tensors:
            raise ConvertError(f"{checkpoint}: the tensor {rule.source} is missing")
        shape = tensors[rule.source].shape
        if shape != rule.shape:
            raise ConvertError(
                f"{checkpoint}: the tensor {rule.source} has the shape {shape}, but the "
                f"configuration asks for {rule.shape}"
            )
        matched.append(rule)
    return matched


def _unused(
    rules: list[Rule], tensors: dict[str, SourceTensor], checkpoint: Path, *, tied: bool
) -> set[str]:
    """The stored tensors of the pooling head; any other stored tensor must have a rule."""
    left = tensors.keys() - {rule.source for rule in rules}
    if tied:
        left.discard(LM_HEAD)
    unknown = sorted(left - UNUSED)
    if unknown:
        raise ConvertError(
            f"{checkpoint}: the tensor {unknown[0]} is not part of this model, "
            f"and neither are {len(unknown) - 1} others"
            if len(unknown) > 1
            else f"{checkpoint}: the tensor {unknown[0]} is not part of this model"
        )
    return left


def _plan(rules: list[Rule], tensors: dict[str, SourceTensor], outtype: str) -> list[OutTensor]:
    planned = []
    for rule in rules:
        target = storage_type(rule.shape, outtype)
        read = partial(tensors[rule.source].read, target)
        planned.append(OutTensor(rule.target, rule.shape, target, read))
    return planned
