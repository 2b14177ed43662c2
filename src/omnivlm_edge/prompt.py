"""A conversation and a prompt variant -> the pieces of text around its pictures. Pure strings.

The templates are the original's, to the character (system text, order, newlines). What the user
typed is kept apart from the control tokens, so that it can be tokenised as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .errors import OptionError
from .values import Turn

SYSTEM = "You are Nano-Omni-VLM, created by Nexa AI. You are a helpful assistant."

_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_INSTRUCT = "<|im_start|>user\n\n{images}{question}<|im_end|>"

#: Prompt variant -> template of a question about pictures; the names are those of the original.
VARIANTS = {
    "vlm-81-instruct": _INSTRUCT,
    "vlm-81-ocr": "<|im_start|>user\n <|ocr_start|>{images}<|ocr_end|><|im_end|>",
    "nano-vlm-instruct": _INSTRUCT,
}
_TEXT_ONLY = "<|im_start|>user\n{question}<|im_end|>"

# The model was trained to write this itself; as part of the prompt it costs no decoding steps.
ANSWER_HEADER = "\n<|im_start|>assistant\n"

_TOKEN = re.compile(r"(<\|[a-z_]+\|>|\{[a-z]+\})")


@dataclass(frozen=True)
class Piece:
    """Text of a prompt; `special` marks a control token, everything else is plain text."""

    text: str
    special: bool


IMAGE = Piece("<|image_pad|>", special=True)
"""Stands in a prompt where the tokens of one picture go."""

Part: TypeAlias = "Piece | tuple[int, ...]"


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


def takes_questions(variant: str) -> bool:
    """False for the OCR variant: one picture, one answer, whatever is asked."""
    return "{question}" in VARIANTS[variant]


def build_prompt(
    turns: Sequence[Turn], variant: str, system: str | None = None, header: str = ANSWER_HEADER
) -> list[Part]:
    """The prompt of a conversation whose last turn is still to be answered, or answered further.

    Every picture is one `IMAGE`, in the order of the turns; answers known as token ids stay such.
    The OCR variant has no room for a question and ignores it.

    Raises OptionError where the variant has no room for the turns.
    """
    if not takes_questions(variant) and (len(turns) != 1 or len(turns[0].images) != 1):
        raise OptionError("the OCR model reads exactly one picture at a time; ask about each alone")
    parts = _fill("<|im_start|>system\n{system}<|im_end|>\n", system=[_text(system or SYSTEM)])
    for i, turn in enumerate(turns, 1):
        if not turn.question and not turn.images and turn.answer is not None:  # a greeting
            parts += _fill(header.removeprefix("\n"))
        else:
            template = VARIANTS[variant] if turn.images else _TEXT_ONLY
            images = _fill(_IMAGE) * len(turn.images)
            parts += _fill(template + header, images=images, question=[_text(turn.question)])
        if turn.answer is not None:
            parts.append(turn.tokens or _text(turn.answer))
            if i < len(turns):
                parts += _fill("<|im_end|>\n")
    return [part for part in parts if part and part != _text("")]


def _text(text: str) -> Part:
    return Piece(text, special=False)


def _fill(template: str, **slots: list[Part]) -> list[Part]:
    """A template's control tokens, its plain text, and what goes into its `{slots}`.

    The template is split first: what a user typed is never searched for control tokens.
    """
    parts: list[Part] = []
    for token in _TOKEN.split(template):
        if token.startswith("{"):
            parts += slots[token.strip("{}")]
        else:
            parts.append(Piece(token, special=token.startswith("<|")))
    return parts
