"""A question and a prompt variant -> the pieces of text around the picture. Pure strings.

The templates are the original's, to the character (system text, order, newlines). What the user
typed is kept apart from the control tokens, so that it can be tokenised as plain text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import OptionError

_SYSTEM = (
    "<|im_start|>system\n"
    "You are Nano-Omni-VLM, created by Nexa AI. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
)
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_INSTRUCT = _SYSTEM + "\n" + _IMAGE + "{question}<|im_end|>"

#: Prompt variant -> template; the names are those of the original.
VARIANTS = {
    "vlm-81-instruct": _INSTRUCT,
    "vlm-81-ocr": _SYSTEM + " <|ocr_start|>" + _IMAGE + "<|ocr_end|><|im_end|>",
    "nano-vlm-instruct": _INSTRUCT,
}

# The model was trained to write this itself; as part of the prompt it costs no decoding steps.
ANSWER_HEADER = "\n<|im_start|>assistant\n"

_SPECIAL = re.compile(r"(<\|[a-z_]+\|>)")


@dataclass(frozen=True)
class Piece:
    """Text of a prompt; `special` marks a control token, everything else is plain text."""

    text: str
    special: bool


@dataclass(frozen=True)
class Prompt:
    """What stands before and after the picture."""

    before: tuple[Piece, ...]
    after: tuple[Piece, ...]


def default_variant(n_merge: int) -> str:
    """The variant of a file that names none: without token merging it is the preview model."""
    return "nano-vlm-instruct" if n_merge == 1 else "vlm-81-instruct"


def check_variant(variant: str) -> str:
    """The variant itself. Raises OptionError for one that does not exist."""
    if variant not in VARIANTS:
        raise OptionError(
            f"prompt variant '{variant}' is unknown: it must be one of {', '.join(VARIANTS)}"
        )
    return variant


def build_prompt(question: str, variant: str, header: str = ANSWER_HEADER) -> Prompt:
    """The prompt of a single turn. The OCR variant has no room for a question and ignores it."""
    before, after = (VARIANTS[variant] + header).split("<|image_pad|>")
    return Prompt(_pieces(before, question), _pieces(after, question))


def _pieces(template: str, question: str) -> tuple[Piece, ...]:
    """Splits at the template's control tokens first; only then is the question put in."""
    pieces = (
        Piece(part, special=True)
        if _SPECIAL.fullmatch(part)
        else Piece(part.replace("{question}", question), special=False)
        for part in _SPECIAL.split(template)
    )
    return tuple(piece for piece in pieces if piece.text)
