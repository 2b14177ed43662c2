"""One answer while it is made.

It is given what it needs, a picture encoded, its prompt prefilled, a token decoded: by engine.py
one answer at a time, by scheduler.py many at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .decoder import Embeddings, TextDecoder, Tokens, TokenSequence, log_softmax
from .image import ImageSource, Pixels
from .values import Answer, FinishReason, GenerateOptions, ImageEmbedding, Timings, TokenLogprob


@dataclass(frozen=True, eq=False)
class PictureSlot:
    """A picture's place in a prompt."""

    source: ImageSource | Pixels | ImageEmbedding


PromptPart: TypeAlias = "Tokens | PictureSlot"


class Generation:
    """An answer to one prompt. Made by `OmniVLM.prepare`; `close` it, whatever happens.

    First its `waiting` pictures are `put`, then `OmniVLM.prefill_steps` taken; then `sample` and
    `OmniVLM.decode` take turns until it is `finished`, and its `answer` complete. `n_prompt` counts
    the prompt's positions, `n_positions` those that prompt and answer together may take. An answer
    is `continued` whose beginning is in the prompt.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        parts: Sequence[PromptPart],
        options: GenerateOptions,
        *,
        n_prompt: int,
        max_tokens: int,
        load_seconds: float,
        continued: bool = False,
    ) -> None:
        self.started = time.perf_counter()
        self.options = options
        self.parts = list(parts)
        self.n_prompt = n_prompt
        self.n_positions = n_prompt + max_tokens
        self.finished = False
        self.logprobs: list[TokenLogprob] = []
        self.prefill_seconds = 0.0
        self._decoder = decoder
        self._max_tokens = max_tokens
        self._load_seconds = load_seconds
        self._encoded: list[ImageEmbedding] = []  # for this answer
        self._sequence: TokenSequence | None = None
        self._text = ""
        self._tokens: list[int] = []
        self._decode_seconds = self._first_token_seconds = 0.0
        self._finish_reason: FinishReason = "length"
        self._header = _HeaderFilter(decoder.special_token("<|im_start|>"), continued)
        self._stop = _StopFilter(options.stop)
        #: Names to be scored, each with the tokens of its spellings; see `OmniVLM.score`.
        self.choices: dict[str, list[Tokens]] = {}

    @property
    def waiting(self) -> Iterator[ImageSource | Pixels]:
        """The pictures that are still to be encoded."""
        for part in self.parts:
            if isinstance(part, PictureSlot) and not isinstance(part.source, ImageEmbedding):
                yield part.source

    def put(self, embedding: ImageEmbedding) -> None:
        """Gives it the first picture of `waiting`, encoded."""
        i = next(
            i
            for i, part in enumerate(self.parts)
            if isinstance(part, PictureSlot) and not isinstance(part.source, ImageEmbedding)
        )
        self.parts[i] = PictureSlot(embedding)
        self._encoded.append(embedding)

    @property
    def images(self) -> tuple[ImageEmbedding, ...]:
        """The encoded pictures, in the order of the prompt."""
        slots = (part.source for part in self.parts if isinstance(part, PictureSlot))
        return tuple(source for source in slots if isinstance(source, ImageEmbedding))

    @property
    def filled(self) -> list[Tokens | Embeddings]:
        """The prompt for the decoder, when nothing is `waiting`."""
        images = iter(self.images)
        return [next(images).data if isinstance(p, PictureSlot) else p for p in self.parts]

    @property
    def n_first(self) -> int:
        """How many parts there are up to the first picture and with it; 0 without pictures."""
        slots = (i for i, part in enumerate(self.parts, 1) if isinstance(part, PictureSlot))
        return next(slots, 0)

    @property
    def sequence(self) -> TokenSequence:
        """Its place in the context, claimed when it is first asked for. Raises BusyError."""
        if self._sequence is None:
            self._sequence = self._decoder.open(self.options)
        return self._sequence

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt is in the context."""
        return self.sequence.position >= self.n_prompt

    def sample(self, since: float) -> str:
        """Samples the next token -> what it adds to the text, often nothing.

        The newest step of `sequence` computed its logits. `since` is when that step began, by
        `time.perf_counter`. Raises OptionError when the grammar cannot be followed.
        """
        decoder, sequence = self._decoder, self.sequence
        logits = None if self.options.top_logprobs is None else decoder.logits(sequence)
        token = decoder.sample(sequence)
        piece = ""
        if sequence.at_end:
            self.finished, self._finish_reason = True, "stop"
        else:
            self._tokens.append(token)
            if logits is not None:
                self.logprobs.append(self._logprob(logits, token))
            piece = self._stop.feed(self._header.feed(token, decoder.text(sequence)))
            if self._stop.met:
                self.finished, self._finish_reason = True, "stop"
            elif len(self._tokens) == self._max_tokens:
                self.finished = True
        if self.finished and not self._stop.met:
            rest = self._header.flush() + decoder.text(sequence, final=True)
            piece += self._stop.feed(rest) + self._stop.flush()
            if self._stop.met:
                self._finish_reason = "stop"
        now = time.perf_counter()
        self._decode_seconds += now - since
        self._first_token_seconds = self._first_token_seconds or now - self.started
        self._text += piece
        return piece

    def answer(self) -> Answer:
        """The answer as far as it has come."""
        return Answer(
            text=self._text,
            finish_reason=self._finish_reason,
            prompt_tokens=self.n_prompt,
            image_tokens=sum(len(picture.data) for picture in self.images),
            completion_tokens=len(self._tokens),
            cached_tokens=self.sequence.n_cached,
            timings=Timings(
                load=self._load_seconds,
                preprocess=sum(picture.preprocess_seconds for picture in self._encoded),
                encode=sum(picture.encode_seconds for picture in self._encoded),
                prefill=self.prefill_seconds,
                decode=self._decode_seconds,
                first_token=self._first_token_seconds,
            ),
            tokens=tuple(self._tokens),
            images=self.images,
            logprobs=tuple(self.logprobs),
        )

    def chosen(self, choices: dict[str, float], seconds: float) -> Answer:
        """The answer when choices were scored: no tokens, but the likeliest of them."""
        answer = self.answer()
        timings = replace(
            answer.timings, decode=seconds, first_token=time.perf_counter() - self.started
        )
        return replace(
            answer,
            text=next(iter(choices)),
            finish_reason="stop",
            choices=choices,
            timings=timings,
        )

    def close(self) -> None:
        """Gives its place in the context back; may be called again."""
        if self._sequence is not None:
            self._decoder.close_sequence(self._sequence)

    def _logprob(self, logits: npt.NDArray[np.float32], token: int) -> TokenLogprob:
        """What the model thought of a token, and the likeliest ones beside it."""
        logprobs = log_softmax(logits)
        n = self.options.top_logprobs or 0
        likeliest = np.argpartition(-logprobs, n)[:n]
        likeliest = likeliest[np.argsort(-logprobs[likeliest], kind="stable")]
        return TokenLogprob(
            self._decoder.token_bytes(token),
            float(logprobs[token]),
            tuple((self._decoder.token_bytes(int(i)), float(logprobs[i])) for i in likeliest),
        )


class _HeaderFilter:
    """Removes what a model may write before its answer: white space and its own turn header.

    The header is part of the prompt already; the published weights were trained to write it, so it
    is removed where it still appears.
    """

    _HEADER = "assistant\n"

    def __init__(self, im_start: int, answering: bool = False) -> None:
        self._im_start = im_start
        self._held: str | None = None  # text since <|im_start|> that may be the header
        self._answering = answering

    def feed(self, token: int, text: str) -> str:
        if self._answering:
            return text
        if token == self._im_start:
            self._held = ""
            return ""
        if self._held is not None:
            self._held += text
            if self._HEADER.startswith(self._held):
                return ""
            text, self._held = self._held.removeprefix(self._HEADER), None
        text = text.lstrip()
        self._answering = bool(text)
        return text

    def flush(self) -> str:
        """What was held back when the generation ended in the middle of a header."""
        held, self._held = self._held or "", None
        return held


class _StopFilter:
    """Ends the text before the first of some strings; what may become one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.met = False

    def feed(self, text: str) -> str:
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.met = True
            return self._held[: min(found)]
        keep = max(map(self._begun, self._stops), default=0)
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        return text

    def flush(self) -> str:
        """What was held back when the generation ended in another way."""
        return "" if self.met else self._held

    def _begun(self, stop: str) -> int:
        """How many characters at the end of what is held back begin this string."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if self._held.endswith(stop[:n])), 0)
