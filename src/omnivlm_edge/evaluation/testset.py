"""The generated test set: drawn scenes, of which everything is known (train/testset.py).

Descriptions are scored as by CHAIR: A. Rohrbach and others, "Object Hallucination in Image
Captioning", EMNLP 2018, arXiv 1809.02156; but a kind of thing counts once in a description,
however often it is named. Yes and no are told apart as in POPE, whose questions are asked, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import OptionError
from . import pope
from .benchmark import (
    Answers,
    Benchmark,
    Question,
    Scores,
    Share,
    Table,
    read_lines,
    read_objects,
    wrong_places,
)

LANGUAGES = ("en", "zh")

#: What a scene has: kind of thing -> how many.
Objects: TypeAlias = "Mapping[str, int]"

_DIGITS = {
    "en": "no one two three four five six seven eight nine ten eleven twelve".split(),
    "zh": "零一二三四五六七八九十",
}
_NUMBERS = {
    "en": {**{word: n for n, word in enumerate(_DIGITS["en"])}, "zero": 0, "none": 0},
    "zh": {
        "十一": 11,
        "十二": 12,
        **{sign: n for n, sign in enumerate(_DIGITS["zh"])},
        "两": 2,
        "没": 0,
    },
}
_NUMBER = {
    "en": re.compile(rf"\d+|\b(?:{'|'.join(_NUMBERS['en'])})\b", re.I),
    "zh": re.compile(rf"\d+|{'|'.join(_NUMBERS['zh'])}"),
}
_DENIAL = {
    "en": re.compile(r"\b(?:no|not|none|nothing|cannot)\b|n't\b", re.I),
    "zh": re.compile(r"[不没无]"),
}


class Vocabulary:
    """The names of things in one language, found in texts; the longest name counts.

    `objects` is what objects.json holds.
    """

    def __init__(self, objects: Mapping[str, Mapping[str, Any]], language: str) -> None:
        self.language = language
        self._meant: dict[str, tuple[str, int | None]] = {}
        for kind, texts in objects.items():
            for name in texts["names"][language]:
                self._meant.setdefault(name.lower(), (kind, None))
            for number, phrase in enumerate(texts["counted"][language], 1):
                for form in _forms(phrase.lower(), number):
                    self._meant.setdefault(form, (kind, number))
        self._phrases = self._pattern(self._meant)
        self._names = self._pattern(text for text, (_, n) in self._meant.items() if n is None)

    def mentions(self, text: str) -> list[tuple[str, int | None]]:
        """Kinds that a text names, in order, with the number that stands before the name."""
        return [self._meant[found.lower()] for found in self._phrases.findall(text)]

    def kinds(self, text: str) -> set[str]:
        """Kinds that a text names."""
        return {kind for kind, _ in self.mentions(text)}

    def counts(self, text: str) -> dict[str, int]:
        """How many of each kind there are, in a text; a kind of which it says two things has -1."""
        counts: dict[str, int] = {}
        for kind, number in self.mentions(text):
            if number is not None:
                counts[kind] = number if counts.get(kind, number) == number else -1
        return counts

    def numbers(self, text: str) -> set[int]:
        """All numbers in a text but those in names: of 一个三明治 it is 1."""
        found = _NUMBER[self.language].findall(self._names.sub(" ", text))
        values = _NUMBERS[self.language]
        return {int(word) if word.isdigit() else values[word.lower()] for word in found}

    def _pattern(self, texts: Any) -> re.Pattern[str]:
        longest_first = sorted(texts, key=len, reverse=True)
        any_of = "|".join(map(re.escape, longest_first))
        if self.language != "zh":  # Chinese has no spaces between words
            any_of = rf"(?<!\w)(?:{any_of})(?!\w)"
        return re.compile(any_of, re.I)


def _forms(phrase: str, number: int) -> Iterator[str]:
    """A counted name as objects.json has it, and in English with digits or an article, too."""
    yield phrase
    word, _, name = phrase.partition(" ")
    if name and _NUMBERS["en"].get(word) == number:
        yield f"{number} {name}"
        if number == 1:
            yield from (f"a {name}", f"an {name}")


# ---- rules --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a rule may look at: the names, what the scene has, and the right answer."""

    words: Vocabulary
    objects: Objects
    truth: str


def same_text(asked: Asked, answer: str) -> bool:
    """Word by word, whatever the case, the spaces and the full stop."""
    return _plain(answer) == _plain(asked.truth)


def right_caption(asked: Asked, answer: str) -> bool:
    """All things with their right numbers, and no others."""
    counts = asked.words.counts(answer)
    return counts == asked.objects and asked.words.kinds(answer) == counts.keys()


def right_number(asked: Asked, answer: str) -> bool:
    """The right number and no other, and of no other thing."""
    words = asked.words
    same = words.numbers(answer) == words.numbers(asked.truth)
    return same and words.kinds(answer) <= words.kinds(asked.truth)


def right_yes_or_no(asked: Asked, answer: str) -> bool:
    """As POPE tells yes and no apart."""
    language = asked.words.language
    return pope.says_yes(answer, language) == pope.says_yes(asked.truth, language)


def right_list(asked: Asked, answer: str) -> bool:
    """All kinds of things, and no others."""
    return asked.words.kinds(answer) == asked.objects.keys()


def denied(asked: Asked, answer: str) -> bool:
    """That there is no answer: it says no, not or the like, and names no other thing."""
    says_no = _DENIAL[asked.words.language].search(answer)
    return bool(says_no) and asked.words.kinds(answer) <= asked.words.kinds(asked.truth)


#: Of every kind of question but descriptions, in the order of the table.
RULES: dict[str, Callable[[Asked, str], bool]] = {
    "caption": right_caption,
    "count": right_number,
    "yesno": right_yes_or_no,
    "where": same_text,
    "colour": same_text,
    "relation": same_text,
    "setting": same_text,
    "list": right_list,
    "unanswerable": denied,
}
DESCRIPTION = "description"


def chair(descriptions: Sequence[tuple[set[str], set[str]]]) -> dict[str, Share | float]:
    """Hallucination in descriptions, of (kinds that are named, kinds that are there).

    CHAIR_i is the share of named kinds that are not there, CHAIR_s that of descriptions with such a
    kind, recall the share of kinds there that are named; and how many a description names.
    """
    named = sum(len(said) for said, _ in descriptions)
    invented = sum(len(said - there) for said, there in descriptions)
    present = sum(len(there) for _, there in descriptions)
    n = len(descriptions)
    return {
        "CHAIR_s": Share(sum(bool(said - there) for said, there in descriptions), n),
        "CHAIR_i": Share(invented, named),
        "recall": Share(sum(len(said & there) for said, there in descriptions), present),
        "objects": named / n if n else 0.0,
        "hallucinated": invented / n if n else 0.0,
    }


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".。!！")


# ---- files --------------------------------------------------------------------------------------


def read(data: Path, images: Path | None, split: str) -> list[Question]:
    """The questions on the scenes, and those of POPE where they are there."""
    for name in ("objects.json", "scenes.jsonl", "questions.jsonl"):
        if not (data / name).is_file():
            raise OptionError(f"{data}: holds no {name}, as train/testset.py writes it")
    words = _read_vocabularies(data / "objects.json")
    scenes = {}
    for number, row in enumerate(read_lines(data / "scenes.jsonl", "image"), 1):
        objects = row.get("objects")
        if not isinstance(objects, dict) or not all(type(n) is int for n in objects.values()):
            raise OptionError(f"{data / 'scenes.jsonl'}: line {number} has no numbers in 'objects'")
        scenes[row["image"]] = objects
    questions = []
    path = data / "questions.jsonl"
    rows = read_lines(path, "image", "kind", "language", "question", "answer")
    for number, row in enumerate(rows, 1):
        image, kind, language = row["image"], row["kind"], row["language"]
        if image not in scenes:
            raise OptionError(f"{path}: line {number} names '{image}', which scenes.jsonl lacks")
        if language not in LANGUAGES or (kind not in RULES and kind != DESCRIPTION):
            raise OptionError(
                f"{path}: line {number} has the kind '{kind}' and the language '{language}'; known "
                f"are {', '.join([*RULES, DESCRIPTION])}; {', '.join(LANGUAGES)}"
            )
        asked = Asked(words[language], scenes[image], row["answer"])
        questions.append(
            Question(
                id=str(row.get("id", number - 1)),
                key=image,
                pictures=((images or data) / image,),
                prompt=row["question"],
                truth=row["answer"],
                facts={"kind": kind, "language": language, "asked": asked},
            )
        )
    return [*questions, *_read_pope(data, images)]


def score(questions: Sequence[Question], answers: Answers) -> Scores:
    """Accuracy by kind of question and language, hallucination in descriptions, POPE."""
    scores = Scores({})
    marks = [True] * len(questions)
    for kind in (*RULES, DESCRIPTION, "pope"):
        places = [place for place, q in enumerate(questions) if q.facts["kind"] == kind]
        if not places:
            continue
        some = [questions[place] for place in places]
        their = [answers[place] for place in places]
        if kind == "pope":
            found = pope.score(some, their)
            scores.tables |= found.tables
            for wrong in found.wrong:
                marks[places[wrong]] = False
            continue
        right = [
            answer is not None and _mark(question, answer)
            for question, answer in zip(some, their, strict=True)
        ]
        for place, is_right in zip(places, right, strict=True):
            marks[place] = is_right
        for language in LANGUAGES:
            mine = [
                (question.facts["asked"], answer or "", is_right)
                for question, answer, is_right in zip(some, their, right, strict=True)
                if question.facts["language"] == language
            ]
            if mine:
                name, row = _row(kind, mine)
                table: Table = scores.tables.setdefault(name, {})
                table[f"{kind}, {language}"] = row
    for language in LANGUAGES:
        judged = [
            mark
            for question, mark in zip(questions, marks, strict=True)
            if question.facts["kind"] in RULES and question.facts["language"] == language
        ]
        if judged:
            share = Share(sum(judged), len(judged))
            scores.tables["questions"][f"all, {language}"] = {"accuracy": share}
    scores.wrong = wrong_places(marks)
    return scores


def _row(
    kind: str, answered: Sequence[tuple[Asked, str, bool]]
) -> tuple[str, dict[str, Share | float]]:
    """The table in which a kind of question stands, and its row there."""
    if kind == DESCRIPTION:
        pairs = [(asked.words.kinds(text), set(asked.objects)) for asked, text, _ in answered]
        return "descriptions", chair(pairs)
    n = len(answered)
    row: dict[str, Share | float] = {"accuracy": Share(sum(mark for *_, mark in answered), n)}
    if kind == "caption":
        row["kinds alone"] = Share(sum(right_list(asked, text) for asked, text, _ in answered), n)
    if RULES[kind] is not same_text:
        row["word by word"] = Share(sum(same_text(asked, text) for asked, text, _ in answered), n)
    return "questions", row


def _mark(question: Question, answer: str) -> bool:
    """Whether an answer is right; a description, whether all that it names is there."""
    asked: Asked = question.facts["asked"]
    if question.facts["kind"] == DESCRIPTION:
        return asked.words.kinds(answer) <= asked.objects.keys()
    return RULES[question.facts["kind"]](asked, answer)


def _read_vocabularies(path: Path) -> dict[str, Vocabulary]:
    objects = read_objects(path)
    for kind, texts in objects.items():
        for part in ("names", "counted"):
            for language in LANGUAGES:
                listed = texts.get(part)
                listed = listed.get(language) if isinstance(listed, dict) else None
                if not isinstance(listed, list) or not listed or not all(map(_is_text, listed)):
                    raise OptionError(f"{path}: entry {kind} has no texts in {part}.{language}")
    return {language: Vocabulary(objects, language) for language in LANGUAGES}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _read_pope(data: Path, images: Path | None) -> Iterator[Question]:
    if not any(data.glob("pope_*.json")):
        return
    for question in pope.read(data, images, ""):
        facts = {**question.facts, "kind": "pope"}
        # The same picture is the same key, here as above.
        key = f"images/{question.key}"
        yield Question(question.id, key, question.pictures, question.prompt, question.truth, facts)


BENCHMARK = Benchmark(
    title="The generated test set",
    paper="train/testset.py",
    max_tokens=256,
    read=read,
    score=score,
)
