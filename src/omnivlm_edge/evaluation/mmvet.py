"""MM-Vet: open questions that a judge model scores; here they are answered, and not judged.

W. Yu and others, "MM-Vet: Evaluating Large Multimodal Models for Integrated Capabilities",
arXiv 2308.02490; files as in github.com/yuweihao/MM-Vet (mm-vet.zip; mm-vet_evaluator.py takes
answers by question, as in its results/).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import OptionError
from .benchmark import Answers, Benchmark, Question, Scores, Table, read_objects

PREDICTIONS = "mm-vet_predictions.json"
_NOTE = (
    f"MM-Vet needs a judge, who needs all answers: give {PREDICTIONS} to mm-vet_evaluator.py of "
    "the benchmark's authors (--mmvet_path DATA --result_path DIR --model mm-vet_predictions), or "
    "to their evaluator on Hugging Face"
)


def read(data: Path, images: Path | None, split: str) -> list[Question]:
    """The questions of mm-vet.json."""
    path = data / "mm-vet.json"
    if not path.is_file():
        raise OptionError(f"{data}: holds no mm-vet.json, which MM-Vet's zip file has")
    folder = images or data / "images"
    questions = []
    for name, row in read_objects(path, "imagename", "question", "answer").items():
        capability = row.get("capability")
        if not isinstance(capability, list) or not all(isinstance(c, str) for c in capability):
            raise OptionError(f"{path}: entry {name} has no list of texts in 'capability'")
        questions.append(
            Question(
                id=name,
                key=row["imagename"],
                pictures=(folder / row["imagename"],),
                prompt=row["question"],
                truth=row["answer"],
                facts={"capability": capability},
            )
        )
    return questions


def score(questions: Sequence[Question], answers: Answers) -> Scores:
    """No scores: how many questions were answered for each capability, and the judge's file."""
    asked: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    for question, answer in zip(questions, answers, strict=True):
        groups = [*question.facts["capability"], "all"]
        asked.update(groups)
        answered.update(groups if answer else ())
    order = sorted(asked, key=lambda name: (-asked[name], name))
    table: Table = {name: {"questions": asked[name], "answered": answered[name]} for name in order}
    given = {question.id: answer or "" for question, answer in zip(questions, answers, strict=True)}
    return Scores({"answered": table}, files={PREDICTIONS: given}, notes=[_NOTE])


BENCHMARK = Benchmark(
    title="MM-Vet",
    paper="arXiv 2308.02490",
    max_tokens=512,
    read=read,
    score=score,
)
