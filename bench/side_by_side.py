"""Measure this package beside llama.cpp, OpenVINO and PyTorch: same picture, shapes and threads.

    python bench/side_by_side.py MODEL_DIR [--threads 1,2] [--repeats 7] [--batch 1,2,4,8]
                                 [--only int8]

MODEL_DIR is what `bench/synthetic.py` wrote; what the others need is made of it, once,
in MODEL_DIR/side_by_side, with the logs of all. Every contender has a process of its own; they take
turns, so that all see the same state of the machine, and those that wait are stopped. All of them
together need about 16 GB of memory. Needs the extra `bench`; PyTorch and OpenVINO, which the extra
`contenders` brings, are recorded as skipped where they are not installed.

One JSON object for each contender and number of threads is appended to
bench/results/side_by_side.jsonl; bench/report.py makes the README's tables of the newest run,
bench/plots.py the pictures.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import click
from contenders import ANSWERERS, ENCODERS, STOCK_ANSWERER, STOCK_ENCODER
from contenders.base import MAX_TOKENS, Contender, Files, Question, Timed
from contenders.process import Child, ChildError

from omnivlm_edge.machine import commit, describe_machine

RESULTS = Path(__file__).parent / "results" / "side_by_side.jsonl"
SCRATCH = "side_by_side"
WIDTH, HEIGHT = 1046, 1568  # pixels
STAGES = ("preprocess", "encode", "prefill", "first_token", "decode")
BATCH_REPEATS = 2  # at most: batches take long, and their minimum is what is shown


class Numbers(click.ParamType):
    """Whole numbers from 1, with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers = value.split(",")
        if not all(number.isdecimal() and int(number) > 0 for number in numbers):
            self.fail(f"{value!r} is not a list of numbers such as 1,2,4")
        return tuple(map(int, numbers))


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--threads", type=Numbers(), help="One run for each.  [default: all cores]")
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True)
@click.option(
    "--batch", type=Numbers(), default=(), help="Pictures in a call; ours only, with most threads."
)
@click.option("--only", default="", help="Beside the stock path, those whose name has this.")
def main(
    model_dir: Path,
    threads: tuple[int, ...] | None,
    repeats: int,
    batch: tuple[int, ...],
    only: str,
) -> None:
    """Measure the model in MODEL_DIR and append to bench/results/side_by_side.jsonl."""
    files = Files(
        text=model_dir / "synthetic-F16.gguf",
        mmproj=model_dir / "clip" / "mmproj-synthetic-F16.gguf",
        scratch=model_dir / SCRATCH,
    )
    files.scratch.mkdir(exist_ok=True)
    pictures = write_photos(files.scratch, repeats + 1)
    run = datetime.now(timezone.utc).isoformat(timespec="seconds")
    counts = threads or (os.cpu_count() or 1,)
    for count in counts:
        about = {
            "run": run,
            "commit": commit(Path(__file__)),
            "machine": describe_machine(),
            "threads": count,
            "repeats": repeats,
            "picture": f"astronaut {WIDTH}x{HEIGHT} JPEG (scikit-image)",
        }
        encoders, answerers = (chosen(group, only) for group in (ENCODERS, ANSWERERS))
        batches = batch if count == max(counts) else ()
        append(about, measure_encoders(encoders, files, count, pictures, batches), STOCK_ENCODER)
        append(about, measure_answerers(answerers, files, count, pictures), STOCK_ANSWERER)


def chosen(group: Sequence[Contender], only: str) -> list[Contender]:
    """The stock path, which stands first, and those whose name has this text."""
    return [c for c in group if c is group[0] or only.lower() in c.name.lower()]


def write_photos(directory: Path, count: int) -> list[Path]:
    """A photograph, each time shifted by some pixels: what was seen before could be remembered."""
    import numpy as np
    from PIL import Image
    from skimage.data import astronaut

    photo = np.asarray(Image.fromarray(astronaut()).resize((WIDTH, HEIGHT)))
    paths = [directory / f"astronaut-{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(np.roll(photo, 40 * number, axis=1)).save(path, quality=90)
    return paths


# ---- measuring ----------------------------------------------------------------------------------


class Entrant:
    """A contender in its process, and what has been measured of it.

    One that has ended answers None to everything from then on; its record says why.
    """

    def __init__(self, contender: Contender, files: Files, kind: str) -> None:
        self.contender = contender
        self.record: dict[str, Any] = {
            "contender": contender.name,
            "kind": kind,
            "status": "ok",
            "reason": "",
            "libraries": {},
        }
        self._samples: dict[str, list[float]] = {}
        self._files = files
        self._child: Child | None = None

    def start(self, threads: int) -> None:
        """Makes its files in one process, and loads them in another: memory is the latter's."""
        self._child = Child(self.contender, self._files)
        self.ask("prepare")
        self.close()
        if self.record["status"] != "ok":
            return
        self._child = Child(self.contender, self._files)
        self.record["libraries"] = self.ask("libraries")
        self.record["load_seconds"] = self.ask("load", threads)

    def ask(self, method: str, *arguments: Any) -> Any:
        if self._child is None or self.record["status"] != "ok":
            return None
        try:
            return self._child.ask(method, *arguments)
        except ChildError as exc:
            click.echo(f"{self.contender.name}: {exc.status}: {exc}", err=True)
            self.record |= {"status": exc.status, "reason": str(exc)}
            return None

    def note(self, name: str, seconds: float | None) -> None:
        if seconds is not None:
            self._samples.setdefault(name, []).append(seconds)

    def note_peak(self) -> None:
        self.record["peak_rss_mb"] = self.ask("peak")

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
        self._child = None

    def finished(self) -> dict[str, Any]:
        return self.record | {"seconds": {k: summary(v) for k, v in self._samples.items()}}


@contextmanager
def started(
    contenders: Sequence[Contender], files: Files, kind: str, threads: int
) -> Iterator[list[Entrant]]:
    """Contenders, loaded one after the other; their processes end with the block."""
    entrants = [Entrant(contender, files, kind) for contender in contenders]
    try:
        for entrant in entrants:
            entrant.start(threads)
        yield entrants
    finally:
        for entrant in entrants:
            entrant.close()


def measure_encoders(
    contenders: Sequence[Contender],
    files: Files,
    threads: int,
    pictures: Sequence[Path],
    batch: Sequence[int],
) -> list[dict[str, Any]]:
    """Every picture encoded by all in turn; the first one to warm up. Batches by ours only."""
    with started(contenders, files, "encode", threads) as entrants:
        for entrant in entrants:
            entrant.ask("encode", pictures[0], 1)
        for picture in pictures[1:]:
            for entrant in entrants:
                entrant.note("encode", entrant.ask("encode", picture, 1))
        for entrant in entrants:  # before batches take more
            entrant.note_peak()
        ours = [entrant for entrant in entrants if entrant.contender.module == "ours"]
        for picture, entrant, count in product(pictures[1 : 1 + BATCH_REPEATS], ours, batch):
            entrant.note(f"batch {count}", entrant.ask("encode", picture, count))
        return [entrant.finished() for entrant in entrants]


def measure_answerers(
    contenders: Sequence[Contender], files: Files, threads: int, pictures: Sequence[Path]
) -> list[dict[str, Any]]:
    """A question about every picture answered by all in turn; the first one to warm up."""
    with started(contenders, files, "answer", threads) as entrants:
        for entrant in entrants:
            entrant.ask("answer", ask_about(pictures[0], 0))
        for number, picture in enumerate(pictures[1:], 1):
            for entrant in entrants:
                note_answer(entrant, entrant.ask("answer", ask_about(picture, number)))
        for entrant in entrants:
            entrant.note_peak()
        return [entrant.finished() for entrant in entrants]


def ask_about(picture: Path, number: int) -> Question:
    """The system text tells questions apart, so that no beginning of a prompt can be remembered."""
    return Question(picture, f"{number} You are a helpful assistant.", "Describe the image")


def note_answer(entrant: Entrant, timed: Timed | None) -> None:
    if timed is None:
        return
    if timed.answer_tokens != MAX_TOKENS:
        raise click.ClickException(f"an answer of {timed.answer_tokens} tokens, not {MAX_TOKENS}")
    for stage in STAGES:
        entrant.note(stage, asdict(timed)[stage])
    entrant.record["prompt_tokens"] = timed.prompt_tokens
    entrant.record["answer_tokens"] = timed.answer_tokens


# ---- records ------------------------------------------------------------------------------------


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "samples": [round(value, 5) for value in seconds],
        "min": round(min(seconds), 5),
        "median": round(statistics.median(seconds), 5),
    }


def with_ratios(records: Sequence[dict[str, Any]], stock: str) -> list[dict[str, Any]]:
    """Each record with its seconds divided by the stock path's, minimum and median."""
    base = next(record for record in records if record["contender"] == stock)["seconds"]
    return [
        record
        | {
            "ratio_to_stock": {
                stage: {key: round(found[key] / base[stage][key], 4) for key in ("min", "median")}
                for stage, found in record["seconds"].items()
                if stage in base
            }
        }
        for record in records
    ]


def append(about: dict[str, Any], records: Sequence[dict[str, Any]], stock: str) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        for record in with_ratios(records, stock):
            file.write(json.dumps(about | record) + "\n")
            click.echo(line(record))


def line(record: dict[str, Any]) -> str:
    """A record in short."""
    if record["status"] != "ok":
        return f"{record['contender']}: {record['status']}: {record['reason']}"
    seconds = ", ".join(f"{name} {found['min']:.3f} s" for name, found in record["seconds"].items())
    return f"{record['contender']}: {seconds}; {record['peak_rss_mb']} MB"


if __name__ == "__main__":
    main()
