"""The one file that knows the order of the stages.

image -> preprocess -> vision encoder -> projector -> text decoder -> text
image.py ------------- vision.py (native/) ---------- prompt.py, decoder.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from types import TracebackType

from . import image as images
from . import prompt as prompts
from .decoder import TextDecoder
from .device import check_threads, select_device
from .errors import ClosedError, ContextOverflowError, ModelFileError, OptionError
from .image import ImageSource
from .models import find_model
from .values import Answer, FinishReason, GenerateOptions, ImageEmbedding, Timings
from .vision import Vision


class OmniVLM:
    """An OmniVLM model, loaded once, that answers questions about pictures.

    Args:
        model: `demo`, a directory with the two files, or the text model's GGUF file.
        mmproj: the vision file; found beside the text model when it is left out.
        variant: prompt variant, for files that name none (see `prompt.VARIANTS`).
        device: `auto`, `cpu`, `cuda`, `metal`, `vulkan` or a device name of ggml.
        n_ctx: positions in the context; at most what the model was trained for.
        n_threads: CPU threads; the cores that this process may use when left out.

    Raises ModelFileError, DeviceError, OptionError. One object generates one answer at a time:
    a second one raises BusyError until the first is finished or its iterator closed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        mmproj: str | os.PathLike[str] | None = None,
        *,
        variant: str | None = None,
        device: str = "auto",
        n_ctx: int = 2048,
        n_threads: int | None = None,
    ) -> None:
        started = time.perf_counter()
        files = find_model(model, mmproj, variant)
        threads = check_threads(n_threads)
        chosen = select_device(device)

        self._vision: Vision | None = Vision(files.mmproj, chosen, threads)
        hparams = self._vision.hparams
        self._variant = prompts.check_variant(
            files.variant
            if files.variant is not None
            else hparams.prompt_variant or prompts.default_variant(hparams.n_merge)
        )
        self._decoder = TextDecoder(files.text, chosen, n_ctx=n_ctx, n_threads=threads)
        if self._decoder.n_embd != hparams.n_embd_text:
            raise ModelFileError(
                f"{files.mmproj}: makes image tokens of {hparams.n_embd_text} values, but "
                f"{files.text} takes {self._decoder.n_embd}: the two files are of different models"
            )
        self.files = files
        self.device = chosen.name
        self.load_seconds = time.perf_counter() - started

    def encode(self, image: ImageSource) -> ImageEmbedding:
        """Encodes a picture once, for any number of questions.

        Raises ImageError (see `image.load_image`), DeviceError, ClosedError.
        """
        vision = self._vision
        if vision is None:
            raise ClosedError("the model was closed; make a new one")
        started = time.perf_counter()
        hparams = vision.hparams
        pixels = images.preprocess(
            images.load_image(image), hparams.image_size, hparams.image_mean, hparams.image_std
        )
        preprocessed = time.perf_counter()
        data = vision.encode(pixels[None])[0]  # [n_tokens, n_embd_text]
        data.flags.writeable = False
        return ImageEmbedding(data, preprocessed - started, time.perf_counter() - preprocessed)

    def generate(
        self,
        image: ImageSource | ImageEmbedding,
        prompt: str,
        options: GenerateOptions | None = None,
    ) -> Generator[str, None, Answer]:
        """Streams the answer's text; the generator's return value is the whole Answer.

        Raises OptionError, ContextOverflowError and ClosedError at once, before any work;
        ImageError, BusyError and DeviceError when the iteration starts.
        """
        options = options or GenerateOptions()
        n_image = self._count_image_tokens(image)
        template = prompts.build_prompt(prompt, self._variant)
        before = self._decoder.tokenize(template.before, start=True)
        after = self._decoder.tokenize(template.after)
        n_prompt = len(before) + n_image + len(after)
        if n_prompt + options.max_tokens > self._decoder.n_ctx:
            n_ctx = self._decoder.n_ctx
            more = ", lower max_tokens (-n) or raise n_ctx (-c)"
            if n_ctx >= self._decoder.n_ctx_train:
                more = " or lower max_tokens (-n); the model was trained for no more positions"
            raise ContextOverflowError(
                f"the prompt ({n_prompt} positions) and up to {options.max_tokens} new tokens do "
                f"not fit into the context of {n_ctx}: shorten the prompt{more}"
            )
        return self._generate(image, before, after, options)

    def answer(
        self,
        image: ImageSource | ImageEmbedding,
        prompt: str,
        options: GenerateOptions | None = None,
    ) -> Answer:
        """Generates a whole answer; arguments and errors as for `generate`."""
        stream = self.generate(image, prompt, options)
        while True:
            try:
                next(stream)
            except StopIteration as finished:
                answer: Answer = finished.value
                return answer

    def close(self) -> None:
        """Frees both models. May be called again; later use raises ClosedError."""
        self._vision = None
        self._decoder.close()

    def __enter__(self) -> OmniVLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _count_image_tokens(self, image: ImageSource | ImageEmbedding) -> int:
        vision = self._vision
        if vision is None:
            raise ClosedError("the model was closed; make a new one")
        if isinstance(image, ImageEmbedding):
            wanted = (vision.hparams.n_tokens, vision.hparams.n_embd_text)
            if image.data.shape != wanted:
                raise OptionError(
                    f"the image embedding has the shape {list(image.data.shape)} instead of "
                    f"{list(wanted)}: it was encoded by another model; encode it with this one"
                )
        return vision.hparams.n_tokens

    def _generate(
        self,
        image: ImageSource | ImageEmbedding,
        before: list[int],
        after: list[int],
        options: GenerateOptions,
    ) -> Generator[str, None, Answer]:
        decoder = self._decoder
        sequence = decoder.open(options)
        try:
            embedding = image if isinstance(image, ImageEmbedding) else self.encode(image)
            started = time.perf_counter()
            decoder.prefill(sequence, [before, embedding.data, after])
            prefill_seconds = time.perf_counter() - started

            text = ""
            count = 0
            decode_seconds = 0.0
            finish_reason: FinishReason = "length"
            header = _HeaderFilter(decoder.special_token("<|im_start|>"))
            while count < options.max_tokens:
                started = time.perf_counter()
                if count > 0:
                    decoder.decode([sequence])
                token = decoder.sample(sequence)
                piece = "" if sequence.at_end else header.feed(token, decoder.text(sequence))
                decode_seconds += time.perf_counter() - started
                if sequence.at_end:
                    finish_reason = "stop"
                    break
                count += 1
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
                prompt_tokens=len(before) + len(embedding.data) + len(after),
                image_tokens=len(embedding.data),
                completion_tokens=count,
                timings=Timings(
                    load=self.load_seconds,
                    preprocess=embedding.preprocess_seconds,
                    encode=embedding.encode_seconds,
                    prefill=prefill_seconds,
                    decode=decode_seconds,
                ),
            )
        finally:
            decoder.close_sequence(sequence)


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
