"""A conversation: questions, answers, and pictures that may come at any time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

from .image import ImageSource
from .values import Answer, GenerateOptions, ImageEmbedding, Turn


class Model(Protocol):
    """What a conversation needs of a model: `engine.OmniVLM` without its other methods."""

    def encode(self, image: ImageSource) -> ImageEmbedding: ...

    def generate_turn(
        self, turns: Sequence[Turn], options: GenerateOptions | None, system: str | None
    ) -> Generator[str, None, Answer]: ...


class Chat:
    """A conversation with one model. Made by `OmniVLM.chat`.

    With `history` the model sees everything said so far; without, each question stands alone with
    the pictures given last. `turns` are the questions answered; `system` is the system text.
    Nothing is computed twice: pictures are encoded once, and of a prompt only what is new.
    """

    def __init__(self, model: Model, *, system: str | None, history: bool) -> None:
        self._model = model
        self._new_images: tuple[ImageEmbedding, ...] = ()
        self.system = system
        self.history = history
        self.turns: list[Turn] = []

    @property
    def has_images(self) -> bool:
        """Whether the next question is about any picture."""
        return bool(self._new_images or any(turn.images for turn in self.turns))

    def add_image(self, image: ImageSource | ImageEmbedding) -> ImageEmbedding:
        """Encodes a picture for the next question. Raises as `OmniVLM.encode`."""
        embedding = image if isinstance(image, ImageEmbedding) else self._model.encode(image)
        self._new_images += (embedding,)
        return embedding

    def ask(
        self,
        question: str,
        image: ImageSource | ImageEmbedding | None = None,
        options: GenerateOptions | None = None,
    ) -> Answer:
        """The whole answer; arguments and errors as for `stream`."""
        stream = self.stream(question, image, options)
        while True:
            try:
                next(stream)
            except StopIteration as finished:
                answer: Answer = finished.value
                return answer

    def stream(
        self,
        question: str,
        image: ImageSource | ImageEmbedding | None = None,
        options: GenerateOptions | None = None,
    ) -> Generator[str, None, Answer]:
        """Asks, with a new picture or not; yields text, returns the Answer.

        An answer that is broken off stays in the conversation as far as it came. Raises as
        `OmniVLM.encode` and `OmniVLM.generate`; a question that fails leaves no trace.
        """
        if image is not None:
            self.add_image(image)
        turn = Turn(question, self._new_images)
        if self.history:
            earlier = list(self.turns)
        else:
            earlier = []
            turn = Turn(question, self._new_images or self._last_images())
        answering = self._model.generate_turn([*earlier, turn], options, self.system)
        said: str | tuple[int, ...] | None = None  # none before the first word
        text = ""
        try:
            while True:
                try:
                    piece = next(answering)
                except StopIteration as finished:
                    answer: Answer = finished.value
                    said = answer.tokens
                    return answer
                said = text = text + piece
                yield piece
        finally:
            answering.close()
            if said is not None:
                self.turns.append(Turn(question, turn.images, said))
                self._new_images = ()

    def clear(self) -> None:
        """Forgets questions, answers and pictures."""
        self.turns.clear()
        self._new_images = ()

    def _last_images(self) -> tuple[ImageEmbedding, ...]:
        return next((turn.images for turn in reversed(self.turns) if turn.images), ())
