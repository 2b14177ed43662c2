"""ChartQA: questions about charts, by people and by a machine; numbers may be 5 % off.

A. Masry and others, "ChartQA: A Benchmark for Question Answering about Charts with Visual and
Logical Reasoning", Findings of ACL 2022, section 5.1; the layout is that of "ChartQA Dataset" in
github.com/vis-nlp/ChartQA. How a percent sign counts, which the paper leaves open, is as in
github.com/google-research/pix2struct (pix2struct/metrics.py), which others follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import OptionError
from .benchmark import Answers, Benchmark, Question, Scores, read_records, tally, wrong_places

TOLERANCE = 0.05
PARTS = ("human", "augmented")

# How LLaVA-1.5 (arXiv 2310.03744) asks for short answers, and models of its kind are trained.
SHORT_ANSWER = "Answer the question using a single word or phrase."


def is_right(answer: str, truth: str) -> bool:
    """Relaxed correctness: within 5 % of a number other than zero, or else the same text.

    Case does not matter. 12% is the number 0.12.
    """
    answer = answer.strip()
    said, wanted = _number(answer), _number(truth)
    if said is None or not wanted:  # of zero nothing is a share
        return answer.lower() == truth.lower()
    return abs(said - wanted) <= TOLERANCE * abs(wanted)


def read(data: Path, images: Path | None, split: str) -> list[Question]:
    """Questions of both parts; `data` is the data set's directory, or that of the split."""
    folder = data / split if (data / split).is_dir() else data
    questions = []
    for part in PARTS:
        path = folder / f"{split}_{part}.json"
        if not path.is_file():
            continue
        for number, row in enumerate(read_records(path, "imgname", "query", "label"), 1):
            questions.append(
                Question(
                    id=f"{part}:{number}",
                    key=row["imgname"],
                    pictures=((images or folder / "png") / row["imgname"],),
                    prompt=f"{row['query']}\n{SHORT_ANSWER}",
                    truth=row["label"],
                    facts={"part": part},
                )
            )
    if not questions:
        raise OptionError(
            f"{data}: holds neither {split}_human.json nor {split}_augmented.json, nor a folder "
            f"'{split}' that does"
        )
    return questions


def score(questions: Sequence[Question], answers: Answers) -> Scores:
    """Relaxed accuracy of each part, and of all questions."""
    marks = [
        answer is not None and is_right(answer, question.truth)
        for question, answer in zip(questions, answers, strict=True)
    ]
    groups = (
        (question.facts["part"], "all") if len(_parts(questions)) > 1 else (question.facts["part"],)
        for question in questions
    )
    table = tally(zip(groups, marks, strict=True), (*PARTS, "all"))
    return Scores({"relaxed accuracy": table}, wrong_places(marks))


def _parts(questions: Sequence[Question]) -> set[str]:
    return {question.facts["part"] for question in questions}


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


BENCHMARK = Benchmark(
    title="ChartQA",
    paper="ACL 2022, doi 10.18653/v1/2022.findings-acl.177",
    max_tokens=64,
    read=read,
    score=score,
    splits=("test", "val", "train"),
)
