"""The one file that knows the order of the stages.

image -> preprocess -> vision encoder -> projector -> text decoder -> text
encoder.py: image.py - vision.py (native/) ---------- prompt.py, decoder.py, generation.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import prompt as prompts
from ._native import ImportanceCollector
from .cache import DiskCache, cache_key
from .chat import Chat, Images, finish
from .decoder import TextDecoder, cells_of
from .device import check_precision, check_threads, select_device
from .encoder import PictureEncoder
from .errors import ClosedError, ContextOverflowError, OptionError
from .files import identity, loaded_digest
from .generation import Generation, PictureSlot, PromptPart
from .image import ImageSource, Pixels
from .memory import check_budget
from .model_file import inspect_file
from .models import find_model
from .paths import cache_dir
from .values import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_N_CTX,
    Answer,
    GenerateOptions,
    ImageEmbedding,
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
        n_ctx: positions in the context; at most what the model was trained for, per sequence.
        n_sequences: answers that may be generated at the same time (see `scheduler`).
        n_threads: CPU threads; the cores that this process may use when left out.
        n_gpu_layers: layers of the text model on the device; all when left out.
        mmproj_offload: whether the vision path runs on the device too, or on the CPU.
        vision_precision: how pictures are encoded on a CPU, one of VISION_PRECISIONS: `auto` is
            `int8` where the CPU has instructions for it. GPUs compute in the file's own types.
        low_memory: keeps the vision weights as they are in the file and expands them layer by
            layer for every picture, and makes no faster copies of the text model's.
        max_ram: bytes that may be used; a model that may need more is refused before it is loaded.
            Counted are weights, context, program and one picture of 12 megapixels.
        disk_cache: whether encoded pictures, the beginnings of prompts and the files' hashes are
            kept on disk, for other processes too.
        collector: is shown every matrix product of both models (see `imatrix.collect`).

    Raises ModelFileError, DeviceError, OptionError. One object generates `n_sequences` answers at a
    time: one more, from another thread too, raises BusyError until another is finished or its
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
        n_sequences: int = 1,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        mmproj_offload: bool = True,
        vision_precision: str = "auto",
        low_memory: bool = False,
        max_ram: int | None = None,
        disk_cache: bool = True,
        collector: ImportanceCollector | None = None,
    ) -> None:
        started = time.perf_counter()
        _check_whole("n_ctx", n_ctx, 1)
        _check_whole("n_sequences", n_sequences, 1)
        threads = check_threads(n_threads)
        if n_gpu_layers is not None:
            _check_whole("n_gpu_layers", n_gpu_layers, 0)
        for name, value in (
            ("mmproj_offload", mmproj_offload),
            ("low_memory", low_memory),
            ("disk_cache", disk_cache),
        ):
            if not isinstance(value, bool):
                raise OptionError(f"{name} is {value!r}: it must be True or False")
        files = find_model(model, mmproj, variant)
        check_precision(vision_precision)
        chosen = select_device(device)
        vision_device = chosen if mmproj_offload else select_device("cpu")

        if max_ram is not None:
            _check_whole("max_ram", max_ram, 1, 2**63)
            check_budget(
                max_ram,
                inspect_file(files.text),
                inspect_file(files.mmproj),
                n_ctx,
                n_sequences=n_sequences,
                precision=vision_precision,
                low_memory=low_memory,
                on_cpu=vision_device.kind == "cpu",
            )

        self._loaded = {path: identity(path) for path in (files.text, files.mmproj)}
        # The text model first: it needs the more memory while it loads, and less when it is there.
        self._decoder = TextDecoder(
            files.text,
            chosen,
            n_ctx=n_ctx,
            n_sequences=n_sequences,
            n_threads=threads,
            n_gpu_layers=n_gpu_layers,
            low_memory=low_memory,
            collector=collector,
        )
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
        self._low_memory = low_memory
        self._variant = encoder.prompt_variant(files.variant)
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
        """Positions in the context that one prompt and its answer may take."""
        return self._decoder.n_ctx_sequence

    @property
    def n_ctx_total(self) -> int:
        """Positions in the context that all answers at the same time share."""
        return self._decoder.n_ctx

    @property
    def takes_questions(self) -> bool:
        """False for OCR models: they read a picture, whatever is asked."""
        return prompts.takes_questions(self._variant)

    @property
    def single_turn(self) -> bool:
        """True for models that were trained on single questions only."""
        return self._open_encoder().hparams.single_turn

    def file_hashes(self) -> dict[Path, str | None]:
        """The SHA-256 of both files, in hex; None for one that changed since it was loaded.

        The first time it reads them whole.
        """
        return {
            path: loaded_digest(path, loaded, self._hashes) for path, loaded in self._loaded.items()
        }

    def preprocess(self, image: ImageSource, name: str | None = None) -> Pixels:
        """A picture as the model sees it, for `encode`; several threads may do this at once.

        `name` is what messages call it, if not by its path. Raises ImageError (see
        `image.load_image`), ClosedError.
        """
        return self._open_encoder().preprocess(image, name)

    def encode(self, image: ImageSource | Pixels) -> ImageEmbedding:
        """Encodes a picture once, for any number of questions.

        A picture that was encoded before is found in memory, or on disk, by its resized pixels, the
        vision file's content, the device, the precision and this package's version.

        Raises ImageError (see `image.load_image`), DeviceError, ClosedError.
        """
        return self.encode_batch([image])[0]

    def encode_batch(self, images: Sequence[ImageSource | Pixels]) -> list[ImageEmbedding]:
        """Encodes pictures together; the same picture twice is computed once. As `encode`."""
        encoder = self._open_encoder()
        if self._low_memory:
            self._decoder.release_pages()
        return encoder.encode_batch(images)

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
        return self._run(self.prepare(turns, options, system))

    def prepare(
        self,
        turns: Sequence[Turn],
        options: GenerateOptions | None = None,
        system: str | None = None,
        *,
        cut: bool = False,
    ) -> Generation:
        """The answer to the last turn of a conversation, before any work.

        With `cut`, more `max_tokens` than the context has room for are as many as it has.

        Raises OptionError, ContextOverflowError, ClosedError.
        """
        options = GenerateOptions() if options is None else options
        if not isinstance(options, GenerateOptions):
            raise OptionError(f"options is {options!r}: it must be GenerateOptions")
        advice = "lower max_tokens (-n)"
        if len(turns) > 1:
            advice = "start the conversation over (/clear)"
        return self._prepare(turns, options, system, advice, cut=cut)

    def prefill_steps(self, generation: Generation, most: int | None = None) -> Iterator[None]:
        """Puts the prompt of an answer, whose pictures are encoded, into the context.

        In steps of at most `most` positions. Raises BusyError when there is no place for it.
        """
        steps = self._prefill_steps(generation, most)
        while True:
            started = time.perf_counter()
            try:
                next(steps)
            except StopIteration:
                return
            finally:
                generation.prefill_seconds += time.perf_counter() - started
            yield

    def decode(self, generations: Sequence[Generation]) -> None:
        """One step of several answers: appends the token that each has sampled last."""
        self._decoder.decode([generation.sequence for generation in generations])

    def choose(
        self, image: Images, prompt: str, choices: Sequence[str], *, system: str | None = None
    ) -> dict[str, float]:
        """The probability of each choice as the beginning of the answer, the likeliest first.

        They add up to 1: what else the model might have said does not count. The spellings of a
        choice (as given, lower case, capitalised) count together.

        Raises as `answer`, and OptionError for fewer than two choices, equal or empty ones.
        """
        turns = [Turn(prompt, _as_tuple(image))]
        with closing(self.prepare_choice(turns, choices, system)) as generation:
            self._prefill(generation)
            return self.score(generation).choices

    def prepare_choice(
        self, turns: Sequence[Turn], choices: Sequence[str], system: str | None = None
    ) -> Generation:
        """An answer that is one of `choices`, before any work; once prefilled, `score` it.

        Raises OptionError for fewer than two choices, equal or empty ones, and as `prepare`.
        """
        tokens = {
            name: [
                self._decoder.tokenize([prompts.Piece(spelling, special=False)])
                for spelling in sorted(_spellings(name))
            ]
            for name in check_choices(choices)
        }
        longest = max(len(spelling) for choice in tokens.values() for spelling in choice)
        options = GenerateOptions(max_tokens=longest)
        generation = self._prepare(turns, options, system, "shorten the choices")
        generation.choices = tokens
        return generation

    def score(self, generation: Generation) -> Answer:
        """The answer of `prepare_choice`, when its prompt has been prefilled."""
        started = time.perf_counter()
        spellings = [spelling for choice in generation.choices.values() for spelling in choice]
        scores = iter(self._decoder.score(generation.sequence, spellings))  # log-probabilities
        together = [
            np.logaddexp.reduce([next(scores) for _ in choice])
            for choice in generation.choices.values()
        ]
        shares = np.exp(np.asarray(together) - np.logaddexp.reduce(together))
        chances = zip(generation.choices, map(float, shares), strict=True)
        likeliest = dict(sorted(chances, key=lambda chance: -chance[1]))
        return generation.chosen(likeliest, time.perf_counter() - started)

    def logits_along(
        self, image: ImageSource | ImageEmbedding, prompt: str, tokens: Sequence[int]
    ) -> Iterator[npt.NDArray[np.float32]]:
        """The logits of an answer's first token, then behind each of `tokens`: float32 [n_vocab].

        So another model's answer can be followed (`Answer.tokens`). What was computed before is not
        used: the same arguments give the same numbers. Raises as `answer`.
        """
        with closing(self.prepare([Turn(prompt, (image,))])) as generation:
            self._encode_waiting(generation)
            yield from self._decoder.logits_along(
                generation.sequence, generation.filled, list(tokens)
            )

    def chat(self, *, system: str | None = None, history: bool | None = None) -> Chat:
        """A conversation about any number of pictures.

        `history` False answers each question on its own; left out, that is so for models that were
        trained on single questions only, as their vision file or prompt variant says.
        """
        if history is None:
            history = self.takes_questions and not self.single_turn
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_encoder(self) -> PictureEncoder:
        if self._encoder is None:
            raise ClosedError("the model was closed; make a new one")
        return self._encoder

    def _tokenize(self, turns: Sequence[Turn], system: str | None) -> list[PromptPart]:
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
        pictures = (PictureSlot(image) for turn in turns for image in turn.images)
        parts: list[PromptPart] = []
        for part in prompts.build_prompt(turns, self._variant, system):
            if part == prompts.IMAGE:
                parts.append(next(pictures))
            elif isinstance(part, prompts.Piece):
                parts.append(self._decoder.tokenize([part], start=not parts))
            else:
                parts.append(list(part))
        return parts

    def _prepare(
        self,
        turns: Sequence[Turn],
        options: GenerateOptions,
        system: str | None,
        advice: str,
        *,
        cut: bool = False,
    ) -> Generation:
        self._decoder.check(options)
        parts = self._tokenize(turns, system)
        n_prompt = sum(map(self._count, parts))
        room, wanted = self.n_ctx - n_prompt, 1 if cut else options.max_tokens or 1
        if room < wanted:
            raise self._overflow(room, wanted, advice)
        return Generation(
            self._decoder,
            parts,
            options,
            n_prompt=n_prompt,
            max_tokens=min(options.max_tokens or DEFAULT_MAX_TOKENS, room),
            load_seconds=self.load_seconds,
            continued=turns[-1].answer is not None,
        )

    def _count(self, part: PromptPart) -> int:
        return self.image_tokens if isinstance(part, PictureSlot) else len(part)

    def _overflow(self, room: int, wanted: int, advice: str) -> ContextOverflowError:
        n_ctx = self.n_ctx
        last = " or raise n_ctx (-c)"
        if n_ctx >= self._decoder.n_ctx_train:
            last = "; the model was trained for no more positions"
        return ContextOverflowError(
            f"the prompt ({n_ctx - room} positions) and an answer of {wanted} or more do not fit "
            f"into the context of {n_ctx}",
            f"shorten the prompt, {advice}{last}",
        )

    def _run(self, generation: Generation) -> Generator[str, None, Answer]:
        with closing(generation):
            self._prefill(generation)
            since = time.perf_counter()
            while True:
                piece = generation.sample(since)
                if piece:
                    yield piece
                if generation.finished:
                    return generation.answer()
                since = time.perf_counter()
                self.decode([generation])

    def _prefill(self, generation: Generation) -> None:
        _ = generation.sequence  # raises BusyError before any work
        self._encode_waiting(generation)
        for _ in self.prefill_steps(generation):
            pass

    def _encode_waiting(self, generation: Generation) -> None:
        for picture in list(generation.waiting):
            generation.put(self.encode(picture))

    def _prefill_steps(self, generation: Generation, most: int | None) -> Iterator[None]:
        """Prefills a prompt. Its first parts, up to the first picture, are kept on disk."""
        decoder, sequence, parts = self._decoder, generation.sequence, generation.filled
        first, rest = parts[: generation.n_first], parts[generation.n_first :]
        text = self.files.text
        digest = None
        if self._hashes is not None and first and not decoder.holds(sequence, first):
            digest = loaded_digest(text, self._loaded[text], self._hashes)
        if digest is None:
            yield from decoder.prefill_steps(sequence, parts, most=most)
            return
        key = cache_key(digest, self.device, cells_of(first))
        state = self._beginnings.get(key)
        if state is not None and decoder.restore(sequence, first, state):
            yield from decoder.prefill_steps(sequence, parts, most=most)
        else:
            yield from decoder.prefill_steps(sequence, first, final=False, most=most)
            self._beginnings.put(key, decoder.state(sequence))
            yield from decoder.prefill_steps(sequence, rest, most=most)


def _as_tuple(image: Images) -> tuple[ImageSource | ImageEmbedding, ...]:
    return tuple(image) if isinstance(image, list | tuple) else (image,)  # type: ignore[return-value]


def check_choices(choices: Sequence[str]) -> list[str]:
    """Without white space around. Raises OptionError as `OmniVLM.prepare_choice`."""
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
