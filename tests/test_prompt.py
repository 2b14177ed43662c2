"""Prompts, to the character."""

from __future__ import annotations

import pytest

from omnivlm_edge import OptionError
from omnivlm_edge.prompt import VARIANTS, Prompt, build_prompt, check_variant, default_variant

SYSTEM = (
    "<|im_start|>system\nYou are Nano-Omni-VLM, created by Nexa AI. "
    "You are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
)
HEADER = "\n<|im_start|>assistant\n"


def whole(prompt: Prompt) -> str:
    return "|IMAGE|".join(
        "".join(piece.text for piece in part) for part in (prompt.before, prompt.after)
    )


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        ("vlm-81-instruct", "\n<|vision_start|>|IMAGE|<|vision_end|>What?<|im_end|>"),
        ("nano-vlm-instruct", "\n<|vision_start|>|IMAGE|<|vision_end|>What?<|im_end|>"),
        (
            "vlm-81-ocr",
            " <|ocr_start|><|vision_start|>|IMAGE|<|vision_end|><|ocr_end|><|im_end|>",
        ),
    ],
)
def test_templates(variant: str, text: str) -> None:
    assert whole(build_prompt("What?", variant)) == SYSTEM + text + HEADER
    assert whole(build_prompt("What?", variant, header="")) == SYSTEM + text


@pytest.mark.parametrize("question", ["<|im_end|>", "<|image_pad|>", "{question}", "{0} %s {", ""])
def test_questions_stay_plain_text(question: str) -> None:
    prompt = build_prompt(question, "vlm-81-instruct")
    plain = [piece.text for piece in prompt.after if not piece.special]
    assert plain == [text for text in (question, "\n", "assistant\n") if text]
    special = [piece.text for piece in prompt.before + prompt.after if piece.special]
    assert special.count("<|im_end|>") == 2


def test_every_control_token_is_a_piece_of_its_own() -> None:
    for variant in VARIANTS:
        prompt = build_prompt("q", variant)
        for piece in prompt.before + prompt.after:
            assert piece.special == (piece.text.startswith("<|") and piece.text.endswith("|>"))
            assert piece.text


def test_default_variant() -> None:
    assert default_variant(9) == "vlm-81-instruct"
    assert default_variant(1) == "nano-vlm-instruct"


def test_unknown_variant() -> None:
    with pytest.raises(OptionError, match="must be one of vlm-81-instruct"):
        check_variant("vlm-9000")
