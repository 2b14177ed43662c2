"""The text decoder: tokens, sequences, sampling, characters."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from omnivlm_edge import (
    BusyError,
    ClosedError,
    ContextOverflowError,
    GenerateOptions,
    ModelFileError,
    OptionError,
    QuantizeOptions,
    quantize_file,
)
from omnivlm_edge._native import inspect_text_file
from omnivlm_edge.convert import convert_checkpoint
from omnivlm_edge.decoder import TextDecoder, TokenSequence
from omnivlm_edge.device import select_device
from omnivlm_edge.prompt import Piece
from tiny_checkpoint import Dims, write_checkpoint

N_SEQUENCES = 4
GREEDY = GenerateOptions()


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Iterator[TextDecoder]:
    decoder = open_decoder(tiny_model)
    yield decoder
    decoder.close()


def open_decoder(model: Path, n_ctx: int = 512, n_sequences: int = N_SEQUENCES) -> TextDecoder:
    (path,) = (p for p in model.glob("*.gguf") if not p.name.startswith("mmproj"))
    return TextDecoder(
        path, select_device("cpu"), n_ctx=n_ctx, n_threads=2, n_sequences=n_sequences
    )


def plain(text: str) -> list[Piece]:
    return [Piece(text, special=False)]


def generate(decoder: TextDecoder, sequence: TokenSequence, n: int) -> list[int]:
    tokens = [decoder.sample(sequence)]
    while len(tokens) < n:
        decoder.decode([sequence])
        tokens.append(decoder.sample(sequence))
    return tokens


def answer(
    decoder: TextDecoder, prompt: str, n: int = 12, options: GenerateOptions = GREEDY
) -> list[int]:
    sequence = decoder.open(options)
    try:
        decoder.prefill(sequence, [decoder.tokenize(plain(prompt))])
        return generate(decoder, sequence, n)
    finally:
        decoder.close_sequence(sequence)


def test_typed_control_tokens_stay_text(decoder: TextDecoder) -> None:
    (control,) = decoder.tokenize([Piece("<|im_end|>", special=True)])
    typed = decoder.tokenize(plain("<|im_end|>"))
    assert control not in typed
    assert len(typed) > 1


def test_pieces_are_tokenised_one_by_one(decoder: TextDecoder) -> None:
    pieces = [Piece("<|im_start|>", True), Piece("user\n", False), Piece("<|im_end|>", True)]
    together = decoder.tokenize(pieces)
    assert together == [token for piece in pieces for token in decoder.tokenize([piece])]


def test_missing_control_token(decoder: TextDecoder) -> None:
    with pytest.raises(ModelFileError, match=r"has no token <\|video_pad\|>"):
        decoder.tokenize([Piece("<|video_pad|>", special=True)])


@pytest.mark.parametrize("text", ["", "é", "你好，世界", "a\0b", "😀" * 300, "\n\n  x\t"])
def test_text_survives_a_round_trip(decoder: TextDecoder, text: str) -> None:
    """Characters that are split over tokens come out whole, in the end or as soon as complete."""
    sequence = decoder.open(GREEDY)
    pieces = []
    for token in decoder.tokenize(plain(text)):
        sequence.last_token = token
        pieces.append(decoder.text(sequence))
    pieces.append(decoder.text(sequence, final=True))
    decoder.close_sequence(sequence)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_is_marked_at_the_end(decoder: TextDecoder) -> None:
    sequence = decoder.open(GREEDY)
    tokens = decoder.tokenize(plain("界"))
    assert len(tokens) == 3
    sequence.last_token = tokens[0]
    assert decoder.text(sequence) == ""
    assert decoder.text(sequence, final=True) == "\ufffd"
    decoder.close_sequence(sequence)


def test_sequences_decoded_together_answer_as_alone(decoder: TextDecoder) -> None:
    prompts = ["the red one", "in the pan", "你好", "a"]
    alone = [answer(decoder, prompt) for prompt in prompts]
    sequences = [decoder.open(GREEDY) for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        decoder.prefill(sequence, [decoder.tokenize(plain(prompt))])
        sequence_tokens = [decoder.sample(sequence)]
        sequence.tokens = sequence_tokens  # type: ignore[attr-defined]
    for _ in range(11):
        decoder.decode(sequences)
        for sequence in sequences:
            sequence.tokens.append(decoder.sample(sequence))  # type: ignore[attr-defined]
    for sequence in sequences:
        decoder.close_sequence(sequence)
    assert [sequence.tokens for sequence in sequences] == alone  # type: ignore[attr-defined]


def test_embeddings_stand_at_positions_like_tokens(decoder: TextDecoder) -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((7, decoder.n_embd)).astype(np.float32)
    tokens = decoder.tokenize(plain("the end"))
    logits = []
    for parts in ([tokens, embeddings, tokens], [tokens, embeddings[:3], embeddings[3:], tokens]):
        sequence = decoder.open(GREEDY)
        decoder.prefill(sequence, parts)
        assert sequence.position == 2 * len(tokens) + 7
        logits.append(decoder.logits(sequence))
        decoder.close_sequence(sequence)
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model whose rows are wide enough for every type (float32)."""
    directory = tmp_path_factory.mktemp("wide")
    write_checkpoint(directory / "checkpoint", dims=Dims(text_hidden=256))
    convert_checkpoint(directory / "checkpoint", directory, "f32")
    (path,) = (p for p in directory.glob("*.gguf") if not p.name.startswith("mmproj"))
    return path


@pytest.mark.parametrize(
    "type_name", ["f32", "f16", "bf16", "q8_0", "q5_1", "q4_0", "iq4_nl", "q6_k", "q4_k", "iq4_xs"]
)
def test_embedded_tokens_are_what_llama_cpp_looks_up(
    tmp_path: Path, wide_model: Path, type_name: str
) -> None:
    path = wide_model
    if type_name != "f32":
        path = tmp_path / "text.gguf"
        quantize_file(wide_model, path, "f16", QuantizeOptions(embedding_type=type_name))
    decoder = TextDecoder(path, select_device("cpu"), n_ctx=64, n_threads=2)
    tokens = list(range(7, 300, 9))
    rows = inspect_text_file(os.fsencode(path)).embed(np.array(tokens, np.int32))
    logits = []
    for part in (tokens, rows):
        sequence = decoder.open(GREEDY)
        decoder.prefill(sequence, [part])
        assert sequence.n_cached == 0
        logits.append(decoder.logits(sequence))
        decoder.close_sequence(sequence)
    np.testing.assert_array_equal(logits[0], logits[1])
    decoder.close()


def test_tokens_that_cannot_be_embedded(tmp_path: Path, tiny_model: Path) -> None:
    (text,) = (p for p in tiny_model.glob("*.gguf") if not p.name.startswith("mmproj"))
    file = inspect_text_file(os.fsencode(text))
    for token in (-1, 2**31 - 1):
        with pytest.raises(IndexError, match=f"no token {token}"):
            file.embed(np.array([0, token], np.int32))
    header = gguf.GGUFReader(text).data_offset
    data = text.read_bytes()
    other = tmp_path / "llama.gguf"
    other.write_bytes(data[:header].replace(b"qwen2", b"llama") + data[header:])
    assert inspect_text_file(os.fsencode(other)).n_embd == 0


def test_a_picture_and_its_text_go_in_one_batch(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the answer is that of a decoder that must give llama.cpp each on its own."""
    sizes: list[int] = []
    decode = llama_cpp.llama_decode

    def counted(context: Any, batch: Any) -> int:
        sizes.append(batch.n_tokens)
        return int(decode(context, batch))

    monkeypatch.setattr(llama_cpp, "llama_decode", counted)
    pictures = np.random.default_rng(0).normal(size=(2, 7, 64)).astype(np.float32)
    parts: list[Any] = [[1], [2, 3], pictures[0], [4], pictures[1], [], [5, 6], [7]]
    found = []
    for whole in (True, False):
        decoder = open_decoder(tiny_model)
        if not whole:
            decoder._file = SimpleNamespace(n_embd=0)  # type: ignore[assignment]
        sequence = decoder.open(GREEDY)
        sizes.clear()
        decoder.prefill(sequence, parts)
        assert sizes == ([21] if whole else [3, 7, 1, 7, 3])
        found.append((decoder.logits(sequence), generate(decoder, sequence, 12)))
        decoder.close_sequence(sequence)
        sequence = decoder.open(GREEDY)
        decoder.prefill(sequence, [*parts[:-1], [8]])
        assert sequence.n_cached == 20
        decoder.close()
    np.testing.assert_allclose(found[0][0], found[1][0], atol=0.02)  # the cache is F16
    assert found[0][1] == found[1][1]


def test_pictures_wider_than_a_batch_are_found_again(tiny_model: Path) -> None:
    decoder = open_decoder(tiny_model, n_ctx=512, n_sequences=1)
    decoder._n_batch = 16
    picture = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    for n_cached in (0, 54):
        sequence = decoder.open(GREEDY)
        decoder.prefill(sequence, [[1, 2], picture, [3, 4, 5]])
        assert sequence.n_cached == n_cached
        decoder.close_sequence(sequence)
    decoder.close()


def test_long_prompts_go_in_several_batches(tiny_model: Path) -> None:
    text = "the red one in the pan " * 150
    decoder = open_decoder(tiny_model, n_ctx=4096)
    tokens = decoder.tokenize(plain(text))
    assert len(tokens) > 2048
    sequence = decoder.open(GREEDY)
    decoder.prefill(sequence, [tokens])
    whole = decoder.logits(sequence)
    decoder.close_sequence(sequence)
    sequence = decoder.open(GREEDY)
    for start in range(0, len(tokens), 500):
        decoder.prefill(sequence, [tokens[start : start + 500]])
    parts = decoder.logits(sequence)
    assert parts @ whole >= 0.9999 * np.linalg.norm(parts) * np.linalg.norm(whole)
    decoder.close()


def test_seeds_make_answers_repeatable(decoder: TextDecoder) -> None:
    options = GenerateOptions(temperature=5.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    first = answer(decoder, "the", options=options)
    assert first == answer(decoder, "the", options=options)
    others = [
        answer(decoder, "the", options=GenerateOptions(**{**vars(options), "seed": seed}))
        for seed in (2, 3, None)
    ]
    assert any(other != first for other in others)


def test_narrow_filters_are_greedy(decoder: TextDecoder) -> None:
    greedy = answer(decoder, "the")
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999999}):
        wide = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        assert answer(decoder, "the", options=GenerateOptions(**(wide | narrow))) == greedy


def test_greedy_takes_the_first_of_the_largest_as_llama_cpp_does(decoder: TextDecoder) -> None:
    sequence = decoder.open(GREEDY)
    decoder.prefill(sequence, [[1, 2, 3]])
    logits = decoder._logits_at(sequence._output_index)
    logits[:] = 1.0
    logits[[17, 5, 200]] = 2.0
    context = decoder._context
    assert llama_cpp.llama_sampler_sample(sequence._sampler, context, -1) == 5
    assert decoder.sample(sequence) == 5
    decoder.close_sequence(sequence)


def test_repeat_penalty_changes_a_repetition(decoder: TextDecoder) -> None:
    tokens = answer(decoder, "the", n=40, options=GenerateOptions(repeat_penalty=1e6))
    assert len(set(tokens)) == 40


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("repeat_penalty", 0.0),
        ("frequency_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("logit_bias", ((1, 101),)),
        ("logit_bias", ((-1, 1),)),
        ("logit_bias", {1: 1}),
        ("seed", -1),
        ("seed", 2**32 - 1),
    ],
)
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{option} is .* it must be"):
        GenerateOptions(**{option: value})  # type: ignore[arg-type]


def test_logits_are_those_of_the_sequence_or_an_error(decoder: TextDecoder) -> None:
    one, two, fresh = (decoder.open(GREEDY) for _ in range(3))
    decoder.prefill(one, [[1, 2, 3]])
    decoder.prefill(two, [[4, 5, 6]])
    decoder.sample(two)
    for stale in (one, fresh):
        for call in (decoder.sample, decoder.logits):
            with pytest.raises(BusyError, match="sample before the next step"):
                call(stale)
    decoder.close_sequence(one)
    for call in (decoder.sample, decoder.logits, lambda s: decoder.prefill(s, [[1]])):
        with pytest.raises(ClosedError):
            call(one)
    decoder.close_sequence(two)
    decoder.close_sequence(fresh)


def test_wrong_prefills(decoder: TextDecoder) -> None:
    sequence = decoder.open(GREEDY)
    for nothing in ([], [[]], [[], np.zeros((0, decoder.n_embd), np.float32)]):
        with pytest.raises(OptionError, match="nothing to prefill"):
            decoder.prefill(sequence, nothing)
    for shape in ((3, decoder.n_embd - 1), (3, decoder.n_embd + 1), (3,)):
        with pytest.raises(OptionError, match="encoded by another model"):
            decoder.prefill(sequence, [np.zeros(shape, np.float32)])
    decoder.close_sequence(sequence)


@pytest.mark.parametrize(("n_ctx", "n_sequences"), [(1, 1), (2, 64), (64, 256)])
def test_small_contexts_and_many_sequences(tiny_model: Path, n_ctx: int, n_sequences: int) -> None:
    decoder = open_decoder(tiny_model, n_ctx, n_sequences)
    sequences = [decoder.open(GREEDY) for _ in range(n_sequences)]
    decoder.prefill(sequences[0], [[1]])
    assert decoder.sample(sequences[0]) >= 0
    decoder.close()


@pytest.mark.parametrize("n_sequences", [0, 257])
def test_wrong_number_of_sequences(tiny_model: Path, n_sequences: int) -> None:
    with pytest.raises(OptionError, match=f"n_sequences is {n_sequences}"):
        open_decoder(tiny_model, 64, n_sequences)


def test_all_sequences_taken(decoder: TextDecoder) -> None:
    sequences = [decoder.open(GREEDY) for _ in range(N_SEQUENCES)]
    with pytest.raises(BusyError):
        decoder.open(GREEDY)
    decoder.close_sequence(sequences.pop())
    sequences.append(decoder.open(GREEDY))
    for sequence in sequences:
        decoder.close_sequence(sequence)
        decoder.close_sequence(sequence)  # a second time is harmless


def test_prefill_overflow_is_refused_before_any_work(decoder: TextDecoder) -> None:
    sequence = decoder.open(GREEDY)
    with pytest.raises(ContextOverflowError, match="do not fit"):
        decoder.prefill(sequence, [[1] * (decoder.n_ctx + 1)])
    assert sequence.position == 0
    decoder.close_sequence(sequence)


def test_a_full_context_is_an_error_and_not_a_crash(tiny_model: Path) -> None:
    decoder = open_decoder(tiny_model, n_ctx=256)
    sequence = decoder.open(GREEDY)
    decoder.prefill(sequence, [[1] * decoder.n_ctx])
    decoder.sample(sequence)
    with pytest.raises(ContextOverflowError, match="context is full"):
        decoder.decode([sequence])
    decoder.close()


def test_closed(tiny_model: Path) -> None:
    decoder = open_decoder(tiny_model)
    sequence = decoder.open(GREEDY)
    decoder.prefill(sequence, [[1, 2, 3]])
    decoder.close()
    decoder.close()
    for call in (
        lambda: decoder.tokenize(plain("a")),
        lambda: decoder.open(GREEDY),
        lambda: decoder.prefill(sequence, [[1]]),
        lambda: decoder.decode([sequence]),
        lambda: decoder.sample(sequence),
        lambda: decoder.text(sequence),
        lambda: decoder.logits(sequence),
    ):
        with pytest.raises(ClosedError):
            call()
    decoder.close_sequence(sequence)


def test_a_file_that_llama_cpp_refuses(tmp_path: Path, tiny_model: Path) -> None:
    (text,) = (p for p in tiny_model.glob("*.gguf") if not p.name.startswith("mmproj"))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(text.read_bytes()[:-1000])
    with pytest.raises(ModelFileError, match="cannot load this text model .*bounds"):
        TextDecoder(cut, select_device("cpu"), n_ctx=64, n_threads=1)


def value_at(reader: gguf.GGUFReader, key: str, part: int = -1) -> int:
    """Where in the file a key's value stands."""
    field = reader.get_field(key)
    assert field is not None
    offset: int = field.parts[part].ctypes.data - reader.data.ctypes.data
    return offset


def first_token_twice(reader: gguf.GGUFReader, data: bytearray) -> None:
    field = reader.get_field("tokenizer.ggml.tokens")
    assert field is not None
    first, second = (field.parts[i] for i in field.data[:2])
    assert len(first) == len(second)
    start = second.ctypes.data - reader.data.ctypes.data
    data[start : start + len(first)] = bytes(first)


def layers(n: int) -> Callable[[gguf.GGUFReader, bytearray], None]:
    def change(reader: gguf.GGUFReader, data: bytearray) -> None:
        struct.pack_into("<I", data, value_at(reader, "qwen2.block_count"), n)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (layers(0), "qwen2.block_count is 0"),
        (layers(513), "more than the 512 layers"),
        (layers(2**32 - 1), "qwen2.block_count is 4294967295"),
        (first_token_twice, "token 1 of key tokenizer.ggml.tokens stands there twice"),
    ],
    ids=["no layers", "many layers", "absurd layers", "token twice"],
)
def test_damage_that_llama_cpp_would_not_survive(
    tmp_path: Path, tiny_model: Path, change: Any, message: str
) -> None:
    (text,) = (p for p in tiny_model.glob("*.gguf") if not p.name.startswith("mmproj"))
    data = bytearray(text.read_bytes())
    change(gguf.GGUFReader(text), data)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    with pytest.raises(ModelFileError, match=message):
        TextDecoder(damaged, select_device("cpu"), n_ctx=64, n_threads=1)


FUZZ = """
import sys
from pathlib import Path
import numpy as np
from omnivlm_edge import GenerateOptions, OmniVLMError
from omnivlm_edge.decoder import TextDecoder
from omnivlm_edge.device import select_device

valid, path, header = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(int(sys.argv[4]))
loaded = refused = 0
for _ in range(300):
    data = bytearray(valid)
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(header)] = rng.integers(256)
    if rng.random() < 0.2:
        del data[rng.integers(len(data)) :]
    path.write_bytes(data)
    try:
        decoder = TextDecoder(path, select_device("cpu"), n_ctx=64, n_threads=1)
        sequence = decoder.open(GenerateOptions())
        decoder.prefill(sequence, [[1, 2, 3]])
        decoder.sample(sequence)
        decoder.text(sequence)
        decoder.close()
        loaded += 1
    except OmniVLMError:
        refused += 1
print(loaded, refused)
"""


def test_damaged_bytes_never_crash(tmp_path: Path, tiny_model: Path) -> None:
    (text,) = (p for p in tiny_model.glob("*.gguf") if not p.name.startswith("mmproj"))
    header = gguf.GGUFReader(text).data_offset
    result = subprocess.run(
        [sys.executable, "-c", FUZZ, text, tmp_path / "fuzzed.gguf", str(header), "7"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    loaded, refused = map(int, result.stdout.split())
    assert loaded > 0
    assert refused > 0


def cells(decoder: TextDecoder, sequence: TokenSequence) -> int:
    return len(decoder._cells[sequence.seq_id])


def test_the_longest_common_beginning_is_kept(tiny_model: Path) -> None:
    decoder = open_decoder(tiny_model, n_sequences=1)
    rng = np.random.default_rng(1)
    picture, other = (rng.normal(size=(4, 64)).astype(np.float32) for _ in range(2))
    for parts, kept in (
        ([[1, 2, 3], picture, [4, 5]], 0),
        ([[1, 2, 3], picture, [4, 5]], 8),  # the last position gives the logits
        ([[1, 2, 3], picture, [4, 6, 7]], 8),
        ([[1, 2], [3], picture.copy(), [4, 6, 7, 8]], 10),
        ([[1, 2, 3], other, [4, 6, 7, 8]], 3),
        ([[1, 2, 3], picture, [4, 6, 7, 8]], 3),
        ([[1, 2, 3], picture[:2], [4]], 3),
        ([[9]], 0),
    ):
        sequence = decoder.open(GREEDY)
        decoder.prefill(sequence, parts)
        assert sequence.n_cached == kept
        found = decoder.logits(sequence)
        decoder.close_sequence(sequence)
        fresh = open_decoder(tiny_model, n_sequences=1)
        again = fresh.open(GREEDY)
        fresh.prefill(again, parts)
        np.testing.assert_allclose(found, fresh.logits(again), atol=0.05)  # the cache is F16
        assert found.argmax() == fresh.logits(again).argmax()
        fresh.close()
    decoder.close()


def test_answers_stay_in_the_context_as_they_were_sampled(tiny_model: Path) -> None:
    decoder = open_decoder(tiny_model, n_sequences=1)
    sequence = decoder.open(GREEDY)
    decoder.prefill(sequence, [[1, 2, 3]])
    tokens = generate(decoder, sequence, 5)
    decoder.close_sequence(sequence)
    sequence = decoder.open(GREEDY)
    decoder.prefill(sequence, [[1, 2, 3], tokens, [4]])
    assert sequence.n_cached == 3 + 4  # the last token was sampled and not decoded
    decoder.close()


def test_closed_sequences_give_way_to_open_ones(tiny_model: Path) -> None:
    decoder = open_decoder(tiny_model, n_ctx=256, n_sequences=2)
    one = decoder.open(GREEDY)
    decoder.prefill(one, [[1] * 200])
    decoder.close_sequence(one)
    one, two = decoder.open(GREEDY), decoder.open(GREEDY)
    decoder.prefill(one, [[2] * 120])
    decoder.prefill(two, [[3] * 120])
    assert cells(decoder, one) == cells(decoder, two) == 120
    decoder.close()


def test_state_of_a_beginning(tiny_model: Path) -> None:
    """Taken by one decoder, put back by another; nonsense is refused and leaves nothing."""
    picture = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    beginning: list[Any] = [[1, 2, 3], picture]
    one, two = (open_decoder(tiny_model, n_sequences=1) for _ in range(2))
    sequence = one.open(GREEDY)
    one.prefill(sequence, beginning, final=False)
    state = one.state(sequence)
    one.prefill(sequence, [[4, 5]])
    want = generate(one, sequence, 8)

    other = two.open(GREEDY)
    assert not two.holds(other, beginning)
    for nonsense in (b"", state[:-10], b"\1" * len(state)):
        assert not two.restore(other, beginning, nonsense)
        assert cells(two, other) == 0
    assert two.restore(other, beginning, state)
    assert two.holds(other, beginning)
    two.prefill(other, [*beginning, [4, 5]])
    assert other.n_cached == 7
    assert generate(two, other, 8) == want
    one.close()
    two.close()


def test_scores_are_log_probabilities(tiny_model: Path) -> None:
    decoder = open_decoder(tiny_model, n_sequences=1)
    continuations = [[5], [5, 6], [7, 8, 9]]

    def log_probability(tokens: list[int]) -> float:
        """Token by token, each from a prompt of its own."""
        total = 0.0
        for i, token in enumerate(tokens):
            sequence = decoder.open(GREEDY)
            decoder.prefill(sequence, [[1, 2, 3, *tokens[:i]]])
            logits = decoder.logits(sequence).astype(np.float64)
            total += float(logits[token] - np.log(np.exp(logits - logits.max()).sum())) - float(
                logits.max()
            )
            decoder.close_sequence(sequence)
        return total

    want = [log_probability(tokens) for tokens in continuations]
    sequence = decoder.open(GREEDY)
    decoder.prefill(sequence, [[1, 2, 3]])
    assert decoder.score(sequence, continuations) == pytest.approx(want, abs=0.05)
    assert sequence.position == cells(decoder, sequence) == 3
    assert all(score < 0 for score in want)
    with pytest.raises(BusyError, match="sample before"):
        decoder.sample(sequence)
    with pytest.raises(OptionError, match="a choice has more than 512 tokens"):
        decoder.score(sequence, [[1] * 513])
    decoder.close()


def test_a_grammar_admits_nothing_else(decoder: TextDecoder) -> None:
    options = GenerateOptions(
        grammar='root ::= ("yes" | "no") " " [0-9]+ "!"', seed=1, temperature=2.0
    )
    for _ in range(5):
        sequence = decoder.open(options)
        decoder.prefill(sequence, [decoder.tokenize(plain("How many?"))])
        text = ""
        for _ in range(200):
            decoder.sample(sequence)
            if sequence.at_end:
                break
            text += decoder.text(sequence)
            decoder.decode([sequence])
        decoder.close_sequence(sequence)
        assert re.fullmatch(r"(yes|no) \d+!" if sequence.at_end else r"(yes|no) \d+", text)


@pytest.mark.parametrize(
    "grammar",
    [
        *(
            "",
            "root",
            "root ::= other",
            'root ::= root "a"',
            'x ::= "a"',
            'root ::= "a" \0',
            "\udc80",
        ),
        "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
        "root ::= r1\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(1, 100_000)),
    ],
    ids=range(9),
)
def test_wrong_grammars(
    decoder: TextDecoder, grammar: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OptionError, match="the grammar cannot be used"):
        decoder.open(GenerateOptions(grammar=grammar))
    decoder.close_sequence(decoder.open(GREEDY))  # no sequence was lost
    assert capfd.readouterr() == ("", "")  # llama.cpp prints what it refuses, and it is the user's


def test_what_is_wrong_with_a_grammar_is_said(decoder: TextDecoder) -> None:
    for grammar, reason in (
        ("root ::= other", "Undefined rule identifier 'other'"),
        ('root ::= "a" )' + "x" * 1000, "expecting newline or end at"),
    ):
        with pytest.raises(OptionError, match=reason) as caught:
            decoder.check(GenerateOptions(grammar=grammar))
        assert len(str(caught.value)) < 200
