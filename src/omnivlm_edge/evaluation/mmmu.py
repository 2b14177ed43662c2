"""MMMU: college questions of 30 subjects, most with choices, some with a word or number to find.

X. Yue and others, "MMMU: A Massive Multi-discipline Multimodal Understanding and Reasoning
Benchmark for Expert AGI", CVPR 2024, arXiv 2311.16502; the files are those of the data set
MMMU/MMMU on Hugging Face, the rules those of github.com/MMMU-Benchmark/MMMU (eval/).
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..batch.inputs import Source, open_parquet
from ..errors import OptionError
from .benchmark import (
    Answers,
    Benchmark,
    Picture,
    Question,
    Scores,
    check_fields,
    guessed,
    read_records,
    tally,
    wrong_places,
)
from .chartqa import SHORT_ANSWER
from .scienceqa import LETTER_ANSWER

PREDICTIONS = "mmmu_predictions.json"
DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": (
        "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
        "Public_Health"
    ),
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": (
        "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
        "Materials Mechanical_Engineering"
    ),
}
MOST_PICTURES = 7

_ORDER = ["all"]
_DISCIPLINE_OF: dict[str, str] = {}
for _discipline, _subjects in DISCIPLINES.items():
    _ORDER += [_discipline, *_subjects.split()]
    _DISCIPLINE_OF.update(dict.fromkeys(_subjects.split(), _discipline))

_IMAGES = tuple(f"image_{number}" for number in range(1, MOST_PICTURES + 1))
_TEXTS = ("id", "question", "options", "answer", "question_type")

# What may stand before the answer in a sentence; in the last one, an equals sign as well.
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234,567
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.5e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 12, 1.5, .5
)


# ---- rules --------------------------------------------------------------------------------------


def chosen(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses; `choices` are the letters' texts.

    Letters in brackets count before those that stand alone, those before the text of a choice in
    an answer of more than five words; of several the last one counts. None where there is none.
    """
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in choices}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    if len(text.split()) > 5:
        places = {letter: text.lower().rfind(choice.lower()) for letter, choice in choices.items()}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    return None


def is_right_open(answer: str, truths: Sequence[str]) -> bool:
    """Whether a sentence's last part has the word, or one of its numbers is the number.

    Numbers count to two decimals.
    """
    wanted = [form for truth in truths for form in _forms(truth)]
    for said in _candidates(answer):
        if isinstance(said, str):
            if any(isinstance(form, str) and form in said for form in wanted):
                return True
        elif said in wanted:
            return True
    return False


def _candidates(answer: str) -> Iterator[str | float]:
    """What an answer may say: the shortest end of each sentence that leads to one, and numbers."""
    text = answer.strip().strip(".").lower()
    # The original means to part sentences, too, but looks for capitals in small letters.
    sentences = text.split("\n")
    ends = []
    for sentence in sentences:
        leads = _LEADS + (("=",) if sentence is sentences[-1] else ())
        found = [sentence.split(lead)[-1].strip() for lead in leads if lead in sentence]
        end = min(filter(None, found), key=len, default="")
        if end and end not in (":", ",", ".", "!", "?", ";", "'"):
            ends.append(end)
    for end in ends or [text]:
        yield from _forms(end)
        for pattern in _NUMBERS:
            for number in re.findall(pattern, end):
                yield from _forms(number)


def _forms(text: str) -> list[str] | list[float]:
    """A text as it is compared: a number, or small letters; one letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


# ---- files --------------------------------------------------------------------------------------


def read(data: Path, images: Path | None, split: str) -> list[Question]:
    """The questions of a split, subject by subject, of Parquet files or JSON lists of such rows."""
    questions: list[Question] = []
    for path in sorted(data.rglob(f"{split}-*.parquet")):
        questions += _read_parquet(path)
    if not questions:
        for path in sorted(data.rglob(f"{split}.json")):
            for row in read_records(path, "id", "question", "answer", "question_type"):
                pictures = [row[name] for name in _IMAGES if row.get(name)]
                if not all(isinstance(name, str) for name in pictures):
                    raise OptionError(f"{path}: {row['id']} has a picture that is no file's name")
                folder = images or path.parent
                questions.append(_question(row, tuple(folder / name for name in pictures), path))
    if not questions:
        raise OptionError(
            f"{data}: holds no {split}-*.parquet, as MMMU's folders of subjects do, and no "
            f"{split}.json"
        )
    return questions


def score(questions: Sequence[Question], answers: Answers) -> Scores:
    """Accuracy of all, by discipline and subject; without answers, as in the test split, none."""
    given: dict[str, str] = {}
    marks = []
    n_guessed = 0
    for question, answer in zip(questions, answers, strict=True):
        choices, truths = question.facts["choices"], question.facts["truths"]
        if answer is None:
            given[question.id] = ""
            marks.append(False)
        elif choices:
            letter = chosen(answer, choices)
            n_guessed += letter is None
            given[question.id] = letter or guessed(question.id, list(choices))
            marks.append(given[question.id] in truths)
        else:
            given[question.id] = answer
            marks.append(is_right_open(answer, truths))
    scores = Scores({}, files={PREDICTIONS: given})
    if n_guessed:
        scores.notes.append(
            f"{n_guessed} of {len(questions)} answers choose nothing: a letter was drawn for them, "
            "as the benchmark's rules say"
        )
    if all(question.facts["truths"] == ["?"] for question in questions):
        scores.notes.append(f"this split's answers are not public: submit {PREDICTIONS}")
        return scores
    groups = (question.facts["groups"] for question in questions)
    scores.tables["accuracy"] = tally(zip(groups, marks, strict=True), _ORDER)
    scores.wrong = wrong_places(marks)
    return scores


def _read_parquet(path: Path) -> Iterator[Question]:
    with open_parquet(str(path)) as file:
        names = file.schema_arrow.names
        missing = [name for name in (*_TEXTS, _IMAGES[0]) if name not in names]
        if missing:
            raise OptionError(f"{path}: has no column '{missing[0]}', as MMMU's files do")
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=list(_TEXTS)).to_pylist()
            shown = {name: _is_there(file, group, name) for name in _IMAGES if name in names}
            for place, row in enumerate(rows):
                check_fields(row, f"{path}: row {place + 1} of group {group}", *_TEXTS)
                pictures = tuple(
                    _opener(path, group, place, name) for name in shown if shown[name][place]
                )
                yield _question(row, pictures, path)


def _is_there(file: Any, group: int, name: str) -> list[bool]:
    """Which rows have a picture in this column; it is not kept."""
    column = file.read_row_group(group, columns=[f"{name}.bytes"]).column(name)
    there: list[bool] = column.flatten()[0].is_valid().to_pylist()
    return there


def _opener(path: Path, group: int, place: int, name: str) -> Callable[[], Source]:
    def open_picture() -> Source:
        content: bytes = _pictures(path, group)[place][name]["bytes"]
        return content

    return open_picture


@functools.lru_cache(maxsize=1)  # questions come in their order
def _pictures(path: Path, group: int) -> list[dict[str, Any]]:
    with open_parquet(str(path)) as file:
        there = [name for name in _IMAGES if name in file.schema_arrow.names]
        rows: list[dict[str, Any]] = file.read_row_group(group, columns=there).to_pylist()
        return rows


def _question(row: dict[str, Any], pictures: tuple[Picture, ...], path: Path) -> Question:
    place = f"{path}: {row['id']}"
    id, options = row["id"], _as_list(row.get("options"))
    truths = _as_list(row["answer"]) or [row["answer"]]
    subject = "_".join(id.split("_")[1:-1])  # of validation_Art_Theory_1
    if not subject:
        raise OptionError(f"{place} is no name such as validation_Accounting_1")
    if row["question_type"] == "multiple-choice":
        if len(options) < 2:
            raise OptionError(f"{place} has no choices in 'options'")
        choices = {chr(ord("A") + i): option for i, option in enumerate(options)}
        listed = "\n".join(f"({letter}) {option}" for letter, option in choices.items())
        prompt = f"{row['question']}\n\n{listed}\n\n{LETTER_ANSWER}"
    else:
        choices = {}
        prompt = f"{row['question']}\n\n{SHORT_ANSWER}"
    return Question(
        id=id,
        key=id,
        pictures=pictures,
        prompt=prompt,
        truth=" or ".join(
            f"{truth}: {choices[truth]}" if truth in choices else truth for truth in truths
        ),
        facts={
            "choices": choices,
            "truths": truths,
            "groups": ("all", _DISCIPLINE_OF.get(subject, "other"), subject),
        },
    )


def _as_list(value: object) -> list[str]:
    """Of a list, or of one that is written as Python would, as in the files; empty for others."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.startswith("[") else None
        except (ValueError, SyntaxError):
            value = None
    return [str(each) for each in value] if isinstance(value, list) else []


BENCHMARK = Benchmark(
    title="MMMU",
    paper="arXiv 2311.16502",
    max_tokens=128,
    read=read,
    score=score,
    splits=("validation", "dev", "test"),
)
