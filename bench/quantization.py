"""Quantize a model by every recipe; record size, loss, speed and memory of each.

    python bench/quantization.py MODEL_DIR SCRATCH_DIR [--images DIR] [--questions FILE]
                                 [--imatrix FILE] [--recipes q8_0,q4_k_m] [--repeats 3]

MODEL_DIR holds a text model and its vision file in F16. One JSON object a recipe is appended to
bench/results/quantization.jsonl; bench/report.py turns them into the README's tables.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import click
from full_size import in_child, measure, write_photo

from omnivlm_edge import ModelFiles, QuantizeOptions, compare_models, quantize_file
from omnivlm_edge.compare import read_questions
from omnivlm_edge.device import check_threads
from omnivlm_edge.machine import commit, describe_machine
from omnivlm_edge.models import find_model
from omnivlm_edge.quantize.file import output_name
from omnivlm_edge.sources import find_pictures

RESULTS = Path(__file__).parent / "results" / "quantization.jsonl"
RECIPES = "q8_0,q6_k,q5_k_m,q4_k_m,q4_k_s,iq4_nl,q4_0"


@click.command()
@click.argument("model", type=str)
@click.argument("scratch", type=click.Path(file_okay=False, path_type=Path))
@click.option("--images", help="Pictures for the loss.  [default: 8 made ones]")
@click.option("--questions", type=click.Path(path_type=Path), help="As `compare --questions`.")
@click.option("--imatrix", type=click.Path(path_type=Path), help="As `quantize --imatrix`.")
@click.option("--recipes", default=RECIPES, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", type=int, help="CPU threads.  [default: all]")
def main(
    model: str,
    scratch: Path,
    images: str | None,
    questions: Path | None,
    imatrix: Path | None,
    recipes: str,
    repeats: int,
    threads: int | None,
) -> None:
    """Measure MODEL by every recipe; the files are written into SCRATCH."""
    threads = check_threads(threads)
    source = find_model(model)
    scratch.mkdir(parents=True, exist_ok=True)
    photo = write_photo(scratch / "astronaut.png")
    builds, seconds = [source], [0.0]
    for recipe in recipes.split(","):
        started = time.perf_counter()
        builds.append(_quantize(source, scratch / recipe, recipe, imatrix, threads))
        seconds.append(round(time.perf_counter() - started, 1))
    speeds = [
        in_child(measure, files.text, files.mmproj, photo, repeats, threads, "cpu")
        for files in builds
    ]
    pictures = find_pictures(images) if images else None
    exam = read_questions(questions) if questions else ()
    losses = compare_models(
        source, builds[1:], pictures, questions=exam, device="cpu", n_threads=threads
    )
    for recipe, took, speed, loss in zip(
        ["f16", *recipes.split(",")], seconds, speeds, losses, strict=True
    ):
        record = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": describe_machine(),
            "llama_cpp_python": version("llama-cpp-python"),
            "threads": threads,
            "repeats": repeats,
            "model": source.text.stem,
            "recipe": recipe,
            "imatrix": imatrix is not None,
            "pictures": "made" if pictures is None else len(pictures),
            "questions": len(exam),
            "quantize_seconds": took,
            "loss": asdict(loss) | {"name": recipe},
            **speed,
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        click.echo(json.dumps(record))


def _quantize(
    source: ModelFiles, out: Path, recipe: str, imatrix: Path | None, threads: int
) -> ModelFiles:
    options = QuantizeOptions(imatrix=imatrix)
    text, mmproj = (
        quantize_file(path, out / output_name(path, recipe), recipe, options, n_threads=threads)
        for path in (source.text, source.mmproj)
    )
    return ModelFiles(text=text, mmproj=mmproj)


if __name__ == "__main__":
    main()
