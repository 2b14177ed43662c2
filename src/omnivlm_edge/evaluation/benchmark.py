"""What a benchmark is; shares, with their uncertainty; files that hold questions."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from ..batch.inputs import Source
from ..errors import OptionError

#: A picture, or what opens it when its turn has come: a data set may be larger than the memory.
Picture: TypeAlias = "Source | Callable[[], Source]"

T = TypeVar("T")

_Z = 1.959964  # of the normal distribution: 95 % lie within so many standard deviations


def opened(picture: Picture) -> Source:
    """The picture itself."""
    return picture() if callable(picture) else picture


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    `key` names what it shows, wherever the data lie: together with the prompt it tells answers
    apart, so questions that have both in common are asked once. `truth` is the right answer as
    people read it, `facts` what the scoring needs to know.
    """

    id: str
    key: str
    pictures: tuple[Picture, ...]
    prompt: str
    truth: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """`part` of `whole`, such as right answers of all."""

    part: int
    whole: int

    @property
    def value(self) -> float | None:
        """None of nothing."""
        return self.part / self.whole if self.whole else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % score interval: where the share of endlessly many such questions may lie.

        E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
        """
        if not self.whole:
            return None
        n, share = self.whole, self.part / self.whole
        middle = share + _Z**2 / (2 * n)
        half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
        below = 1 + _Z**2 / n
        return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)


#: Group -> measure -> its value.
Table: TypeAlias = "dict[str, dict[str, Share | float]]"


@dataclass
class Scores:
    """What came out: tables by name, the questions answered wrongly, more files, what to know.

    `wrong` are places in the sequence of questions; `files` have contents for JSON.
    """

    tables: dict[str, Table]
    wrong: list[int] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


#: Answers stand beside the questions; None is one that failed, and never right.
Answers: TypeAlias = "Sequence[str | None]"


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read and scored.

    `read(data, images, split)` takes the directory, that of the pictures if it is elsewhere, and
    one of `splits` (the first is the one that is usually reported; empty: there are none). It
    raises OptionError for a directory that is not laid out as published. `max_tokens` are enough
    for an answer.
    """

    title: str
    paper: str
    max_tokens: int
    read: Callable[[Path, Path | None, str], list[Question]]
    score: Callable[[Sequence[Question], Answers], Scores]
    splits: tuple[str, ...] = ()


def tally(marks: Iterable[tuple[Iterable[str], bool]], order: Sequence[str] = ()) -> Table:
    """The accuracy of every group; a mark counts in all groups that it names.

    Groups in `order` come first, in it; the others as they appear.
    """
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    for groups, is_right in marks:
        for group in groups:
            asked[group] = asked.get(group, 0) + 1
            right[group] = right.get(group, 0) + is_right
    names = [name for name in order if name in asked]
    names += [name for name in asked if name not in order]
    return {name: {"accuracy": Share(right[name], asked[name])} for name in names}


def guessed(id: str, choices: Sequence[T]) -> T:
    """What counts where an answer chooses nothing: any choice, but always the same one.

    The scripts of ScienceQA's and MMMU's authors draw one anew in each run.
    """
    return random.Random(id).choice(choices)


def wrong_places(marks: Iterable[bool]) -> list[int]:
    """Where the marks are false."""
    return [place for place, is_right in enumerate(marks) if not is_right]


# ---- files --------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises OptionError."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as exc:
        raise OptionError(f"{path}: is not JSON ({exc})") from exc


def read_lines(path: Path, *texts: str) -> list[dict[str, Any]]:
    """Objects from lines of JSON, which must have `texts`. Raises OptionError."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise OptionError(f"{path}: line {number} is not JSON ({exc})") from exc
        check_fields(row, f"{path}: line {number}", *texts)
        rows.append(row)
    if not rows:
        raise OptionError(f"{path}: is empty")
    return rows


def read_records(path: Path, *texts: str) -> list[dict[str, Any]]:
    """Objects from a JSON list, which must have `texts`. Raises OptionError."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise OptionError(f"{path}: is not a JSON list of questions")
    for number, row in enumerate(rows, 1):
        check_fields(row, f"{path}: entry {number}", *texts)
    if not rows:
        raise OptionError(f"{path}: is empty")
    return rows


def read_objects(path: Path, *texts: str) -> dict[str, dict[str, Any]]:
    """Objects by name from a JSON object, which must have `texts`. Raises OptionError."""
    rows = read_json(path)
    if not isinstance(rows, dict):
        raise OptionError(f"{path}: is not a JSON object of questions by their names")
    for name, row in rows.items():
        check_fields(row, f"{path}: entry {name}", *texts)
    if not rows:
        raise OptionError(f"{path}: is empty")
    return rows


def check_fields(row: object, place: str, *texts: str) -> None:
    """Raises OptionError unless `row` is a JSON object that has these texts."""
    if not isinstance(row, dict):
        raise OptionError(f"{place} is not a JSON object")
    missing = [name for name in texts if not isinstance(row.get(name), str)]
    if missing:
        raise OptionError(f"{place} has no text in '{missing[0]}'")


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises OptionError."""
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as exc:
        raise OptionError(f"{path}: cannot be read ({getattr(exc, 'strerror', exc)})") from exc


def picture_folder(candidates: Iterable[Path], name: str) -> Path:
    """The first of the folders that holds the picture `name`, or else the first one.

    So the message about what is missing names the place where it is published.
    """
    folders = list(candidates)
    return next((folder for folder in folders if (folder / name).is_file()), folders[0])
