"""A conversation: questions, answers, and pictures that may come at any time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol, TypeAlias

from .image import ImageSource
from .values import Answer, GenerateOptions, ImageEmbedding, Turn

Images: TypeAlias = "ImageSource | ImageEmbedding | Sequence[ImageSource | ImageEmbedding]"


class Model(Protocol):
    """What a conversation needs of a model: `engine.OmniVLM` without its other methods."""

    def encode(self, image: ImageSource) -> ImageEmbedding: ...

    def generate_turn(
        self, turns: Sequence[Turn], options: GenerateOptions | None, system: str | None
    ) -> Generator[str, None, Answer]: ...


def finish(stream: Generator[str, None, Answer]) -> Answer:
    """What a stream of text returns at its end."""
    while True:
        try:
            next(stream)
        except StopIteration as finished:
            answer: Answer = finished.value
            return answer


class Chat:
    """A conversation with one model. Made by `OmniVLM.chat`.

    With `history` the model sees everything said so far; without, each question stands alone with
    the pictures given last. `turns` are the questions answered; `system` is the system text.
    Nothing is computed twice: pictures are encoded once, and of a prompt only what is new.
    """

    def __init__(self, model: Model, *, system: str | None, history: bool) -> None:
        self._model = model
        self._waiting: tuple[ImageEmbedding, ...] = ()  # for the next question
        self.system = system
        self.history = history
        self.turns: list[Turn] = []

    @property
    def has_images(self) -> bool:
        """Whether the next question is about any picture."""
        return bool(self._waiting or any(turn.images for turn in self.turns))

    def add_images(self, *images: ImageSource | ImageEmbedding) -> None:
        """Encodes pictures for the next question. Raises as `OmniVLM.encode`.

        Without `history` they take the place of those that were waiting.
        """
        embeddings = tuple(
            image if isinstance(image, ImageEmbedding) else self._model.encode(image)
            for image in images
        )
        self._waiting = self._waiting + embeddings if self.history else embeddings

    def ask(
        self,
        question: str,
        image: Images | None = None,
        options: GenerateOptions | None = None,
    ) -> Answer:
        """The whole answer; arguments and errors as for `stream`."""
        return finish(self.stream(question, image, options))

    def stream(
        self,
        question: str,
        image: Images | None = None,
        options: GenerateOptions | None = None,
    ) -> Generator[str, None, Answer]:
        """Asks, with a new picture (or a list of some) or none; yields text, returns the Answer.

        An answer that is broken off stays in the conversation as far as it came. Raises as
        `OmniVLM.encode` and `OmniVLM.generate`; a question that fails leaves no trace but its
        pictures, which wait for the next one.
        """
        if image is not None:
            self.add_images(*(image if isinstance(image, list | tuple) else [image]))
        given, self._waiting = self._waiting, ()
        if self.history:
            turn = Turn(question, given)
            earlier = self.turns
        else:
            turn = Turn(question, given or self._latest_images())
            earlier = []
        text: str | None = None
        tokens: tuple[int, ...] = ()
        answering = None
        try:
            answering = self._model.generate_turn([*earlier, turn], options, self.system)
            while True:
                try:
                    piece = next(answering)
                except StopIteration as finished:
                    answer: Answer = finished.value
                    text, tokens = answer.text, answer.tokens
                    return answer
                text = (text or "") + piece
                yield piece
        finally:
            if answering is not None:
                answering.close()
            if text is None:
                self._waiting = given + self._waiting
            else:
                self.turns.append(Turn(question, turn.images, text, tokens))

    def clear(self) -> None:
        """Forgets questions, answers and pictures."""
        self.turns.clear()
        self._waiting = ()

    def _latest_images(self) -> tuple[ImageEmbedding, ...]:
        return next((turn.images for turn in reversed(self.turns) if turn.images), ())
