"""POPE: is there a … in the picture? Half of the things asked for are not.

Y. Li and others, "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023,
arXiv 2305.10355; files and rules as in github.com/AoiDragon/POPE (output/coco, evaluate.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import OptionError
from .benchmark import (
    Answers,
    Benchmark,
    Question,
    Scores,
    Share,
    Table,
    picture_folder,
    read_lines,
    wrong_places,
)

#: How the absent things were chosen.
SAMPLINGS = ("random", "popular", "adversarial")

_CLAUSES = re.compile(r"[,.;:!?\n，。；：！？、]")
_CHINESE = re.compile("[\u4e00-\u9fff]")
_CHINESE_NO = re.compile(r"[不没否无]")
_CHINESE_SAYS = re.compile(r"[是有对不没否无]")


def says_yes(answer: str, language: str = "en") -> bool:
    """What an answer means; what is neither yes nor no counts as yes, as in the original.

    In English it is no where the first sentence, up to a full stop, has the word No, no or not. Of
    a Chinese answer, for which the original has no rule, the first clause that says anything
    decides.
    """
    if language == "zh" and _CHINESE.search(answer):
        text = re.sub("[没不]错", "是", answer)
        says = next(filter(_CHINESE_SAYS.search, _CLAUSES.split(text)), "")
        return not _CHINESE_NO.search(says)
    sentence = answer.split(".")[0].replace(",", "")
    return not {"No", "no", "not"} & set(sentence.split())


def read(data: Path, images: Path | None, split: str) -> list[Question]:
    """Questions of all samplings that are there, in `data` and, in Chinese, in `data`/zh."""
    questions = []
    for folder in (data, data / "zh"):
        for sampling in SAMPLINGS:
            paths = sorted(folder.glob(f"*pope_{sampling}.json"))
            if len(paths) > 1:
                raise OptionError(
                    f"{folder}: holds {paths[0].name} and {paths[1].name}; give each a directory"
                )
            for path in paths:
                questions += _read_file(path, images or data, sampling)
    if not questions:
        raise OptionError(
            f"{data}: holds no POPE files, such as coco_pope_{SAMPLINGS[0]}.json or "
            f"pope_{SAMPLINGS[0]}.json"
        )
    return questions


def score(questions: Sequence[Question], answers: Answers) -> Scores:
    """Accuracy, precision, recall, F1 and the share of yes, for each sampling and language."""
    wanted = [question.truth == "yes" for question in questions]
    said = [
        not label if answer is None else says_yes(answer, question.facts["language"])
        for question, label, answer in zip(questions, wanted, answers, strict=True)
    ]
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for question, label, yes in zip(questions, wanted, said, strict=True):
        pairs.setdefault(question.facts["group"], []).append((label, yes))
    table: Table = {group: _measures(their) for group, their in pairs.items()}
    for language in ("en", "zh"):
        names = [group_name(sampling, language) for sampling in SAMPLINGS]
        if all(name in pairs for name in names):
            mean = sum(_f1(pairs[name]) for name in names) / len(names)
            table[group_name("mean of the three", language)] = {"F1": mean}
    marks = [label == yes for label, yes in zip(wanted, said, strict=True)]
    return Scores({"POPE": table}, wrong_places(marks))


def group_name(sampling: str, language: str) -> str:
    """The name of a row."""
    return sampling if language == "en" else f"{sampling}, {language}"


def _measures(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Share | float]:
    """Of (what is so, what was said)."""
    both = sum(label and yes for label, yes in pairs)
    said = sum(yes for _, yes in pairs)
    return {
        "accuracy": Share(sum(label == yes for label, yes in pairs), len(pairs)),
        "precision": Share(both, said),
        "recall": Share(both, sum(label for label, _ in pairs)),
        "F1": _f1(pairs),
        "yes rate": Share(said, len(pairs)),
    }


def _f1(pairs: Sequence[tuple[bool, bool]]) -> float:
    """2 P R / (P + R), written without their division by zero."""
    both = sum(label and yes for label, yes in pairs)
    either = sum(label + yes for label, yes in pairs)
    return 2 * both / either if either else 0.0


def _read_file(path: Path, images: Path, sampling: str) -> list[Question]:
    rows = read_lines(path, "image", "text", "label")
    folders = (images, images / "images", images / "val2014", images.parent / "images")
    folder = picture_folder(folders, rows[0]["image"])
    questions = []
    for number, row in enumerate(rows, 1):
        if row["label"] not in ("yes", "no"):
            raise OptionError(f"{path}: question {number} has the label '{row['label']}'")
        language = "zh" if _CHINESE.search(row["text"]) else "en"
        questions.append(
            Question(
                id=f"{path.stem}:{row.get('question_id', number)}",
                key=row["image"],
                pictures=(folder / row["image"],),
                prompt=row["text"],
                truth=row["label"],
                facts={"group": group_name(sampling, language), "language": language},
            )
        )
    return questions


BENCHMARK = Benchmark(
    title="POPE",
    paper="arXiv 2305.10355",
    max_tokens=64,
    read=read,
    score=score,
)
