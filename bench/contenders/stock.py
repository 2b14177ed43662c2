"""llama.cpp as it is: mtmd for pictures, F16 and flash attention, through llama-cpp-python."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGUFReader
from llama_cpp import mtmd_cpp as mtmd

from .base import (
    AFTER_PICTURE,
    BEFORE_PICTURE,
    MAX_TOKENS,
    Files,
    Pixels,
    Question,
    Timed,
    Tokens,
    is_current,
)
from .idefics3 import write_idefics3
from .process import read_picture

LIBRARIES = ("llama-cpp-python",)
CONTEXT = 2048  # positions


def prepare(files: Files, *, text: str | None = None) -> None:
    """Writes the vision file, and quantizes the text model with llama.cpp's own quantizer."""
    if not is_current(_vision_file(files), files.mmproj):
        write_idefics3(files.mmproj, _vision_file(files))
    if text == "q4_k_m" and not is_current(_text_file(files, text), files.text):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
        source, output = (str(path).encode() for path in (files.text, _text_file(files, text)))
        _check(
            llama_cpp.llama_model_quantize(source, output, ctypes.byref(params)) == 0, "quantize"
        )


def load(files: Files, threads: int, *, text: str | None = None) -> StockEncoder | StockAnswerer:
    """An encoder; an answerer where the text model's type is given."""
    if text is None:
        return StockEncoder(_vision_file(files), _load_text(files.text, vocab_only=True), threads)
    model = _load_text(_text_file(files, text))
    return StockAnswerer(StockEncoder(_vision_file(files), model, threads), model, threads)


class StockEncoder:
    """The vision path; of the text model only the vocabulary is used."""

    def __init__(self, mmproj: Path, text_model: Any, threads: int) -> None:
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = False
        params.n_threads = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.warmup = False
        self.context = mtmd.mtmd_init_from_file(str(mmproj).encode(), text_model, params)
        _check(self.context is not None, "mtmd_init_from_file")
        fields = GGUFReader(mmproj).fields
        self._width = int(fields["clip.vision.projection_dim"].contents())
        self.side = int(fields["clip.vision.image_size"].contents())

    def convert(self, pixels: Pixels) -> list[tuple[Any, Any]]:
        return [self.chunk(picture) for picture in pixels]

    def encode(self, converted: Sequence[tuple[Any, Any]]) -> Tokens:
        return np.stack([self._encode(chunk) for _, chunk in converted])

    def chunk(self, picture: Pixels) -> tuple[Any, Any]:
        """A picture as mtmd takes it, without the slices that it also makes; and their owner."""
        side = len(picture)
        data = np.ascontiguousarray(picture).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(side, side, data)
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        done = mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(text), bitmaps, 1)
        mtmd.mtmd_bitmap_free(bitmap)
        _check(done == 0, "mtmd_tokenize")
        for index in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                return chunks, chunk
        raise RuntimeError("mtmd_tokenize made no image tokens")

    def _encode(self, chunk: Any) -> Tokens:
        """float32 [n_tokens, width of the text model]."""
        _check(mtmd.mtmd_encode_chunk(self.context, chunk) == 0, "mtmd_encode_chunk")
        shape = mtmd.mtmd_input_chunk_get_n_tokens(chunk), self._width
        return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.context), shape).copy()


class StockAnswerer:
    """Both models, and greedy answers."""

    def __init__(self, encoder: StockEncoder, model: Any, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._encoder, self._vocabulary = encoder, llama_cpp.llama_model_get_vocab(model)
        self._context = llama_cpp.llama_init_from_model(model, params)
        _check(self._context is not None, "llama_init_from_model")
        self._greedy = llama_cpp.llama_sampler_init_greedy()

    def answer(self, question: Question) -> Timed:
        started = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        pixels = read_picture(question.picture, self._encoder.side)
        chunks, chunk = self._encoder.chunk(pixels)
        preprocessed = time.perf_counter()
        _check(mtmd.mtmd_encode_chunk(self._encoder.context, chunk) == 0, "mtmd_encode_chunk")
        encoded = time.perf_counter()
        position = self._prefill(question, chunk)
        prefilled = time.perf_counter()
        tokens = [self._sample()]
        first = time.perf_counter()
        while len(tokens) < MAX_TOKENS:
            self._decode(tokens[-1:])
            tokens.append(self._sample())
        ended = time.perf_counter()
        mtmd.mtmd_input_chunks_free(chunks)
        return Timed(
            preprocess=preprocessed - started,
            encode=encoded - preprocessed,
            prefill=prefilled - encoded,
            first_token=first - started,
            decode=(ended - first) / (MAX_TOKENS - 1),
            prompt_tokens=position,
            answer_tokens=len(tokens),
        )

    def _prefill(self, question: Question, chunk: Any) -> int:
        """The prompt with the picture that was encoded last; its length in positions."""
        before = self._tokenize(BEFORE_PICTURE.format(system=question.system))
        after = self._tokenize(AFTER_PICTURE.format(question=question.question))
        self._decode(before)
        position = llama_cpp.llama_pos(0)
        done = mtmd.mtmd_helper_decode_image_chunk(
            self._encoder.context,
            self._context,
            chunk,
            mtmd.mtmd_get_output_embd(self._encoder.context),
            len(before),
            0,
            CONTEXT,
            ctypes.byref(position),
            mtmd.mtmd_helper_post_decode_callback(),
            None,
        )
        _check(done == 0, "mtmd_helper_decode_image_chunk")
        self._decode(after)
        return position.value + len(after)

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode()
        tokens = (llama_cpp.llama_token * len(data))()
        count = llama_cpp.llama_tokenize(
            self._vocabulary, data, len(data), tokens, len(data), False, True
        )
        _check(count > 0, "llama_tokenize")
        return tokens[:count]

    def _decode(self, tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        _check(llama_cpp.llama_decode(self._context, batch) == 0, "llama_decode")

    def _sample(self) -> int:
        token: int = llama_cpp.llama_sampler_sample(self._greedy, self._context, -1)
        return token


def _load_text(path: Path, vocab_only: bool = False) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only = vocab_only
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    _check(model is not None, "llama_model_load_from_file")
    return model


def _vision_file(files: Files) -> Path:
    return files.scratch / "mmproj-idefics3-F16.gguf"


def _text_file(files: Files, kind: str) -> Path:
    return files.text if kind == "f16" else files.scratch / "llama.cpp-Q4_K_M.gguf"


def _check(done: bool, what: str) -> None:
    if not done:
        raise RuntimeError(f"{what} failed")
