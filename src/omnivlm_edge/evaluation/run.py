"""Questions -> rows, by batch/ -> scores -> files that tell of them.

OUT/answers.jsonl     a row for each picture and prompt, as `omnivlm-edge batch` writes them
OUT/result.json       scores, and all that they depend on        OUT/result.md  the same for people
OUT/failures.png      examples of wrong answers                  and what else a benchmark makes
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..batch.inputs import Item
from ..batch.output import decode_row, key_of
from ..batch.runner import Row, Work
from ..device import check_threads
from ..engine import OmniVLM
from ..errors import OptionError
from ..files import write_whole
from ..machine import commit, describe_machine
from .benchmark import Answers, Benchmark, Picture, Question, Scores, Share, Table, opened
from .failures import draw_sheet

ANSWERS = "answers.jsonl"
RESULT = "result.json"
FAILURES = "failures.png"


def choose(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """`limit` of the questions, drawn at random but always alike, in their order.

    A larger limit has those of a smaller one, too.
    """
    if limit is None or limit >= len(questions):
        return list(questions)
    places = list(range(len(questions)))
    random.Random(0).shuffle(places)
    return [questions[place] for place in sorted(places[:limit])]


def check_pictures(questions: Iterable[Question]) -> None:
    """Raises OptionError for the first picture in a file that is not there."""
    for question in questions:
        for picture in question.pictures:
            if isinstance(picture, Path) and not picture.is_file():
                raise OptionError(
                    f"{picture}: is not there, the picture of question {question.id}; if pictures "
                    "lie elsewhere, name their folder with --images"
                )


def digest(questions: Iterable[Question]) -> str:
    """The SHA-256 of what is asked."""
    asked = [[question.key, question.prompt] for question in questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def pending(
    questions: Iterable[Question],
    is_new: Callable[[str, str], bool],
    skipped: Callable[[int], None],
) -> Iterator[Work]:
    """What is still to be answered, a picture once with all its prompts."""
    shown: dict[str, tuple[Picture, ...]] = {}
    prompts: dict[str, dict[str, None]] = {}
    for question in questions:
        shown.setdefault(question.key, question.pictures)
        prompts.setdefault(question.key, {})[question.prompt] = None
    for key, asked in prompts.items():
        new = tuple(prompt for prompt in asked if is_new(key, prompt))
        if len(new) < len(asked):
            skipped(len(asked) - len(new))
        if new:
            yield Work(Item(key, tuple(map(opened, shown[key]))), new)


def count(questions: Iterable[Question]) -> int:
    """How many rows there will be."""
    return len({(question.key, question.prompt) for question in questions})


def read_answers(path: Path, questions: Sequence[Question]) -> list[Row | None]:
    """The row of each question, of the journal of a run; None where there is none."""
    rows: dict[tuple[str, str], Row] = {}
    with path.open("rb") as file:
        for line in file:
            row = decode_row(line)
            if row is not None:
                rows[key_of(row), row["prompt"]] = row
    return [rows.get((question.key, question.prompt)) for question in questions]


def describe(engine: OmniVLM, n_threads: int | None) -> dict[str, Any]:
    """What answers, where: for result.json."""
    return {
        "version": version("omnivlm-edge"),
        "commit": commit(),
        "machine": describe_machine(),
        "device": engine.device,
        "vision_device": engine.vision_device,
        "vision_precision": engine.vision_precision,
        "threads": check_threads(n_threads),
    }


def read_ran(folder: Path) -> dict[str, Any] | None:
    """What gave the answers of a finished run, which asks nothing more."""
    try:
        ran = json.loads((folder / RESULT).read_text("utf-8"))["ran"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return ran if isinstance(ran, dict) else None


def report(
    folder: Path,
    benchmark: Benchmark,
    questions: Sequence[Question],
    rows: Sequence[Row | None],
    about: Mapping[str, Any],
) -> str:
    """Scores the answers, writes the files, and returns what result.md has. Raises OSError.

    `about` is what the scores depend on, for result.json.
    """
    answers: Answers = [row["answer"] if row else None for row in rows]
    scores = benchmark.score(questions, answers)
    failed = sum(answer is None for answer in answers)
    if failed:
        scores.notes.append(
            f"{failed} of {len(questions)} questions failed, and count as wrong: --retry-errors "
            "asks them again"
        )
    result = {
        **about,
        "questions": len(questions),
        "failed": failed,
        "scores": {name: _plain_table(table) for name, table in scores.tables.items()},
        "notes": scores.notes,
    }
    text = _markdown(benchmark, about, len(questions), scores)
    files = {RESULT: result, **scores.files}
    for name, content in files.items():
        whole = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_whole(folder / name, whole.encode(errors="backslashreplace"))  # in JSON an escape
    write_whole(folder / "result.md", text.encode(errors="backslashreplace"))
    sheet = draw_sheet(_examples(questions, answers, scores.wrong))
    if sheet is None:
        with contextlib.suppress(FileNotFoundError):
            (folder / FAILURES).unlink()  # of an earlier run
    else:
        write_whole(folder / FAILURES, sheet)
    return text


def _examples(
    questions: Sequence[Question], answers: Answers, wrong: Sequence[int]
) -> Iterator[tuple[Question, str | None]]:
    """Wrong answers in an order in which any first few of them are of many kinds and pictures."""
    order = list(wrong)
    random.Random(0).shuffle(order)
    shown: set[str] = set()
    again = []
    for place in order:
        if questions[place].key in shown:
            again.append(place)
            continue
        shown.add(questions[place].key)
        yield questions[place], answers[place]
    for place in again:
        yield questions[place], answers[place]


# ---- tables -------------------------------------------------------------------------------------


def _plain_table(table: Table) -> dict[str, dict[str, Any]]:
    """For JSON: shares as value, lower and upper limit, and what they are shares of."""
    return {
        group: {measure: _plain_value(value) for measure, value in row.items()}
        for group, row in table.items()
    }


def _plain_value(value: Share | float) -> Any:
    if not isinstance(value, Share):
        return value if isinstance(value, int) else round(value, 6)
    low, high = value.interval or (None, None)
    numbers = {"value": value.value, "low": low, "high": high}
    rounded = {name: None if x is None else round(x, 6) for name, x in numbers.items()}
    return rounded | {"part": value.part, "n": value.whole}


def _markdown(
    benchmark: Benchmark, about: Mapping[str, Any], n_questions: int, scores: Scores
) -> str:
    lines = [f"# {benchmark.title} ({benchmark.paper})", ""]
    for name, table in scores.tables.items():
        lines += [f"**{name}**", "", *_table(table), ""]
    lines += [f"{note}." for note in scores.notes]
    lines += [""] if scores.notes else []
    lines.append(_conditions(about, n_questions))
    return "\n".join(lines) + "\n"


def _table(table: Table) -> Iterator[str]:
    """Lines of Markdown whose columns stand below each other as plain text, too.

    n is what a row's first share is a share of.
    """
    measures = list(dict.fromkeys(measure for row in table.values() for measure in row))
    cells = [["", "n", *measures]]
    for group, row in table.items():
        shares = (value for value in row.values() if isinstance(value, Share))
        n = next((str(share.whole) for share in shares), "")
        cells.append([group, n, *(_shown(row[name]) if name in row else "" for name in measures)])
    used = [i for i in range(len(cells[0])) if i == 0 or any(row[i] for row in cells[1:])]
    widths = {i: max(3, *(len(row[i]) for row in cells)) for i in used}
    for place, line in enumerate(cells):
        padded = [line[i].ljust(widths[i]) if i == 0 else line[i].rjust(widths[i]) for i in used]
        yield f"| {' | '.join(padded)} |"
        if place == 0:
            rulers = ["-" * widths[i] if i == 0 else "-" * (widths[i] - 1) + ":" for i in used]
            yield f"| {' | '.join(rulers)} |"


def _shown(value: Share | float) -> str:
    if not isinstance(value, Share):
        return str(value) if isinstance(value, int) else f"{value:.3f}"
    if value.value is None or value.interval is None:
        return "-"
    low, high = value.interval
    return f"{value.value:.1%} ({low:.1%} to {high:.1%})"


def _conditions(about: Mapping[str, Any], n_questions: int) -> str:
    """What the tables were measured with."""
    model, ran = about["model"], about["ran"]
    digests = [(model[part]["sha256"] or "unknown")[:12] for part in ("text", "mmproj")]
    limit = " drawn from more" if about["limit"] is not None else ""
    split = f", split {about['split']}" if about["split"] else ""
    return (
        f"{n_questions} questions{limit}{split}; in brackets Wilson's 95 % intervals. "
        f"Model {model['name']} ({model['text']['file']} {digests[0]}, {model['mmproj']['file']} "
        f"{digests[1]}), greedy, at most {about['options']['max_tokens']} tokens"
        + (
            f"; vision precision {ran['vision_precision']}; omnivlm-edge {ran['version']}, commit "
            f"{ran['commit']}; {ran['device']}, {ran['machine']['cpu']}, threads: {ran['threads']}."
            if ran
            else "."
        )
    )
