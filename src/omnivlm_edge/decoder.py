"""Stage 4: tokens and image embeddings -> sampled tokens, on llama.cpp.

One context holds several sequences; `decode` advances any number of them in one step. A sequence
that begins as another one, open or closed, shares what that one left in the context.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import re
import sys
import threading
import weakref
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import llama_cpp
import numpy as np
import numpy.typing as npt

from ._native import (
    Device,
    ImportanceCollector,
    TextFile,
    importance_callback_address,
    inspect_text_file,
    install_text_kernels,
    log_sink_address,
    release_mappings,
    take_log_error,
)
from .errors import (
    BusyError,
    ClosedError,
    ContextOverflowError,
    DeviceError,
    ModelFileError,
    OptionError,
)
from .prompt import Piece
from .values import GenerateOptions

Tokens: TypeAlias = "list[int]"
Embeddings: TypeAlias = "npt.NDArray[np.float32]"  # [n_positions, n_embd]
# What stands at a position of the context: a token, or a row of the embeddings with some hash.
Cell: TypeAlias = Hashable

_MIN_BATCH, _MAX_BATCH = 256, 2048  # positions handed to llama.cpp at once
# Of them computed at once on a CPU: 512, llama.cpp's default, are no quicker there and take 38 MB
# more for a prompt of 1,500. Fewer would be a second pass over the weights for two pictures.
_CPU_BATCH = 256
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ in llama.cpp
_MAX_GRAMMAR_DEPTH, _MAX_GRAMMAR_RULES = 200, 5000
_MAX_REASON = 100  # characters of what llama.cpp says of a grammar
_ALL_LAYERS = 999  # more than any model has
_FORCED_BATCH = 32  # tokens whose logits are kept at once: 0.6 MB each for 151,936 of them
_REPEAT_WINDOW = 64  # tokens that repeat_penalty looks back on; llama.cpp's default


class TokenSequence:
    """One conversation's place in the context. Made by `TextDecoder.open`, given back by `close`.

    `position` counts the positions in the context, `n_cached` those of them that were found there
    when it began; `last_token` is the newest sampled token (not yet in the context), `at_end` is
    true once that token ends the generation. Its logits live until the decoder's next `prefill` or
    `decode`: sample before.
    """

    def __init__(self, seq_id: int, options: GenerateOptions, sampler: Any, grammar: Any) -> None:
        self.seq_id = seq_id
        self.position = 0
        self.n_cached = 0
        self.last_token = -1
        self.at_end = False
        self._greedy = options.temperature == 0 and not _changes_logits(options)
        self._sampler = sampler
        self._grammar = grammar
        self._output_index = -1
        self._step = -1  # the decoder's step that computed the logits
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")


class TextDecoder:
    """A text model with one context. Safe to call from several threads; calls are serialised.

    `n_ctx` counts the context's positions, which all sequences share: what was asked for, at most
    what each may use (`n_ctx_train`: the model was trained on no more) for all `n_sequences`.
    `n_embd` is the width of one position's embedding. With `low_memory` no
    rearranged copies of the weights are made: slower, and half the memory. A `collector`, if any,
    is shown every matrix product, and every prompt is computed in full.

    Raises ModelFileError when the file cannot be loaded, DeviceError when memory runs out.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        *,
        n_ctx: int,
        n_threads: int,
        n_gpu_layers: int | None = None,
        n_sequences: int = 1,
        low_memory: bool = False,
        collector: ImportanceCollector | None = None,
    ) -> None:
        _initialise_backend()
        if not 1 <= n_sequences <= _MAX_SEQUENCES:
            raise OptionError(f"n_sequences is {n_sequences}: it must be 1 to {_MAX_SEQUENCES}")
        if n_ctx < 1:
            raise OptionError(f"n_ctx is {n_ctx}: it must be at least 1")
        # Reentrant: the garbage collector may close an abandoned sequence inside any of the calls.
        self._lock = threading.RLock()
        self._path = os.fsencode(path)
        self._step = 0  # counts the calls that overwrite the logits
        self._file = inspect_text_file(self._path)
        self._model = _load_model(path, self._file, device, n_gpu_layers, low_memory)
        # llama.cpp's objects are freed in this order, once, by close() or with this object.
        self._owned: list[Any] = [functools.partial(llama_cpp.llama_model_free, self._model)]
        self._finalizer = weakref.finalize(self, _free_all, self._owned)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._logits_type = ctypes.c_float * self._n_vocab
        self.n_ctx_train: int = llama_cpp.llama_model_n_ctx_train(self._model)
        most = n_sequences * self.n_ctx_train
        self._context = _new_context(
            self._model, device, min(n_ctx, most), n_threads, n_sequences, collector
        )
        self._collector = collector  # the context holds its address
        self._owned.insert(0, functools.partial(llama_cpp.llama_free, self._context))
        self.n_ctx: int = llama_cpp.llama_n_ctx(self._context)
        #: Positions that one sequence may take.
        self.n_ctx_sequence: int = min(self.n_ctx, self.n_ctx_train)
        # Others keep a state that cannot be cut to a beginning.
        self._shares = not (
            llama_cpp.llama_model_is_recurrent(self._model)
            or llama_cpp.llama_model_is_hybrid(self._model)
        )
        self.n_embd: int = llama_cpp.llama_model_n_embd_inp(self._model)
        self._n_batch = llama_cpp.llama_n_batch(self._context)
        self._batch = llama_cpp.llama_batch_init(self._n_batch, 0, 1)
        self._owned.insert(0, functools.partial(llama_cpp.llama_batch_free, self._batch))
        self._free_ids = list(range(n_sequences))  # the one that was closed first comes first
        self._idle_ids = list(range(n_sequences))  # those, and the opened ones not yet begun
        self._cells: list[list[Cell]] = [[] for _ in range(n_sequences)]  # the context, by seq_id
        self._piece_buffer = ctypes.create_string_buffer(256)

    def tokenize(self, pieces: Sequence[Piece], *, start: bool = False) -> Tokens:
        """Pieces of a prompt -> token ids.

        Only pieces marked special may become control tokens; plain text that looks like one stays
        text. `start` adds the beginning-of-sequence token for models that want it.
        """
        tokens: Tokens = []
        with self._lock:
            self._open_context()
            for piece in pieces:
                tokens += tokenize(self._vocab, piece, add_bos=start and not tokens)
        return tokens

    def special_token(self, text: str) -> int:
        """The id of a control token. Raises ModelFileError when the vocabulary has none."""
        return self.tokenize([Piece(text, special=True)])[0]

    def open(self, options: GenerateOptions) -> TokenSequence:
        """Claims a sequence of the context.

        Raises BusyError when all are taken, OptionError when the grammar cannot be used.
        """
        with self._lock:
            self._open_context()
            if not self._free_ids:
                raise BusyError("another answer is still being generated; finish or close it first")
            grammar = None
            if options.grammar is not None:
                grammar = new_grammar(options.grammar, self._vocab)
            sampler = _new_sampler(options, self._n_vocab, self.n_ctx)
            return TokenSequence(self._free_ids.pop(0), options, sampler, grammar)

    def check(self, options: GenerateOptions) -> None:
        """Raises OptionError when `open` could not use the grammar, or a token is none."""
        with self._lock:
            self._open_context()
            if options.grammar is not None:
                llama_cpp.llama_sampler_free(new_grammar(options.grammar, self._vocab))
        for token, _ in options.logit_bias:
            if token >= self._n_vocab:
                raise OptionError(
                    f"logit_bias names the token {token}: the model has {self._n_vocab}"
                )

    def close_sequence(self, sequence: TokenSequence) -> None:
        """Gives a sequence back; harmless after `close`. Its positions stay for the next one."""
        with self._lock:
            if sequence.seq_id < 0:
                return
            llama_cpp.llama_sampler_free(sequence._sampler)
            if sequence._grammar:
                llama_cpp.llama_sampler_free(sequence._grammar)
            if self._finalizer.alive:
                self._free_ids.append(sequence.seq_id)
                if sequence.seq_id not in self._idle_ids:
                    self._idle_ids.append(sequence.seq_id)
            sequence.seq_id = -1

    def prefill(
        self, sequence: TokenSequence, parts: Sequence[Tokens | Embeddings], *, final: bool = True
    ) -> None:
        """Appends tokens and embeddings to a sequence; logits are kept for the last position only.

        With `final` false there will be more to append, and no logits are computed.

        The first prefill of a sequence computes only what does not stand in the context already:
        the longest common beginning is used, whichever conversation put it there.

        Raises ContextOverflowError before any work when the parts do not fit, OptionError when
        there is nothing to append or an embedding is not as wide as the model.
        """
        for _ in self.prefill_steps(sequence, parts, final=final):
            pass

    def prefill_steps(
        self,
        sequence: TokenSequence,
        parts: Sequence[Tokens | Embeddings],
        *,
        final: bool = True,
        most: int | None = None,
    ) -> Iterator[None]:
        """As `prefill`, but in steps of `most` positions; others may decode between them."""
        total = sum(len(part) for part in parts)
        if total == 0:
            raise OptionError("there is nothing to prefill")
        if sequence.position + total > self.n_ctx_sequence:
            raise ContextOverflowError(
                f"{sequence.position + total} positions do not fit into the context of "
                f"{self.n_ctx_sequence}"
            )
        for part in parts:
            if not isinstance(part, list) and part.shape != (len(part), self.n_embd):
                raise OptionError(
                    f"embeddings of shape {list(part.shape)} do not fit a text model of width "
                    f"{self.n_embd}: they were encoded by another model"
                )
        cells = cells_of(parts)
        with self._lock:
            self._open_context()
            _check_open(sequence)
            if sequence.position == 0:
                known = cells if self._collector is None else []
                sequence.n_cached = self._share_beginning(sequence.seq_id, known)
                sequence.position = sequence.n_cached
                parts, cells = _skip(parts, sequence.n_cached), cells[sequence.n_cached :]
        for chunk in self._chunks(parts, min(self._n_batch, most or self._n_batch)):
            with self._lock:
                self._open_context()
                _check_open(sequence)
                self._make_room(len(chunk))
                last = len(chunk) - 1 if final and len(chunk) == len(cells) else len(chunk)
                self._append(sequence, chunk, cells[: len(chunk)], logits_from=last)
            cells = cells[len(chunk) :]
            yield

    def forget(self) -> None:
        """Forgets what closed sequences left in the context."""
        with self._lock:
            self._open_context()
            for seq_id in self._free_ids:
                self._forget(seq_id, 0)

    def release_pages(self) -> None:
        """Gives the memory behind mapped weights back to the system until they are used again."""
        _release(self._path)

    def holds(self, sequence: TokenSequence, parts: Sequence[Tokens | Embeddings]) -> bool:
        """Whether a new sequence finds all these parts in the context."""
        cells = cells_of(parts)
        with self._lock:
            _check_open(sequence)
            return self._longest_beginning(sequence.seq_id, cells)[0] == len(cells)

    def state(self, sequence: TokenSequence) -> bytes:
        """Keys and values of all positions of a sequence, in llama.cpp's format."""
        with self._lock:
            context = self._open_context()
            _check_open(sequence)
            size = llama_cpp.llama_state_seq_get_size(context, sequence.seq_id)
            buffer = (ctypes.c_uint8 * size)()
            written = llama_cpp.llama_state_seq_get_data(context, buffer, size, sequence.seq_id)
            return bytes(buffer)[:written]

    def restore(
        self, sequence: TokenSequence, parts: Sequence[Tokens | Embeddings], state: bytes
    ) -> bool:
        """Puts back what `state` gave after a prefill of the same parts by the same model.

        False, and nothing in the place of the sequence, when llama.cpp cannot use it here.
        """
        with self._lock:
            context = self._open_context()
            _check_open(sequence)
            self._begin(sequence.seq_id)
            self._forget(sequence.seq_id, 0)
            cells = cells_of(parts)
            self._make_room(len(cells))
            buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
            read = llama_cpp.llama_state_seq_set_data(context, buffer, len(state), sequence.seq_id)
            if read == len(state) > 0:
                self._cells[sequence.seq_id] = cells
                return True
            self._forget(sequence.seq_id, 0)
            return False

    def score(self, sequence: TokenSequence, continuations: Sequence[Tokens]) -> list[float]:
        """The log-probability of each continuation of a sequence, which itself stays as it is.

        Its logits are used up: nothing can be sampled from it before the next prefill or decode.
        Raises OptionError for a continuation longer than llama.cpp takes at once.
        """
        if max(map(len, continuations)) > self._n_batch:
            raise OptionError(f"a choice has more than {self._n_batch} tokens: shorten it")
        with self._lock:
            first = log_softmax(self.logits(sequence))
            start = sequence.position
            scores = []
            for tokens in continuations:
                score = float(first[tokens[0]])
                if len(tokens) > 1:
                    self._make_room(len(tokens) - 1)
                    self._append(sequence, tokens[:-1], tokens[:-1], logits_from=0)
                    for i, token in enumerate(tokens[1:]):
                        score += float(log_softmax(self._logits_at(i))[token])
                    sequence.position = start
                    if not self._forget(sequence.seq_id, start):
                        raise OptionError("this model cannot score choices of several tokens")
                scores.append(score)
            sequence._step = -1
            return scores

    def logits_along(
        self, sequence: TokenSequence, parts: Sequence[Tokens | Embeddings], tokens: Tokens
    ) -> Iterator[npt.NDArray[np.float32]]:
        """The logits behind a prompt, and behind each of the tokens that follow it: [n_vocab] each.

        `sequence` is a new one. Nothing of an earlier one is used, because what is computed in
        other batches differs in the last digits: the same call gives the same numbers.
        """
        with self._lock:
            self._open_context()
            _check_open(sequence)
            self._forget(sequence.seq_id, 0)
            self.prefill(sequence, parts)
            logits = [self.logits(sequence)]
        for start in range(0, len(tokens), _FORCED_BATCH):
            yield from logits
            chunk = tokens[start : start + _FORCED_BATCH]
            with self._lock:
                self._open_context()
                _check_open(sequence)
                self._make_room(len(chunk))
                self._append(sequence, chunk, chunk, logits_from=0)
                logits = [self._logits_at(i).copy() for i in range(len(chunk))]
        yield from logits

    def decode(self, sequences: Sequence[TokenSequence]) -> None:
        """One step: appends the last sampled token of every sequence, all in one batch."""
        with self._lock:
            context = self._open_context()
            batch = self._batch
            for sequence in sequences:
                _check_open(sequence)
            self._make_room(len(sequences))
            batch.n_tokens = len(sequences)
            self._step += 1
            for i, sequence in enumerate(sequences):
                batch.token[i] = sequence.last_token
                _set_position(batch, i, sequence.seq_id, sequence.position, with_logits=True)
            _check_decode(llama_cpp.llama_decode(context, batch))
            for i, sequence in enumerate(sequences):
                self._cells[sequence.seq_id].append(sequence.last_token)
                sequence.position += 1
                sequence._output_index, sequence._step = i, self._step

    def sample(self, sequence: TokenSequence) -> int:
        """Samples the next token from the sequence's newest logits and remembers it.

        Raises OptionError when the grammar admits none of the vocabulary's tokens.
        """
        with self._lock:
            context = self._open_context()
            index = self._output_of(sequence)
            if sequence._grammar:
                token = self._sample_constrained(sequence)
            elif sequence._greedy:
                # The first of the largest, as the sampler; which copies the whole vocabulary first
                # (measured: 157 us for 151,936 tokens instead of 13).
                token = int(self._logits_at(index).argmax())
            else:
                token = int(llama_cpp.llama_sampler_sample(sequence._sampler, context, index))
            sequence.last_token = token
            sequence.at_end = bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))
            return token

    def text(self, sequence: TokenSequence, *, final: bool = False) -> str:
        """What the last sampled token adds to the text.

        Bytes of a character that is not complete yet are held back until it is; with `final` no
        token is added and what is left comes out as U+FFFD. Control tokens have no text.
        """
        if final:
            return sequence._utf8.decode(b"", final=True)
        with self._lock:
            self._open_context()
            return sequence._utf8.decode(self._piece(sequence.last_token))

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, maybe a part of a character; a control token for nothing."""
        with self._lock:
            self._open_context()
            return self._piece(token)

    def logits(self, sequence: TokenSequence) -> npt.NDArray[np.float32]:
        """A copy of the newest logits of a sequence, float32 [n_vocab]."""
        with self._lock:
            self._open_context()
            return self._logits_at(self._output_of(sequence)).copy()

    def close(self) -> None:
        """Frees the model and its context. Waits for a running step; may be called again."""
        with self._lock:
            self._finalizer()

    def _open_context(self) -> Any:
        if not self._finalizer.alive:
            raise ClosedError("the model was closed; make a new one")
        return self._context

    def _output_of(self, sequence: TokenSequence) -> int:
        """Where in the last batch the sequence's logits stand."""
        _check_open(sequence)
        if sequence._step != self._step:
            raise BusyError("the sequence's logits were overwritten: sample before the next step")
        return sequence._output_index

    def _logits_at(self, output: int) -> npt.NDArray[np.float32]:
        """The logits themselves, float32 [n_vocab], until the next step."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, output)
        logits = self._logits_type.from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(logits, np.float32)

    def _sample_constrained(self, sequence: TokenSequence) -> int:
        """The grammar looks at the one token that the sampler likes; at all only if it must.

        (A grammar takes milliseconds for a whole vocabulary; most first choices are right.)
        """
        logits = self._logits_at(self._output_of(sequence))
        candidates = np.zeros(self._n_vocab, _CANDIDATE)
        candidates["id"] = np.arange(self._n_vocab)
        candidates["logit"] = logits
        token = _select(sequence._sampler, candidates)
        if not _admits(sequence._grammar, token):
            candidates["id"] = np.arange(self._n_vocab)  # the samplers sort in place
            candidates["logit"] = logits
            _apply(sequence._grammar, candidates)
            if not np.isfinite(candidates["logit"]).any():
                raise OptionError(
                    "the grammar cannot be followed: none of the model's tokens fits it here"
                )
            token = _select(sequence._sampler, candidates)
        llama_cpp.llama_sampler_accept(sequence._grammar, token)
        llama_cpp.llama_sampler_accept(sequence._sampler, token)
        return token

    def _share_beginning(self, seq_id: int, cells: Sequence[Cell]) -> int:
        """Gives a new sequence what stands in the context of `cells`: so many positions.

        What else stood in its own place goes. The last of `cells` is always computed.
        """
        self._begin(seq_id)
        common, source = self._longest_beginning(seq_id, cells[:-1])
        if source == seq_id or common == 0:
            return common if self._forget(seq_id, common) else 0
        self._forget(seq_id, 0)
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_seq_cp(memory, source, seq_id, 0, common)
        self._cells[seq_id] = self._cells[source][:common]
        return common

    def _longest_beginning(self, seq_id: int, cells: Sequence[Cell]) -> tuple[int, int]:
        """How many of `cells` some sequence begins with, and which; its own place before others."""
        ids = range(len(self._cells)) if self._shares else [seq_id]
        lengths = {i: _common_length(self._cells[i], cells) for i in ids}
        longest = max(lengths.values())
        return longest, seq_id if lengths[seq_id] == longest else max(
            lengths, key=lengths.__getitem__
        )

    def _forget(self, seq_id: int, start: int) -> bool:
        """Removes positions from `start` on; all of them where the model can only do that."""
        memory = llama_cpp.llama_get_memory(self._context)
        del self._cells[seq_id][start:]  # first: Ctrl-C may come in between
        partly = bool(llama_cpp.llama_memory_seq_rm(memory, seq_id, start, -1))
        if not partly:
            self._cells[seq_id].clear()
            llama_cpp.llama_memory_seq_rm(memory, seq_id, -1, -1)
        return partly

    def _begin(self, seq_id: int) -> None:
        """What is in the place of a sequence is its own from now on."""
        if seq_id in self._idle_ids:
            self._idle_ids.remove(seq_id)

    def _make_room(self, n_positions: int) -> None:
        """Gives up what closed sequences left, the oldest first, when open ones need the place.

        Positions that sequences share count for each of them: rather too much is given up.
        """
        for seq_id in self._idle_ids:
            if sum(map(len, self._cells)) + n_positions <= self.n_ctx:
                break
            self._forget(seq_id, 0)

    def _piece(self, token: int) -> bytes:
        buffer = self._piece_buffer
        size = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        if size < 0:
            self._piece_buffer = ctypes.create_string_buffer(-size)
            return self._piece(token)
        return buffer.raw[:size]

    def _chunks(
        self, parts: Sequence[Tokens | Embeddings], most: int
    ) -> Iterator[Tokens | Embeddings]:
        """The parts in as few batches as `most` allows, each of tokens alone or embeddings alone.

        Every batch reads all the weights once more, so tokens between pictures become embeddings.
        """
        runs = _joined(parts)
        if len(runs) > 1 and self._file.n_embd == self.n_embd:
            runs = [np.concatenate([self._embed(run) for run in runs])]
        for run in runs:
            for start in range(0, len(run), most):
                yield run[start : start + most]

    def _embed(self, run: Tokens | Embeddings) -> Embeddings:
        if isinstance(run, list):
            return self._file.embed(np.asarray(run, dtype=np.int32))
        return run

    def _append(
        self,
        sequence: TokenSequence,
        chunk: Tokens | Embeddings,
        cells: Sequence[Cell],
        *,
        logits_from: int,
    ) -> None:
        self._step += 1
        if isinstance(chunk, list):
            batch = self._batch
            batch.n_tokens = len(chunk)
            data = np.asarray(chunk, dtype=np.int32)
            ctypes.memmove(batch.token, data.ctypes.data, data.nbytes)
            for i in range(len(chunk)):
                position = sequence.position + i
                _set_position(batch, i, sequence.seq_id, position, with_logits=i >= logits_from)
            _check_decode(llama_cpp.llama_decode(self._context, batch))
        else:
            decode_embeddings(
                self._context, chunk, sequence.position, sequence.seq_id, logits_from=logits_from
            )
        self._cells[sequence.seq_id] += cells
        sequence.position += len(chunk)
        if logits_from < len(chunk):
            sequence._output_index, sequence._step = len(chunk) - 1, self._step


def tokenize(vocab: Any, piece: Piece, *, add_bos: bool) -> Tokens:
    """One piece of a prompt -> token ids; see `TextDecoder.tokenize`.

    `vocab` is llama.cpp's. Raises OptionError for text that is not UTF-8, ModelFileError when the
    vocabulary lacks a control token.
    """
    try:
        text = piece.text.encode()
    except UnicodeEncodeError as exc:
        raise OptionError("the prompt is not valid text: it must be UTF-8") from exc
    capacity = len(text) + 2  # a token is at least one byte; BOS and EOS at most
    buffer = (llama_cpp.llama_token * capacity)()
    count = llama_cpp.llama_tokenize(
        vocab, text, len(text), buffer, capacity, add_bos, piece.special
    )
    n_bos = add_bos and bool(llama_cpp.llama_vocab_get_add_bos(vocab))
    if piece.special and count != 1 + n_bos:
        raise ModelFileError(
            f"the text model's vocabulary has no token {piece.text}: "
            "it does not belong to an OmniVLM model with this prompt variant"
        )
    return list(buffer[:count])


def cells_of(parts: Sequence[Tokens | Embeddings]) -> list[Cell]:
    """What the parts put into the context, position by position."""
    cells: list[Cell] = []
    for part in parts:
        if isinstance(part, list):
            cells += part
        else:
            digest = hashlib.sha256(np.ascontiguousarray(part).data).hexdigest()
            cells += [(digest, row) for row in range(len(part))]
    return cells


def _common_length(left: Sequence[Cell], right: Sequence[Cell]) -> int:
    """How many cells both begin with."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _joined(parts: Sequence[Tokens | Embeddings]) -> list[Tokens | Embeddings]:
    """The parts, with neighbours of one kind made one."""
    runs: list[Tokens | Embeddings] = []
    filled = (part for part in parts if len(part))
    for is_tokens, group in itertools.groupby(filled, lambda part: isinstance(part, list)):
        run = list(group)
        runs.append(list(itertools.chain(*run)) if is_tokens else np.concatenate(run))
    return runs


def _skip(parts: Sequence[Tokens | Embeddings], n: int) -> list[Tokens | Embeddings]:
    """The parts without their first n positions."""
    rest: list[Tokens | Embeddings] = []
    for part in parts:
        rest.append(part[n:])
        n = max(0, n - len(part))
    return rest


def system_info() -> str:
    """What the backends of this build were compiled with: `CPU : AVX2 = 1 | F16C = 1 | …`."""
    _initialise_backend()
    info: bytes = llama_cpp.llama_print_system_info()
    return info.decode().strip(" |")


def _check_open(sequence: TokenSequence) -> None:
    if sequence.seq_id < 0:
        raise ClosedError("the sequence was closed; open a new one")


def decode_embeddings(
    context: Any, rows: Embeddings, start: int, seq_id: int, *, logits_from: int
) -> None:
    """Puts embeddings into a llama.cpp context, in one batch, at the positions from `start` on.

    Raises ContextOverflowError when they do not fit, DeviceError when llama.cpp fails.
    """
    batch = llama_cpp.llama_batch_init(len(rows), rows.shape[1], 1)
    try:
        batch.n_tokens = len(rows)
        data = np.ascontiguousarray(rows, dtype=np.float32)
        ctypes.memmove(batch.embd, data.ctypes.data, data.nbytes)
        for i in range(len(rows)):
            _set_position(batch, i, seq_id, start + i, with_logits=i >= logits_from)
        _check_decode(llama_cpp.llama_decode(context, batch))
    finally:
        llama_cpp.llama_batch_free(batch)


def _set_position(batch: Any, i: int, seq_id: int, position: int, *, with_logits: bool) -> None:
    batch.pos[i] = position
    batch.n_seq_id[i] = 1
    batch.seq_id[i][0] = seq_id
    batch.logits[i] = with_logits


def _check_decode(status: int) -> None:
    if status == 1:
        raise ContextOverflowError("the context is full", "close other answers or raise n_ctx")
    if status != 0:
        raise DeviceError(f"llama.cpp failed while it computed the answer (status {status})")


def _changes_logits(options: GenerateOptions) -> bool:
    penalties = options.frequency_penalty or options.presence_penalty
    return bool(options.repeat_penalty != 1 or penalties or options.logit_bias)


def _new_sampler(options: GenerateOptions, n_vocab: int, n_ctx: int) -> Any:
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())

    def add(sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(chain, sampler)

    if options.logit_bias:
        biases = (llama_cpp.llama_logit_bias * len(options.logit_bias))(*options.logit_bias)
        add(llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
    if options.repeat_penalty != 1.0:
        penalty = options.repeat_penalty
        add(llama_cpp.llama_sampler_init_penalties(n_vocab, _REPEAT_WINDOW, penalty, 0.0, 0.0))
    frequency, presence = options.frequency_penalty, options.presence_penalty
    if frequency or presence:  # of the whole answer, as OpenAI's
        add(llama_cpp.llama_sampler_init_penalties(n_vocab, n_ctx, 1.0, frequency, presence))
    if options.temperature == 0:
        add(llama_cpp.llama_sampler_init_greedy())
        return chain
    seed = llama_cpp.LLAMA_DEFAULT_SEED if options.seed is None else options.seed
    add(llama_cpp.llama_sampler_init_top_k(options.top_k))
    add(llama_cpp.llama_sampler_init_top_p(options.top_p, 1))
    add(llama_cpp.llama_sampler_init_min_p(options.min_p, 1))
    add(llama_cpp.llama_sampler_init_temp(options.temperature))
    add(llama_cpp.llama_sampler_init_dist(seed))
    return chain


def new_grammar(grammar: str, vocab: Any) -> Any:
    """A sampler that admits what a GBNF grammar describes; for `llama_cpp.llama_sampler_free`.

    Raises OptionError when llama.cpp cannot use the grammar.
    """
    take_log_error()
    sampler = None
    reason = _grammar_problem(grammar)
    if not reason:
        with _stderr_catcher().caught() as written:
            sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
        reason = take_log_error().strip()
        told = re.search(r"error parsing grammar: (.*)", written[0])
        reason = told[1][:_MAX_REASON] if told else reason or "it must define root"
    if not sampler:
        raise OptionError(f"the grammar cannot be used ({reason})")
    return sampler


class _StderrCatcher:
    """What C code prints to its `stderr` within goes to memory.

    llama.cpp's grammar parser knows no log: it prints a grammar that it refuses, whose words are
    the user's. The file descriptor, which Python writes to, stays as it is. The stream is never
    closed, as another thread may be writing to it when the usual one is put back.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        mac = sys.platform == "darwin"
        self._assignable = mac or hasattr(self._libc, "gnu_get_libc_version")
        self._lock = threading.Lock()
        self._text, self._size = ctypes.c_void_p(), ctypes.c_size_t()
        self._stderr = ctypes.c_void_p.in_dll(self._libc, "__stderrp" if mac else "stderr")
        self._libc.open_memstream.restype = ctypes.c_void_p
        stream = self._libc.open_memstream(ctypes.byref(self._text), ctypes.byref(self._size))
        self._stream = ctypes.c_void_p(stream)

    @contextlib.contextmanager
    def caught(self) -> Iterator[list[str]]:
        """The list has what was printed when the block is left."""
        if not self._assignable:  # musl
            yield [""]
            return
        written: list[str] = []
        with self._lock:
            self._libc.rewind(self._stream)
            usual, self._stderr.value = self._stderr.value, self._stream.value
            try:
                yield written
            finally:
                self._stderr.value = usual
                self._libc.fflush(self._stream)
                text = ctypes.string_at(self._text, self._size.value)
                written.append(text.decode(errors="replace"))


@functools.cache
def _stderr_catcher() -> _StderrCatcher:
    return _StderrCatcher()


def _grammar_problem(grammar: str) -> str:
    """What llama.cpp's recursive parser would not survive, or not take as it is meant."""
    depth = deepest = 0
    for character in grammar:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > _MAX_GRAMMAR_DEPTH or grammar.count("::=") > _MAX_GRAMMAR_RULES:
        return f"more than {_MAX_GRAMMAR_DEPTH} brackets deep or {_MAX_GRAMMAR_RULES} rules long"
    if not grammar.strip():
        return "it is empty"
    if "\0" in grammar or any("\ud800" <= character <= "\udfff" for character in grammar):
        return "it is not valid text: it must be UTF-8"
    return ""


# llama_token_data, as an array
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def _apply(sampler: Any, candidates: npt.NDArray[Any]) -> Any:
    array = llama_cpp.llama_token_data_array(
        data=ctypes.cast(candidates.ctypes.data, llama_cpp.llama_token_data_p),
        size=len(candidates),
        selected=-1,
        sorted=False,
    )
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    return array


def _select(sampler: Any, candidates: npt.NDArray[Any]) -> int:
    array = _apply(sampler, candidates)
    return int(array.data[array.selected].id)


def _admits(grammar: Any, token: int) -> bool:
    candidate = np.array([(token, 1.0, 0.0)], _CANDIDATE)
    _apply(grammar, candidate)
    return bool(np.isfinite(candidate["logit"][0]))


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Logits [n_vocab] -> the logarithms of the probabilities."""
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _load_model(
    path: Path, file: TextFile, device: Device, n_gpu_layers: int | None, low_memory: bool
) -> Any:
    params = llama_cpp.llama_model_default_params()
    # Rearranged copies of the weights speed quantized models up. Float weights gain nothing from
    # them (measured: AMX, F16), and stay in the file's mapping without.
    params.use_extra_bufts = file.quantized and not low_memory
    # A null-terminated list of devices; an empty one keeps everything on the CPU.
    handles = (ctypes.c_void_p * 2)(None if device.kind == "cpu" else device.handle, None)
    params.devices = ctypes.cast(handles, ctypes.c_void_p)
    layers = _ALL_LAYERS if n_gpu_layers is None else n_gpu_layers
    params.n_gpu_layers = 0 if device.kind == "cpu" else layers
    take_log_error()
    with _mappings:  # parts of the file are unmapped
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        reason = take_log_error() or "unknown reason"
        raise ModelFileError(
            f"{path}: llama.cpp cannot load this text model ({reason}); "
            "download or convert it again"
        )
    if params.use_extra_bufts:
        _release(os.fsencode(path))  # hardly anything but the copies is read from now on
    return model


def _new_context(
    model: Any,
    device: Device,
    n_ctx: int,
    n_threads: int,
    n_sequences: int,
    collector: ImportanceCollector | None,
) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = max(n_ctx, n_sequences)  # fewer positions than sequences abort llama.cpp
    params.n_batch = min(max(n_ctx, _MIN_BATCH), _MAX_BATCH)
    if device.kind == "cpu":
        params.n_ubatch = _CPU_BATCH
    params.n_seq_max = n_sequences
    params.kv_unified = True  # the sequences share all positions instead of an equal part each
    params.n_threads = n_threads
    params.n_threads_batch = n_threads
    params.offload_kqv = device.kind != "cpu"
    params.op_offload = device.kind != "cpu"
    if collector is not None:
        callback = ctypes.c_void_p(importance_callback_address())
        params.cb_eval = ctypes.cast(callback, llama_cpp.ggml_backend_sched_eval_callback)
        params.cb_eval_user_data = collector.address
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise DeviceError(
            f"no memory for a context of {n_ctx} positions on {device.name}", "lower n_ctx"
        )
    return context


# While pages are released by their addresses, nobody may unmap a file and put something else there.
_mappings = threading.RLock()


def _release(path: bytes) -> None:
    with _mappings:
        release_mappings(path)


def _free_all(owned: list[Any]) -> None:
    with _mappings:
        for free in owned:
            free()


@functools.cache
def _initialise_backend() -> None:
    """Once in the process."""
    _collect_log()
    llama_cpp.llama_backend_init()
    install_text_kernels()


def _collect_log() -> None:
    """Importing llama_cpp made it print llama.cpp's log and ggml's; our sink keeps the errors."""
    sink = ctypes.cast(log_sink_address(), llama_cpp.llama_log_callback)
    llama_cpp.llama_log_set(sink, ctypes.c_void_p(0))


_collect_log()
