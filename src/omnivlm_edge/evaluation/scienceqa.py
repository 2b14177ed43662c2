"""ScienceQA: school questions with choices, about half of them with a picture.

P. Lu and others, "Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question
Answering", NeurIPS 2022, arXiv 2209.09513; files and breakdown as in github.com/lupantech/ScienceQA
(data/scienceqa, tools/evaluate_acc.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError
from .benchmark import (
    Answers,
    Benchmark,
    Question,
    Scores,
    guessed,
    picture_folder,
    read_json,
    read_objects,
    tally,
    wrong_places,
)

LETTERS = "ABCDE"

# How LLaVA-1.5 (arXiv 2310.03744) asks for a choice, and models of its kind are trained.
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."

_GROUPS = (
    *("natural science", "social science", "language science"),
    *("text context", "image context", "no context"),
    *("grades 1-6", "grades 7-12", "all"),
)


def chosen(answer: str, n_choices: int) -> int | None:
    """Which choice an answer names, from 0 on: a letter first, or "the answer is" and a letter.

    None where it names no choice.
    """
    found = re.match(r"\(?([A-E])(?:[).:,]|\s*$)", answer.strip())
    found = found or re.search(r"[Tt]he answer is:? \(?([A-E])\b", answer)
    place = LETTERS.index(found[1]) if found else n_choices
    return place if place < n_choices else None


def read(data: Path, images: Path | None, split: str) -> list[Question]:
    """The questions of a split: those without a picture, too, as in the official score."""
    problems_file, splits_file = data / "problems.json", data / "pid_splits.json"
    for path in (problems_file, splits_file):
        if not path.is_file():
            raise OptionError(f"{data}: holds no {path.name}, as ScienceQA's data/scienceqa does")
    problems = read_objects(problems_file, "question", "hint", "grade", "subject")
    splits = read_json(splits_file)
    ids = splits.get(split) if isinstance(splits, dict) else None
    if not isinstance(ids, list) or not ids:
        raise OptionError(f"{splits_file}: has no questions in '{split}'")
    questions = []
    for id in map(str, ids):
        if id not in problems:
            raise OptionError(f"{problems_file}: lacks question {id} of {splits_file.name}")
        questions.append(_question(id, problems[id], problems_file, images))
    return questions


def score(questions: Sequence[Question], answers: Answers) -> Scores:
    """Accuracy over all, by subject, context and grade."""
    picks = [
        None if answer is None else chosen(answer, question.facts["choices"])
        for question, answer in zip(questions, answers, strict=True)
    ]
    marks = []
    n_guessed = 0
    for question, answer, pick in zip(questions, answers, picks, strict=True):
        if answer is not None and pick is None:
            pick = guessed(question.id, range(question.facts["choices"]))
            n_guessed += 1
        marks.append(pick == question.facts["answer"])
    groups = (question.facts["groups"] for question in questions)
    scores = Scores(
        {"accuracy": tally(zip(groups, marks, strict=True), _GROUPS)}, wrong_places(marks)
    )
    if n_guessed:
        scores.notes.append(
            f"{n_guessed} of {len(questions)} answers name no choice: one was drawn for them, as "
            "the benchmark's rules say"
        )
    return scores


def _question(id: str, row: dict[str, Any], path: Path, images: Path | None) -> Question:
    place = f"{path}: entry {id}"
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise OptionError(f"{place} has no 2 to {len(LETTERS)} 'choices'")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise OptionError(f"{place} has no answer from 0 to {len(choices) - 1}")
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
    prompt = (
        f"Context: {row['hint'].strip() or 'N/A'}\nQuestion: {row['question']}\n"
        f"Options: {options}\n{LETTER_ANSWER}"
    )
    pictures: tuple[Path, ...] = ()
    if row.get("image"):
        name = f"{row.get('split')}/{id}/{row['image']}"
        folders = [images] if images else [path.parent / "images", path.parent]
        pictures = (picture_folder(folders, name) / name,)
    return Question(
        id=id,
        key=id,
        pictures=pictures,
        prompt=prompt,
        truth=f"{LETTERS[answer]}: {choices[answer]}",
        facts={
            "answer": answer,
            "choices": len(choices),
            "groups": [*_groups(row, bool(pictures), place), "all"],
        },
    )


def _groups(row: dict[str, Any], has_picture: bool, place: str) -> Iterator[str]:
    """The rows of the official table to which a question belongs."""
    yield row["subject"]
    if row["hint"]:
        yield "text context"
    if has_picture:
        yield "image context"
    if not row["hint"] and not has_picture:
        yield "no context"
    grade = re.fullmatch(r"grade(\d+)", row["grade"])
    if grade is None:
        raise OptionError(f"{place} has the grade '{row['grade']}', which is no grade")
    yield "grades 1-6" if int(grade[1]) <= 6 else "grades 7-12"


BENCHMARK = Benchmark(
    title="ScienceQA",
    paper="arXiv 2209.09513",
    max_tokens=64,
    read=read,
    score=score,
    splits=("test", "val", "minival", "train"),
)
