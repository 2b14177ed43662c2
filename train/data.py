"""Pictures with questions and answers, as drawn scenes or in LLaVA's format, and their batches.

Everything here is a pure function of a number, so that a run goes on exactly where it stopped:
picture n of a stage is the same in every run, whoever computes it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from config import Config, Stage
from drawings import UNSEEN, fetch
from errors import TrainError
from questions import Question, can_drill, drill, questions
from scenes import HOME_SHARE, Scene, render, sample_scene
from tokenizer import ANSWER, HEAD, QUESTION

CAPTIONS = ("caption", "description")  # kinds of questions
ZOOMS = (1.0, 1.0, 1.0, 1.0, 1.5, 2.0)  # drawn larger and shrunk, as users' pictures are
# Of the answer's tokens; of "assistant", which the model writes itself; of "Yes" and "No".
ANSWER_WEIGHT = {"caption": 3.0, "where": 2.0}
HEADER_WEIGHT, DECISION_WEIGHT = 0.1, 4.0

Example = dict[str, np.ndarray]


def to_pixels(image: Image.Image, size: int) -> np.ndarray:
    """The picture as uint8 [3, size, size], resized as the runtime resizes it."""
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


# ---- sources ----------------------------------------------------------------------------------


class Source(Protocol):
    """Picture n, as uint8 [3, S, S], and what is asked about it."""

    def __call__(self, index: int) -> tuple[np.ndarray, list[Question]]: ...


class Scenes:
    """Drawn scenes, which never repeat; `kinds` are the kinds of questions, () is all of them.

    For training, `home_share` of the things are at home, and `relation_share` of the scenes have
    relations and are asked for their caption and those, whatever `kinds` says.
    """

    def __init__(
        self,
        config: Config,
        image_size: int,
        split: str,
        kinds: Sequence[str] = (),
        stream: int = 0,
        home_share: float = HOME_SHARE,
        relation_share: float = 0.0,
    ) -> None:
        self.size, self.split, self.kinds = image_size, split, kinds
        self.languages = config.data.languages
        # Validation is in the first style, as it is, with the habits of the test.
        self.styles = config.data.styles if split == "train" else config.data.styles[:1]
        self.home_share = home_share if split == "train" else HOME_SHARE
        self.relation_share = relation_share if split == "train" else 0.0
        for style in self.styles:
            if style == UNSEEN:
                raise TrainError(f"data.styles has {style!r}, which is for tests alone")
            fetch(style)
        self.seed = (config.seed, stream, ("train", "validation", "test").index(split))

    def scene(self, index: int) -> tuple[Scene, Generator]:
        """Scene n, and the generator of everything else that is random about it."""
        rng = np.random.default_rng((*self.seed, index))
        while True:
            scene = sample_scene(rng, self.split, self.styles, self.home_share)
            if not self._drilled(index) or can_drill(scene):
                return scene, rng

    def _drilled(self, index: int) -> bool:
        """Whether this scene is one of those that are asked for relations after their caption."""
        return int((index + 1) * self.relation_share) > int(index * self.relation_share)

    def pixels(self, scene: Scene, rng: Generator) -> np.ndarray:
        """uint8 [3, S, S]."""
        zoom = ZOOMS[rng.integers(len(ZOOMS))]
        return to_pixels(render(scene, round(self.size * zoom)), self.size)

    def asked(self, scene: Scene, rng: Generator) -> list[Question]:
        """Questions in one language, a caption's first, because there is not always room for all;
        if only some kinds are wanted, in all languages."""
        languages = list(self.languages) if self.kinds else [str(rng.choice(self.languages))]
        asked = [q for language in languages for q in questions(scene, rng, language)]
        asked = [q for q in asked if not self.kinds or q.kind in self.kinds]
        mixed = [asked[i] for i in rng.permutation(len(asked))]
        return sorted(mixed, key=lambda question: question.kind != "caption")

    def __call__(self, index: int) -> tuple[np.ndarray, list[Question]]:
        scene, rng = self.scene(index)
        pixels = self.pixels(scene, rng)
        if self._drilled(index):
            return pixels, drill(scene, rng, str(rng.choice(self.languages)))
        return pixels, self.asked(scene, rng)


class Llava:
    """LLaVA's JSON and its image folder, in another order each time; rows without a picture are
    passed over. Every turn counts as a question of its own, as the model has single turns."""

    def __init__(self, file: Path, images: Path, image_size: int, seed: int) -> None:
        self.images, self.size, self.seed = images, image_size, seed
        self.rows = [row for row in read_rows(file) if isinstance(row.get("image"), str)]
        if not self.rows:
            raise TrainError(f"{file} has no row with an image")
        for row in self.rows:
            _turns(row, file)  # complains now, not after hours
        self.file = file
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))

    def __call__(self, index: int) -> tuple[np.ndarray, list[Question]]:
        epoch, place = divmod(index, len(self.rows))
        row = self.rows[self.order(epoch)[place]]
        return open_picture(self.images / row["image"], self.size), _turns(row, self.file)

    def hold_out(self, pictures: int) -> "Llava":
        """Takes the last rows away, at most a tenth, and returns a source of them."""
        held = Llava.__new__(Llava)
        held.__dict__ |= self.__dict__
        cut = len(self.rows) - max(1, min(pictures, len(self.rows) // 10))
        self.rows, held.rows = self.rows[:cut] or self.rows, self.rows[cut:]
        held.order = lru_cache(maxsize=2)(held._order)
        return held


def read_rows(file: Path) -> list[dict]:
    """A JSON list of objects."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TrainError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TrainError(f"{file} holds no list of objects, as LLaVA's files do")
    return rows


def _turns(row: dict, file: Path) -> list[Question]:
    turns = row.get("conversations")
    try:
        texts = [(turn["from"], turn["value"]) for turn in turns]
        asked, answered = texts[::2], texts[1::2]
        if any(who != "human" for who, _ in asked) or any(who != "gpt" for who, _ in answered):
            raise ValueError
        return [
            Question("llava", question.replace("<image>", "").strip(), answer.strip(), "")
            for (_, question), (_, answer) in zip(asked, answered, strict=True)
        ]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise TrainError(
            f"{file}: the conversations of row {row.get('id')!r} are not turns of human and gpt"
        ) from error


def open_picture(path: Path, size: int) -> np.ndarray:
    """uint8 [3, size, size]."""
    try:
        with Image.open(path) as image:
            return to_pixels(image, size)
    except OSError as error:
        raise TrainError(f"{path} cannot be read as a picture: {error}") from error


def open_sources(
    config: Config,
    settings: Stage,
    image_size: int,
    kinds: Sequence[str],
    stream: int,
    relation_share: float = 0.0,
) -> tuple[Source, Source]:
    """Where a stage's training pictures come from, and its validation pictures."""
    if settings.json:
        train = Llava(Path(settings.json), Path(settings.images), image_size, config.seed)
        return train, train.hold_out(settings.validation)
    return (
        Scenes(config, image_size, "train", kinds, stream, settings.home_share, relation_share),
        Scenes(config, image_size, "validation", kinds, stream),
    )


# ---- rows -------------------------------------------------------------------------------------


class Rows:
    """Several question-answer pairs behind one prefix (mostly a picture), in one row of tokens."""

    def __init__(self, tokenizer: Tokenizer, image_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.encode = lru_cache(maxsize=50_000)(self._encode)
        image = [tokenizer.token_to_id("<|image_pad|>")] * image_tokens
        self.picture = (*self.encode(HEAD), *image)
        self.pad = tokenizer.token_to_id("<|endoftext|>")
        self.header = len(self.encode(ANSWER.split("{")[0]))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text).ids)

    def pair(self, pair: Question) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids of a question and of its answer."""
        question = self.encode(QUESTION.format(question=pair.question))
        return question, self.encode(ANSWER.format(answer=pair.answer))

    def row(
        self, prefix: Sequence[int], pairs: Iterable[Question], tokens: int
    ) -> tuple[Example, list[Question]]:
        """Prefix and pairs -> "row" int64 [4, T] (ids, segments, positions, targets), "weights"
        float32 [T], with T = len(prefix) + tokens; and the pairs that found room.

        Segment 0 is the shared prefix, 1, 2, ... the pairs (those that fit; the first is cut to
        the room there is), -1 the padding. A target stands one place before its token.
        """
        start, length = len(prefix), len(prefix) + tokens
        row = np.zeros((4, length), np.int64)
        row[0], row[1], row[3] = self.pad, -1, -100
        row[:3, :start] = prefix, np.zeros(start), np.arange(start)
        weights = np.zeros(length, np.float32)
        placed: list[Question] = []
        for pair in pairs:
            question, answer = self.pair(pair)
            both = question + answer
            end = start + len(both)
            if end > length:
                if placed:
                    continue
                both, end = both[:tokens], length
                answer = both[len(question) :]
            row[0, start:end], row[1, start:end] = both, len(placed) + 1
            row[2, start:end] = len(prefix) + np.arange(len(both))
            first = start + len(question) - 1  # from here on the next token is to be learned
            row[3, first : first + len(answer)] = answer
            weights[first : first + len(answer)] = ANSWER_WEIGHT.get(pair.kind, 1.0)
            weights[first : first + self.header] = HEADER_WEIGHT
            if pair.kind == "yesno":
                weights[first + self.header] = DECISION_WEIGHT
            placed.append(pair)
            start = end
        return {"row": row, "weights": weights}, placed


class PictureRows:
    """Example n: picture n of a source, and its pairs in a row behind it."""

    def __init__(self, source: Source, rows: Rows, tokens: int) -> None:
        self.source, self.rows, self.tokens = source, rows, tokens

    def checked(self, index: int) -> tuple[Example, list[Question]]:
        """The example, and the pairs that found room in it."""
        pixels, pairs = self.source(index)
        example, placed = self.rows.row(self.rows.picture, pairs, self.tokens)
        return {"pixels": pixels} | example, placed

    def __call__(self, index: int) -> Example:
        return self.checked(index)[0]


class Batches(Dataset[dict[str, Tensor]]):
    """Batch n is made of the examples n * size, n * size + 1, ..."""

    def __init__(self, example: Callable[[int], Example], size: int) -> None:
        self.example, self.size = example, size

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return stack([self.example(number * self.size + i) for i in range(self.size)])


def stack(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Examples -> a batch."""
    return {k: torch.from_numpy(np.stack([e[k] for e in examples])) for k in examples[0]}
