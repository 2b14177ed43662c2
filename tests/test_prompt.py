"""Prompts, to the character."""

from __future__ import annotations

import numpy as np
import pytest

from omnivlm_edge import OptionError
from omnivlm_edge.prompt import (
    IMAGE,
    VARIANTS,
    Part,
    Piece,
    build_prompt,
    check_variant,
    default_variant,
)
from omnivlm_edge.values import ImageEmbedding, Turn

SYSTEM = (
    "<|im_start|>system\nYou are Nano-Omni-VLM, created by Nexa AI. "
    "You are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
)
HEADER = "\n<|im_start|>assistant\n"


PICTURE = ImageEmbedding(np.zeros((1, 1), np.float32))


def whole(parts: list[Part]) -> str:
    texts = [part.text if isinstance(part, Piece) else f"|{part}|" for part in parts]
    return "".join("|IMAGE|" if p == IMAGE else t for p, t in zip(parts, texts, strict=True))


def one(question: str, n_images: int = 1) -> list[Turn]:
    return [Turn(question, (PICTURE,) * n_images)]


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
    assert whole(build_prompt(one("What?"), variant)) == SYSTEM + text + HEADER
    assert whole(build_prompt(one("What?"), variant, header="")) == SYSTEM + text


def test_greetings_and_answers_that_were_begun() -> None:
    turns = [Turn("", (), "Hello!"), Turn("What?", (), "A d")]
    assert whole(build_prompt(turns, "vlm-81-instruct")) == (
        SYSTEM.removesuffix("<|im_start|>user\n")
        + "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>"
        + HEADER
        + "A d"
    )


def test_several_pictures_and_turns() -> None:
    image = "<|vision_start|>|IMAGE|<|vision_end|>"
    turns = [
        Turn("What?", (PICTURE, PICTURE), "A duck."),
        Turn("Sure?", (), "Yes", (7, 8)),
        Turn("And here?", (PICTURE,)),
    ]
    assert whole(build_prompt(turns, "vlm-81-instruct")) == (
        f"{SYSTEM}\n{image}{image}What?<|im_end|>{HEADER}A duck.<|im_end|>\n"
        f"<|im_start|>user\nSure?<|im_end|>{HEADER}|(7, 8)|<|im_end|>\n"
        f"<|im_start|>user\n\n{image}And here?<|im_end|>{HEADER}"
    )


def test_a_turn_only_adds_to_the_prompt_before() -> None:
    """So that the context of the turn before can be kept."""
    first = build_prompt(one("What?"), "vlm-81-instruct")
    answered = Turn("What?", (PICTURE,), "Yes", (7, 8))
    both = build_prompt([answered, Turn("Sure?")], "vlm-81-instruct")
    assert both[: len(first)] == first


def test_system_text() -> None:
    prompt = whole(build_prompt(one("What?"), "vlm-81-instruct", "Be <|im_end|> short."))
    assert prompt.startswith("<|im_start|>system\nBe <|im_end|> short.<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize("turns", [one("a", 0), one("a", 2), one("a") + one("b")])
def test_the_ocr_variant_takes_one_picture(turns: list[Turn]) -> None:
    with pytest.raises(OptionError, match="exactly one picture"):
        build_prompt(turns, "vlm-81-ocr")


@pytest.mark.parametrize("question", ["<|im_end|>", "<|image_pad|>", "{question}", "{0} %s {", ""])
def test_what_was_typed_stays_plain_text(question: str) -> None:
    turns = [Turn(question, (PICTURE,), question), Turn(question)]
    pieces = [part for part in build_prompt(turns, "vlm-81-instruct", question)]
    assert pieces.count(Piece(question, special=False)) == (4 if question else 0)
    assert pieces.count(Piece("<|im_end|>", special=True)) == 4
    assert pieces.count(IMAGE) == 1


def test_every_control_token_is_a_piece_of_its_own() -> None:
    for variant in VARIANTS:
        for piece in build_prompt(one("q"), variant):
            assert isinstance(piece, Piece)
            assert piece.special == (piece.text.startswith("<|") and piece.text.endswith("|>"))
            assert piece.text


def test_default_variant() -> None:
    assert default_variant(9) == "vlm-81-instruct"
    assert default_variant(1) == "nano-vlm-instruct"


def test_unknown_variant() -> None:
    with pytest.raises(OptionError, match="must be one of vlm-81-instruct"):
        check_variant("vlm-9000")
