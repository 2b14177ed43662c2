"""OmniVLM for users of llama-cpp-python: a chat handler that gives their `Llama` eyes.

The picture's embedding goes into llama-cpp-python's own context, which then samples the answer: all
parameters of `create_chat_completion` work as it documents them.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import _convert_completion_to_chat

from . import prompt as prompts
from .decoder import Embeddings, Tokens, decode_embeddings, new_grammar, tokenize
from .device import check_precision, check_threads, select_device
from .encoder import PictureEncoder
from .errors import BusyError, ContextOverflowError, OptionError
from .openai_messages import read_conversation, response_grammar
from .sources import read_address
from .values import DEFAULT_MAX_TOKENS, Turn

# llama-cpp-python goes on past max_tokens until a character of up to four tokens is complete.
_SPARE = 3
_IM_START = prompts.Piece("<|im_start|>", special=True)
_HEADER = "assistant\n"  # what stands behind it when a model writes its own turn header


class OmniVLMChatHandler:
    """Lets `llama_cpp.Llama(text_model, chat_handler=OmniVLMChatHandler(mmproj))` see pictures.

    `create_chat_completion` then takes messages with `image_url` parts: `data:` URIs and http(s)
    addresses, never files. A picture is encoded once; of a prompt, only what differs from what is
    in the context already is computed. `max_tokens` None means 512, and no number more than what
    the context has room for; `response_format` takes `json_object` (with or without a schema) and
    `json_schema`; `tools` and `functions` are refused.

    Args:
        mmproj: the vision file.
        variant: prompt variant, for files that name none (see `prompt.VARIANTS`).
        device: for the vision path: `auto`, `cpu`, `cuda`, `metal`, `vulkan` or a name of ggml's.
        n_threads: CPU threads of the vision path; the cores that this process may use when left
            out.
        vision_precision: as OmniVLM's.
        disk_cache: whether encoded pictures are kept on disk for other processes too.
        allow_private_urls: whether pictures are fetched from private addresses too.

    Raises ModelFileError, DeviceError, OptionError. `create_chat_completion` raises OptionError
    (ContextOverflowError when the prompt does not fit), ImageError and ModelFileError (a text model
    of another width) at once; BusyError, while another answer is being generated, and DeviceError
    when a stream's iteration starts.
    """

    def __init__(
        self,
        mmproj: str | os.PathLike[str],
        *,
        variant: str | None = None,
        device: str = "auto",
        n_threads: int | None = None,
        vision_precision: str = "auto",
        disk_cache: bool = True,
        allow_private_urls: bool = False,
    ) -> None:
        self._encoder = PictureEncoder(
            Path(mmproj),
            select_device(device),
            check_threads(n_threads),
            disk_cache=disk_cache,
            precision=check_precision(vision_precision),
        )
        self._variant = self._encoder.prompt_variant(variant)
        self._allow_private_urls = allow_private_urls
        self._answering = threading.Lock()

    def __call__(
        self,
        *,
        llama: llama_cpp.Llama,
        messages: Sequence[Mapping[str, Any]],
        stream: bool = False,
        max_tokens: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        grammar: llama_cpp.LlamaGrammar | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        tools: object = None,
        functions: object = None,
        tool_choice: object = None,  # means nothing without tools
        function_call: object = None,
        **sampling: Any,
    ) -> Any:
        """What `Llama.create_chat_completion` calls: an OpenAI response, or its chunks."""
        if tools or functions:
            raise OptionError("OmniVLM cannot call tools: leave tools and functions out")
        wanted_form = response_grammar(response_format)
        if wanted_form is not None:
            grammar = llama_cpp.LlamaGrammar.from_string(wanted_form, verbose=False)
        if grammar is not None:
            # llama-cpp-python would hand on one that llama.cpp refuses as a null pointer.
            llama_cpp.llama_sampler_free(new_grammar(grammar._grammar, llama._model.vocab))
        system, turns = read_conversation(messages)
        ids, pictures = self._tokenize(llama, system, turns)
        room = llama.n_ctx() - len(ids) - _SPARE
        wanted = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
        settings = {
            **sampling,
            "stream": stream,
            "max_tokens": min(wanted, room) if wanted > 0 else room,
            "grammar": grammar,
            "logprobs": top_logprobs if logprobs else None,
        }
        continued = turns[-1].answer is not None
        completions = self._complete(llama, ids, pictures, settings, continued)
        if stream:
            return _convert_completion_to_chat(completions, stream=True)
        (completion,) = completions
        return _convert_completion_to_chat(completion)

    def _tokenize(
        self, llama: llama_cpp.Llama, system: str | None, turns: Sequence[Turn]
    ) -> tuple[Tokens, list[tuple[int, Embeddings]]]:
        """A conversation's token ids, and its encoded pictures with the position of each."""
        hparams = self._encoder.hparams
        self._encoder.check_text_model(
            llama.model_path, llama_cpp.llama_model_n_embd_inp(llama.model)
        )
        asked = [turn for turn in turns if turn.images or turn.answer is None]
        if prompts.takes_questions(self._variant) and not all(turn.question for turn in asked):
            raise OptionError("a user's message has no text: ask a question about the picture")
        parts = [
            None if part == prompts.IMAGE else tokenize(llama._model.vocab, part, add_bos=i == 0)
            for i, part in enumerate(prompts.build_prompt(turns, self._variant, system))
            if isinstance(part, prompts.Piece)
        ]
        total = sum(hparams.n_tokens if part is None else len(part) for part in parts)
        if total + _SPARE >= llama.n_ctx():
            raise ContextOverflowError(
                f"the prompt ({total} positions) and an answer do not fit into the context of "
                f"{llama.n_ctx()}: shorten the prompt or raise n_ctx"
            )
        urls = (url for turn in turns for url in turn.images)
        ids: Tokens = []
        pictures = []
        for part in parts:
            if part is None:
                picture = read_address(next(urls), allow_private=self._allow_private_urls)
                rows = self._encoder.encode(picture).data
                pictures.append((len(ids), rows))
                part = _row_ids(rows, llama.n_vocab())
            ids += part
        return ids, pictures

    def _complete(
        self,
        llama: llama_cpp.Llama,
        ids: Tokens,
        pictures: Sequence[tuple[int, Embeddings]],
        settings: Mapping[str, Any],
        continued: bool,
    ) -> Iterator[Any]:
        """The text completion as one object, or in chunks."""
        if not self._answering.acquire(blocking=False):
            raise BusyError("another answer is still being generated; finish or close it first")
        try:
            _prefill(llama, ids, pictures)
            completion: Any = llama.create_completion(prompt=list(ids), **settings)
            chunks = completion if settings["stream"] else [completion]
            yield from chunks if continued else _without_header(llama, len(ids), chunks)
        finally:
            self._answering.release()


def _row_ids(rows: Embeddings, n_vocab: int) -> Tokens:
    """Token ids that stand for an embedding in `Llama.input_ids`.

    They come from its hash, so that llama-cpp-python itself, which compares ids to find what it
    may keep, never takes one picture for another; 81 ids out of 151,936 hold more than 256 bits.
    """
    digest = hashlib.shake_256(np.ascontiguousarray(rows).data).digest(8 * len(rows))
    return [int(number) for number in np.frombuffer(digest, "<u8") % n_vocab]


def _prefill(
    llama: llama_cpp.Llama, ids: Tokens, pictures: Sequence[tuple[int, Embeddings]]
) -> None:
    """Brings the context to hold exactly `ids`; what it begins with already stays.

    The last position is always computed: `create_completion` samples from its logits, and leaves
    alone a context that holds its whole prompt.
    """
    kept = llama.input_ids[: llama.n_tokens].tolist()
    common = min(llama.longest_token_prefix(kept, ids), len(ids) - 1)
    for start, rows in pictures:
        if start < common < start + len(rows):
            common = start
    llama.n_tokens = common  # first: Ctrl-C may come in between
    if not llama._ctx.kv_cache_seq_rm(-1, common, -1):
        llama.reset()
    for start, rows in pictures:
        if llama.n_tokens <= start:
            llama.eval(ids[llama.n_tokens : start])
            for row in range(0, len(rows), llama.n_batch):
                chunk, position = rows[row : row + llama.n_batch], start + row
                end = position + len(chunk)
                decode_embeddings(llama.ctx, chunk, position, 0, logits_from=len(chunk))
                llama.input_ids[position:end] = ids[position:end]
                llama.n_tokens = end
    llama.eval(ids[llama.n_tokens :])


def _without_header(llama: llama_cpp.Llama, n_prompt: int, chunks: Iterable[Any]) -> Iterator[Any]:
    """Removes what a model may write before its answer: white space and its own turn header."""
    said = ""
    answering = False
    for chunk in chunks:
        (choice,) = chunk["choices"]
        if not answering:
            said += choice["text"]
            text = said.lstrip()
            if _wrote_im_start(llama, n_prompt):
                text = "" if _HEADER.startswith(text) else text.removeprefix(_HEADER).lstrip()
            if not text and choice["finish_reason"] is None:
                continue
            choice["text"] = text
            answering = True
        yield chunk


def _wrote_im_start(llama: llama_cpp.Llama, n_prompt: int) -> bool:
    """Whether the answer begins with the control token, which has no text, and white space."""
    (im_start,) = tokenize(llama._model.vocab, _IM_START, add_bos=False)
    for token in llama.input_ids[n_prompt : llama.n_tokens].tolist():
        if token == im_start:
            return True
        if llama.detokenize([token]).strip():
            return False
    return False
