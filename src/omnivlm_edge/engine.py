"""The one file that knows the order of the stages.

image -> preprocess -> vision encoder -> projector -> text decoder -> text
encoder.py: image.py - vision.py (native/) ---------- prompt.py, decoder.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from . import prompt as prompts
from ._native import ImportanceCollector
from .cache import DiskCache, cache_key
from .chat import Chat, Images, finish
from .decoder import Embeddings, TextDecoder, Tokens, TokenSequence, cells_of
from .device import check_precision, check_threads, select_device
from .encoder import PictureEncoder
from .errors import ClosedError, ContextOverflowError, OptionError
from .files import identity, loaded_digest
from .image import ImageSource
from .models import find_model
from .paths import cache_dir
from .values import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_N_CTX,
    Answer,
    FinishReason,
    GenerateOptions,
    ImageEmbedding,
    Timings,
    Turn,
)


class OmniVLM:
    """An OmniVLM model, loaded once, that answers questions about pictures.

    Args:
        model: `demo`, a published model's name such as `omnivision:q8_0` (downloaded when it is
            not here yet), a directory with the two files, or the text model's GGUF file.
        mmproj: the vision file; found beside the text model when it is left out.
        variant: prompt variant, for files that name none (see `prompt.VARIANTS`).
        device: `auto`, `cpu`, `cuda`, `metal`, `vulkan` or a device name of ggml.
        n_ctx: positions in the context; at most what the model was trained for.
        n_threads: CPU threads; the cores that this process may use when left out.
        n_gpu_layers: layers of the text model on the device; all when left out.
        mmproj_offload: whether the vision path runs on the device too, or on the CPU.
        vision_precision: how pictures are encoded on a CPU, one of VISION_PRECISIONS: `auto` is
            `int8` where the CPU has instructions for it. GPUs compute in the file's own types.
        low_memory: keeps the vision weights as they are in the file and expands them layer by
            layer for every picture, and makes no faster copies of the text model's.
        disk_cache: whether encoded pictures, the beginnings of prompts and the files' hashes are
            kept on disk, for other processes too.
        collector: is shown every matrix product of both models (see `imatrix.collect`).

    Raises ModelFileError, DeviceError, OptionError. One object generates one answer at a time:
    a second one, from another thread too, raises BusyError until the first is finished or its
    iterator closed. A process that was forked off must make an object of its own.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        mmproj: str | os.PathLike[str] | None = None,
        *,
        variant: str | None = None,
        device: str = "auto",
        n_ctx: int = DEFAULT_N_CTX,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        mmproj_offload: bool = True,
        vision_precision: str = "auto",
        low_memory: bool = False,
        disk_cache: bool = True,
        collector: ImportanceCollector | None = None,
    ) -> None:
        started = time.perf_counter()
        _check_whole("n_ctx", n_ctx, 1)
        threads = check_threads(n_threads)
        if n_gpu_layers is not None:
            _check_whole("n_gpu_layers", n_gpu_layers, 0)
        files = find_model(model, mmproj, variant)
        check_precision(vision_precision)
        chosen = select_device(device)
        vision_device = chosen if mmproj_offload else select_device("cpu")

        self._loaded = {path: identity(path) for path in (files.text, files.mmproj)}
        encoder = PictureEncoder(
            files.mmproj,
            vision_device,
            threads,
            disk_cache=disk_cache,
            precision=vision_precision,
            low_memory=low_memory,
            collector=collector,
        )
        self._encoder: PictureEncoder | None = encoder
        self._variant = encoder.prompt_variant(files.variant)
        self._decoder = TextDecoder(
            files.text,
            chosen,
            n_ctx=n_ctx,
            n_threads=threads,
            n_gpu_layers=n_gpu_layers,
            low_memory=low_memory,
            collector=collector,
        )
        encoder.check_text_model(files.text, self._decoder.n_embd)
        self._hashes = encoder.hashes
        self._beginnings = DiskCache(cache_dir() / "beginnings" if disk_cache else None)
        self.files = files
        self.device = chosen.name
        self.vision_device = vision_device.name
        self.load_seconds = time.perf_counter() - started

    @property
    def image_size(self) -> int:
        """Side of the square that every picture is resized to, in pixels."""
        return self._open_encoder().hparams.image_size

    @property
    def image_tokens(self) -> int:
        """Positions that one picture takes."""
        return self._open_encoder().hparams.n_tokens

    @property
    def vision_precision(self) -> str:
        """What `auto` became; `ggml` where ggml encodes pictures, in the file's own types."""
        return self._open_encoder().precision

    @property
    def n_ctx(self) -> int:
        """Positions in the context."""
        return self._decoder.n_ctx

    @property
    def takes_questions(self) -> bool:
        """False for OCR models: they read a picture, whatever is asked."""
        return prompts.takes_questions(self._variant)

    def file_hashes(self) -> dict[Path, str | None]:
        """The SHA-256 of both files, in hex; None for one that changed since it was loaded.

        The first time it reads them whole.
        """
        return {
            path: loaded_digest(path, loaded, self._hashes) for path, loaded in self._loaded.items()
        }

    def encode(self, image: ImageSource) -> ImageEmbedding:
        """Encodes a picture once, for any number of questions.

        A picture that was encoded before is found in memory, or on disk, by its resized pixels, the
        vision file's content, the device and this package's version.

        Raises ImageError (see `image.load_image`), DeviceError, ClosedError.
        """
        return self._open_encoder().encode(image)

    def generate(
        self,
        image: Images,
        prompt: str,
        options: GenerateOptions | None = None,
        *,
        system: str | None = None,
    ) -> Generator[str, None, Answer]:
        """Streams the answer's text; the generator's return value is the whole Answer.

        `image` may be several pictures, as a list; `system` replaces the model's system text.

        Raises OptionError, ContextOverflowError and ClosedError at once, before any work;
        ImageError, BusyError and DeviceError when the iteration starts.
        """
        return self.generate_turn([Turn(prompt, _as_tuple(image))], options, system)

    def answer(
        self,
        image: Images,
        prompt: str,
        options: GenerateOptions | None = None,
        *,
        system: str | None = None,
    ) -> Answer:
        """Generates a whole answer; arguments and errors as for `generate`."""
        return finish(self.generate(image, prompt, options, system=system))

    def generate_turn(
        self,
        turns: Sequence[Turn],
        options: GenerateOptions | None = None,
        system: str | None = None,
    ) -> Generator[str, None, Answer]:
        """Streams the answer to the last turn of a conversation; errors as for `generate`."""
        options = GenerateOptions() if options is None else options
        if not isinstance(options, GenerateOptions):
            raise OptionError(f"options is {options!r}: it must be GenerateOptions")
        started = time.perf_counter()
        parts = self._tokenize(turns, system)
        room = self._decoder.n_ctx - sum(map(self._count, parts))
        if room < (options.max_tokens or 1):
            what = "lower max_tokens (-n)"
            if len(turns) > 1:
                what = "start the conversation over (/clear)"
            raise ContextOverflowError(self._overflow(room, options.max_tokens or 1, what))
        max_tokens = options.max_tokens or min(DEFAULT_MAX_TOKENS, room)
        return self._generate(parts, options, max_tokens, started)

    def choose(
        self, image: Images, prompt: str, choices: Sequence[str], *, system: str | None = None
    ) -> dict[str, float]:
        """The probability of each choice as the beginning of the answer, the likeliest first.

        They add up to 1: what else the model might have said does not count. The spellings of a
        choice (as given, lower case, capitalised) count together.

        Raises as `answer`, and OptionError for fewer than two choices, equal or empty ones.
        """
        names = _check_choices(choices)
        spellings = [_spellings(name) for name in names]
        parts = self._tokenize([Turn(prompt, _as_tuple(image))], system)
        room = self._decoder.n_ctx - sum(map(self._count, parts))
        tokens = {
            spelling: self._decoder.tokenize([prompts.Piece(spelling, special=False)])
            for choice in spellings
            for spelling in choice
        }
        longest = max(map(len, tokens.values()))
        if room < longest:
            raise ContextOverflowError(self._overflow(room, longest, "shorten the choices"))
        sequence = self._decoder.open(GenerateOptions())
        try:
            self._prefill(sequence, self._embed(parts)[0], _first_picture(parts))
            found = self._decoder.score(sequence, list(tokens.values()))
        finally:
            self._decoder.close_sequence(sequence)
        scores = dict(zip(tokens, found, strict=True))  # log-probabilities
        together = [np.logaddexp.reduce([scores[text] for text in choice]) for choice in spellings]
        shares = np.exp(np.asarray(together) - np.logaddexp.reduce(together))
        chances = zip(names, map(float, shares), strict=True)
        return dict(sorted(chances, key=lambda chance: -chance[1]))

    def logits_along(
        self, image: ImageSource | ImageEmbedding, prompt: str, tokens: Sequence[int]
    ) -> Iterator[npt.NDArray[np.float32]]:
        """The logits of an answer's first token, then behind each of `tokens`: float32 [n_vocab].

        So another model's answer can be followed (`Answer.tokens`). What was computed before is not
        used: the same arguments give the same numbers. Raises as `answer`.
        """
        filled, _, _ = self._embed(self._tokenize([Turn(prompt, (image,))], None))
        sequence = self._decoder.open(GenerateOptions())
        try:
            yield from self._decoder.logits_along(sequence, filled, list(tokens))
        finally:
            self._decoder.close_sequence(sequence)

    def chat(self, *, system: str | None = None, history: bool | None = None) -> Chat:
        """A conversation about any number of pictures.

        `history` False answers each question on its own; left out, that is so for models that were
        trained on single questions only, as their vision file or prompt variant says.
        """
        if history is None:
            history = self.takes_questions and not self._open_encoder().hparams.single_turn
        return Chat(self, system=system, history=history)

    def forget(self) -> None:
        """Forgets pictures and prompts in memory: the next answer computes all of them anew.

        What is on disk (`disk_cache`) stays. Raises ClosedError.
        """
        self._open_encoder().forget()
        self._decoder.forget()

    def close(self) -> None:
        """Frees both models. May be called again; later use raises ClosedError."""
        self._encoder = None
        self._decoder.close()

    def __enter__(self) -> OmniVLM:
        self._open_encoder()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_encoder(self) -> PictureEncoder:
        if self._encoder is None:
            raise ClosedError("the model was closed; make a new one")
        return self._encoder

    def _tokenize(self, turns: Sequence[Turn], system: str | None) -> list[_Part]:
        """The prompt of a conversation: tokens, and the pictures between them."""
        n_tokens, n_embd = self.image_tokens, self._open_encoder().hparams.n_embd_text
        for turn in turns:
            for text in (turn.question, system or ""):
                if not isinstance(text, str):
                    raise OptionError(f"a prompt must be text, not {type(text).__name__}")
            for image in turn.images:
                if isinstance(image, ImageEmbedding) and image.data.shape != (n_tokens, n_embd):
                    raise OptionError(
                        f"the image embedding has the shape {list(image.data.shape)} instead of "
                        f"{[n_tokens, n_embd]}: it was encoded by another model; encode it with "
                        "this one"
                    )
        pictures = (_Picture(image) for turn in turns for image in turn.images)
        parts: list[_Part] = []
        for part in prompts.build_prompt(turns, self._variant, system):
            if part == prompts.IMAGE:
                parts.append(next(pictures))
            elif isinstance(part, prompts.Piece):
                parts.append(self._decoder.tokenize([part], start=not parts))
            else:
                parts.append(list(part))
        return parts

    def _count(self, part: _Part) -> int:
        return self.image_tokens if isinstance(part, _Picture) else len(part)

    def _overflow(self, room: int, wanted: int, advice: str) -> str:
        n_ctx = self._decoder.n_ctx
        last = " or raise n_ctx (-c)"
        if n_ctx >= self._decoder.n_ctx_train:
            last = "; the model was trained for no more positions"
        return (
            f"the prompt ({n_ctx - room} positions) and an answer of {wanted} or more do not fit "
            f"into the context of {n_ctx}: shorten the prompt, {advice}{last}"
        )

    def _embed(
        self, parts: Sequence[_Part]
    ) -> tuple[list[Tokens | Embeddings], list[ImageEmbedding], list[ImageEmbedding]]:
        """The parts with every picture encoded; the pictures; those of them encoded just now."""
        filled: list[Tokens | Embeddings] = []
        pictures: list[ImageEmbedding] = []
        new: list[ImageEmbedding] = []
        for part in parts:
            if not isinstance(part, _Picture):
                filled.append(part)
                continue
            picture = part.source
            if not isinstance(picture, ImageEmbedding):
                picture = self.encode(picture)
                new.append(picture)
            pictures.append(picture)
            filled.append(picture.data)
        return filled, pictures, new

    def _prefill(
        self, sequence: TokenSequence, parts: Sequence[Tokens | Embeddings], n_first: int
    ) -> None:
        """Prefills a prompt. Its first parts, up to the first picture, are kept on disk."""
        decoder, first = self._decoder, parts[:n_first]
        text = self.files.text
        digest = None
        if self._hashes is not None and first and not decoder.holds(sequence, first):
            digest = loaded_digest(text, self._loaded[text], self._hashes)
        if digest is None:
            decoder.prefill(sequence, parts)
            return
        key = cache_key(digest, self.device, cells_of(first))
        state = self._beginnings.get(key)
        if state is not None and decoder.restore(sequence, first, state):
            decoder.prefill(sequence, parts)
        else:
            decoder.prefill(sequence, first, final=False)
            self._beginnings.put(key, decoder.state(sequence))
            decoder.prefill(sequence, parts[n_first:])

    def _generate(
        self, parts: Sequence[_Part], options: GenerateOptions, max_tokens: int, started: float
    ) -> Generator[str, None, Answer]:
        decoder = self._decoder
        sequence = decoder.open(options)
        try:
            filled, pictures, new = self._embed(parts)
            prefilling = time.perf_counter()
            self._prefill(sequence, filled, _first_picture(parts))
            prefill_seconds = time.perf_counter() - prefilling
            n_prompt = sequence.position

            text = ""
            tokens: list[int] = []
            decode_seconds = first_token_seconds = 0.0
            finish_reason: FinishReason = "length"
            header = _HeaderFilter(decoder.special_token("<|im_start|>"))
            while len(tokens) < max_tokens:
                step_started = time.perf_counter()
                if tokens:
                    decoder.decode([sequence])
                token = decoder.sample(sequence)
                piece = "" if sequence.at_end else header.feed(token, decoder.text(sequence))
                now = time.perf_counter()
                decode_seconds += now - step_started
                first_token_seconds = first_token_seconds or now - started
                if sequence.at_end:
                    finish_reason = "stop"
                    break
                tokens.append(token)
                if piece:
                    text += piece
                    yield piece
            rest = header.flush() + decoder.text(sequence, final=True)
            if rest:
                text += rest
                yield rest
            return Answer(
                text=text,
                finish_reason=finish_reason,
                prompt_tokens=n_prompt,
                image_tokens=sum(len(picture.data) for picture in pictures),
                completion_tokens=len(tokens),
                cached_tokens=sequence.n_cached,
                timings=Timings(
                    load=self.load_seconds,
                    preprocess=sum(picture.preprocess_seconds for picture in new),
                    encode=sum(picture.encode_seconds for picture in new),
                    prefill=prefill_seconds,
                    decode=decode_seconds,
                    first_token=first_token_seconds,
                ),
                tokens=tuple(tokens),
                images=tuple(pictures),
            )
        finally:
            decoder.close_sequence(sequence)


@dataclass(frozen=True, eq=False)
class _Picture:
    """A picture's place in a prompt."""

    source: ImageSource | ImageEmbedding


_Part: TypeAlias = "Tokens | _Picture"


class _HeaderFilter:
    """Removes what a model may write before its answer: white space and its own turn header.

    The header is part of the prompt already; the published weights were trained to write it, so it
    is removed where it still appears.
    """

    _HEADER = "assistant\n"

    def __init__(self, im_start: int) -> None:
        self._im_start = im_start
        self._held: str | None = None  # text since <|im_start|> that may be the header
        self._answering = False

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


def _first_picture(parts: Sequence[_Part]) -> int:
    """How many parts there are up to the first picture and with it; 0 without pictures."""
    return next((i for i, part in enumerate(parts, 1) if isinstance(part, _Picture)), 0)


def _as_tuple(image: Images) -> tuple[ImageSource | ImageEmbedding, ...]:
    return tuple(image) if isinstance(image, list | tuple) else (image,)  # type: ignore[return-value]


def _check_choices(choices: Sequence[str]) -> list[str]:
    given = [] if isinstance(choices, str) else choices
    names = [choice.strip() for choice in given if isinstance(choice, str)]
    different = {name.lower() for name in names} - {""}
    if len(different) < max(2, len(choices)):
        raise OptionError("choices must be two or more different words, such as yes,no")
    return names


def _spellings(choice: str) -> set[str]:
    return {choice, choice.lower(), choice[:1].upper() + choice[1:]}


def _check_whole(name: str, value: object, least: int, most: int = 2**31 - 1) -> None:
    if type(value) is not int or not least <= value <= most:
        raise OptionError(f"{name} is {value!r}: it must be a whole number from {least} to {most}")
