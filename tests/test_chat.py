"""Conversations in Python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from omnivlm_edge import (
    BusyError,
    ContextOverflowError,
    GenerateOptions,
    ImageError,
    OmniVLM,
    OptionError,
)

SHORT = GenerateOptions(max_tokens=6)


@pytest.fixture
def mirrored(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@pytest.fixture
def demo() -> Iterator[OmniVLM]:
    with OmniVLM("demo", device="cpu") as model:
        yield model


def test_only_what_is_new_is_computed(engine: OmniVLM, picture: Image.Image) -> None:
    chat = engine.chat()
    first = chat.ask("What is it?", picture, SHORT)
    assert first.cached_tokens < first.prompt_tokens - 4
    second = chat.ask("Is it red?", options=SHORT)
    # The last token of an answer is sampled and never decoded.
    assert second.cached_tokens == first.prompt_tokens + first.completion_tokens - 1
    assert second.prompt_tokens > second.cached_tokens
    assert [turn.question for turn in chat.turns] == ["What is it?", "Is it red?"]
    assert [turn.answer for turn in chat.turns] == [first.text, second.text]
    assert second.image_tokens == 4
    assert (second.timings.preprocess, second.timings.encode) == (0, 0)


def test_a_kept_context_changes_no_answer(
    tiny_model: Path, engine: OmniVLM, picture: Image.Image, mirrored: Image.Image
) -> None:
    """The same conversation, each turn computed anew by another object."""
    chat = engine.chat()
    for question, image in (("What?", picture), ("Sure?", None), ("And here?", mirrored)):
        earlier = list(chat.turns)
        answer = chat.ask(question, image, SHORT)
        with OmniVLM(tiny_model, device="cpu", n_threads=2, disk_cache=False) as fresh:
            again = fresh.chat()
            again.turns = earlier
            want = again.ask(question, image, SHORT)
        assert want.cached_tokens == 0
        assert answer.text == want.text
        assert answer.prompt_tokens == want.prompt_tokens


def test_history_matters(engine: OmniVLM, picture: Image.Image) -> None:
    chat = engine.chat()
    chat.ask("What is it?", picture, SHORT)
    followed = chat.ask("Sure?", options=SHORT)
    chat.clear()
    assert not chat.has_images
    alone = chat.ask("Sure?", picture, SHORT)
    assert followed.prompt_tokens > alone.prompt_tokens
    assert len(chat.turns) == 1


def test_several_pictures(engine: OmniVLM, picture: Image.Image, mirrored: Image.Image) -> None:
    chat = engine.chat()
    assert chat.ask("Same?", [picture, mirrored], SHORT).image_tokens == 8
    assert chat.ask("And this?", engine.encode(picture), SHORT).image_tokens == 12
    assert [len(turn.images) for turn in chat.turns] == [2, 1]


def test_a_model_of_single_questions_forgets(demo: OmniVLM) -> None:
    examples = Path(__file__).parents[1] / "examples"
    chat = demo.chat()
    assert not chat.history
    assert chat.ask("Do I have eggs?", examples / "shopping.png").text.startswith("Yes")
    second = chat.ask("How many carrots are there?")
    assert second.text == "There are two carrots."
    assert second.image_tokens == 9
    assert chat.ask("Is there a duck?", examples / "horses.png").image_tokens == 9
    assert demo.chat(history=True).history


def test_a_broken_off_answer_stays(engine: OmniVLM, picture: Image.Image) -> None:
    chat = engine.chat()
    stream = chat.stream("What is it?", picture, GenerateOptions(max_tokens=100))
    said = next(stream) + next(stream)
    with pytest.raises(BusyError):
        engine.answer(picture, "And now?", SHORT)
    stream.close()
    assert [turn.answer for turn in chat.turns] == [said]
    assert chat.ask("Go on", options=SHORT).prompt_tokens > 10


def test_a_question_that_fails_leaves_no_trace(engine: OmniVLM, picture: Image.Image) -> None:
    chat = engine.chat()
    with pytest.raises(ImageError):
        chat.ask("What is it?", "no such picture.png")
    with pytest.raises(ContextOverflowError):
        chat.ask("many words " * 3000, picture)
    assert chat.turns == []
    assert chat.has_images  # the picture waits for the next question
    assert chat.ask("What is it?", options=SHORT).image_tokens == 4


def test_a_reading_model_takes_each_picture_alone(
    tiny_ocr_model: Path, picture: Image.Image, mirrored: Image.Image
) -> None:
    with OmniVLM(tiny_ocr_model, device="cpu") as model:
        chat = model.chat()
        first, second = chat.ask("", picture, SHORT), chat.ask("", mirrored, SHORT)
        assert first.image_tokens == second.image_tokens == 4
        assert first.prompt_tokens == second.prompt_tokens
        with pytest.raises(OptionError, match="one picture at a time"):
            chat.ask("", [picture, mirrored])


def test_system_text(engine: OmniVLM, picture: Image.Image) -> None:
    usual = engine.answer(picture, "What is it?", SHORT)
    chat = engine.chat(system="Answer in one word.")
    assert chat.ask("What is it?", picture, SHORT).prompt_tokens < usual.prompt_tokens


def test_pictures_given_during_an_answer_wait(engine: OmniVLM, picture: Image.Image) -> None:
    chat = engine.chat()
    stream = chat.stream("What is it?", picture, SHORT)
    next(stream)
    chat.add_images(picture)
    for _ in stream:
        pass
    assert chat.ask("And this?", options=SHORT).image_tokens == 8


def test_a_conversation_that_is_full_says_how_to_go_on(
    engine: OmniVLM, picture: Image.Image
) -> None:
    chat = engine.chat()
    chat.ask("What is it?", picture, SHORT)
    with pytest.raises(ContextOverflowError, match="start the conversation over"):
        chat.ask("Sure?", options=GenerateOptions(max_tokens=2040))
    with pytest.raises(ContextOverflowError, match="shorten the choices"):
        engine.choose(picture, "?", ["yes", "no " * 3000])
