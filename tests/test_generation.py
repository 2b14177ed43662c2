"""One answer while it is made, over a decoder whose tokens are known beforehand."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from omnivlm_edge import Answer, GenerateOptions
from omnivlm_edge.decoder import TextDecoder
from omnivlm_edge.generation import Generation, PictureSlot
from omnivlm_edge.values import ImageEmbedding

IM_START, END = 0, 1
N_VOCAB = 12


@dataclass
class FakeSequence:
    position: int = 0
    n_cached: int = 0
    at_end: bool = False


@dataclass
class FakeDecoder:
    """Samples what it was given: texts, IM_START, or END; `left` is what it holds at the end."""

    script: list[str | int]
    left: str = ""
    n_open: int = 0
    now: str | int = END
    logits_: list[float] = field(default_factory=lambda: [0.0] * N_VOCAB)

    def special_token(self, text: str) -> int:
        assert text == "<|im_start|>"
        return IM_START

    def open(self, options: GenerateOptions) -> FakeSequence:
        self.n_open += 1
        return FakeSequence()

    def close_sequence(self, sequence: FakeSequence) -> None:
        self.n_open -= 1

    def sample(self, sequence: FakeSequence) -> int:
        self.now = self.script.pop(0)
        sequence.at_end = self.now == END
        return self.now if isinstance(self.now, int) else 2 + len(self.script) % (N_VOCAB - 2)

    def text(self, sequence: FakeSequence, *, final: bool = False) -> str:
        if final:
            return self.left
        return self.now if isinstance(self.now, str) else ""

    def logits(self, sequence: FakeSequence) -> Any:
        return np.array(self.logits_, np.float32)

    def token_bytes(self, token: int) -> bytes:
        return b"<%d>" % token


def generate(
    *script: str | int, max_tokens: int = 100, left: str = "", **options: Any
) -> tuple[list[str], Answer]:
    """The pieces of an answer, and the whole of it."""
    generation = new(FakeDecoder([*script], left), max_tokens=max_tokens, **options)
    pieces = []
    while not generation.finished:
        pieces.append(generation.sample(since=0.0))
    answer = generation.answer()
    assert "".join(pieces) == answer.text
    return [piece for piece in pieces if piece], answer


def new(decoder: FakeDecoder, max_tokens: int = 100, **options: Any) -> Generation:
    return Generation(
        cast(TextDecoder, decoder),
        [[5, 6, 7]],
        GenerateOptions(**options),
        n_prompt=3,
        max_tokens=max_tokens,
        load_seconds=0.0,
    )


def test_an_answer_ends_with_its_token_or_its_length() -> None:
    pieces, answer = generate("Three", " horses", ".", END)
    assert pieces == ["Three", " horses", "."]
    assert (answer.finish_reason, answer.completion_tokens) == ("stop", 3)
    pieces, answer = generate("Three", " horses", ".", max_tokens=2)
    assert pieces == ["Three", " horses"]
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 2)


def test_what_is_left_of_a_character_comes_at_the_end() -> None:
    assert generate("a", END, left="\ufffd")[1].text == "a\ufffd"
    assert generate("a", max_tokens=1, left="\ufffd")[1].text == "a\ufffd"


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ((IM_START, "assistant", "\n", "Hi", END), "Hi"),
        ((IM_START, "assist", "ant\nHi", END), "Hi"),
        (("\n", " ", IM_START, "assistant\n", " Hi", END), "Hi"),
        ((IM_START, "assembly", END), "assembly"),
        ((IM_START, "assist", END), "assist"),
        (("Hi ", IM_START, "assistant\n", "there", END), "Hi assistant\nthere"),
        (("\n\n", "Hi\n", "you", END), "Hi\nyou"),
        ((END,), ""),
    ],
)
def test_a_turn_header_before_the_answer_is_removed(script: tuple[str | int], text: str) -> None:
    assert generate(*script)[1].text == text


# --- stop strings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "stop", "pieces"),
    [
        (("one two", " three"), ("two",), ["one "]),
        (("one t", "w", "o three"), ("two",), ["one "]),  # across tokens
        (("one t", "w", "ice", END), ("two",), ["one ", "twice"]),  # held back, and released
        (("one t", "w", END), ("two",), ["one ", "tw"]),  # at the end, too
        (("aa", "ab", END), ("aab",), ["a"]),  # what was held back begins another time
        (("x", "abab", "abc", END), ("ababc",), ["x", "ab"]),
        (("one", " two"), ("o", "one"), []),
        (("one two", END), ("two", "ne"), ["o"]),  # the first in the text, not in the list
        (("one", END), ("two",), ["one"]),
    ],
)
def test_an_answer_ends_before_a_stop_string(
    script: tuple[str | int], stop: tuple[str, ...], pieces: list[str]
) -> None:
    found, answer = generate(*script, stop=stop)
    assert (found, answer.finish_reason) == (pieces, "stop")


def test_a_stop_string_counts_where_the_answer_ends_anyway() -> None:
    found, answer = generate("a b", max_tokens=1, left="\ufffd", stop=(" b\ufffd",))
    assert (found, answer.finish_reason) == (["a"], "stop")
    found, answer = generate(IM_START, "assist", max_tokens=2, stop=("sis",))
    assert (found, answer.finish_reason) == (["as"], "stop")


def test_stop_strings_are_found_however_the_text_is_cut() -> None:
    random_ = random.Random(7)
    for _ in range(500):
        text = "x" + "".join(random_.choices("ab", k=random_.randint(0, 12)))
        stop = "".join(random_.choices("ab", k=random_.randint(1, 4)))
        cuts = sorted(random_.choices(range(len(text) + 1), k=random_.randint(0, 6)))
        ends = [*cuts, len(text)]
        script = [text[start:end] for start, end in zip([0, *cuts], ends, strict=True)]
        _, answer = generate(*script, END, stop=(stop,))
        assert answer.text == text.partition(stop)[0], (script, stop)


# --- log-probabilities ----------------------------------------------------------------------------


def test_logprobs_are_those_of_the_logits() -> None:
    decoder = FakeDecoder(["a", "b", END])
    decoder.logits_ = [0.0, 1.0, 5.0, 3.0, 4.0] + [-2.0] * (N_VOCAB - 5)
    generation = new(decoder, top_logprobs=3)
    while not generation.finished:
        generation.sample(since=0.0)
    answer = generation.answer()
    chances = np.exp(np.array(decoder.logits_)) / np.exp(np.array(decoder.logits_)).sum()
    assert len(answer.logprobs) == answer.completion_tokens == 2
    for logprob, token in zip(answer.logprobs, answer.tokens, strict=True):
        assert logprob.token == b"<%d>" % token
        assert logprob.logprob == pytest.approx(np.log(chances[token]))
        assert [name for name, _ in logprob.top] == [b"<2>", b"<4>", b"<3>"]
        assert [value for _, value in logprob.top] == pytest.approx(np.log(chances[[2, 4, 3]]))


def test_logprobs_cost_nothing_unless_they_are_wanted() -> None:
    decoder = FakeDecoder(["a", END])
    decoder.logits_ = None  # type: ignore[assignment]
    generation = new(decoder)
    generation.sample(since=0.0)
    assert generation.answer().logprobs == ()
    decoder = FakeDecoder(["a", END])
    generation = new(decoder, top_logprobs=0)
    generation.sample(since=0.0)
    assert generation.answer().logprobs[0].top == ()


# --- pictures and the place in the context --------------------------------------------------------


def test_pictures_are_put_where_they_were_waited_for() -> None:
    decoder = FakeDecoder([END])
    known, first, second = (ImageEmbedding(np.full((2, 4), i, np.float32)) for i in range(3))
    generation = new(decoder)
    generation.parts = [[1], PictureSlot("first"), [2], PictureSlot(known), PictureSlot("second")]
    assert generation.n_first == 2
    assert list(generation.waiting) == ["first", "second"]
    generation.put(first)
    assert list(generation.waiting) == ["second"]
    generation.put(second)
    assert not list(generation.waiting)
    assert generation.images == (first, known, second)
    filled = generation.filled
    assert [part if isinstance(part, list) else float(part[0, 0]) for part in filled] == [
        *([1], 1.0, [2], 0.0, 2.0)
    ]


def test_a_place_is_claimed_late_and_given_back_once() -> None:
    decoder = FakeDecoder([END])
    generation = new(decoder)
    generation.close()
    assert decoder.n_open == 0
    assert generation.sequence is generation.sequence
    assert decoder.n_open == 1
    generation.close()
    assert decoder.n_open == 0
