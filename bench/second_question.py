"""Time to the first token of a second question on the same picture, against the first.

    python bench/second_question.py MODEL_DIR [--repeats 3] [--threads N] [--device cpu]

MODEL_DIR is what `bench/synthetic.py` wrote. A repeat is three processes of `omnivlm-edge` with a
disk cache that knows the model and not the picture: the first question, a chat of both, the second
question. One JSON object is appended to bench/results/second_question.jsonl; bench/report.py turns
the newest into the README's table.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from full_size import write_photo

from omnivlm_edge.machine import commit, describe_machine

RESULTS = Path(__file__).parent / "results" / "second_question.jsonl"
QUESTIONS = ("Describe the image", "What is the person wearing?")
CASES = ("first question", "second question, same process", "second question, new process")


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", type=int, help="CPU threads.  [default: all cores]")
@click.option("--device", default="cpu", show_default=True)
def main(model_dir: Path, repeats: int, threads: int | None, device: str) -> None:
    """Measure the model in MODEL_DIR and append to bench/results/second_question.jsonl."""
    threads = threads or len(os.sched_getaffinity(0))
    photo = write_photo(model_dir / "astronaut.png")
    command = [sys.executable, "-m", "omnivlm_edge", "run", model_dir / "synthetic-F16.gguf"]
    command += ["--mmproj", model_dir / "clip" / "mmproj-synthetic-F16.gguf"]
    command += ["--json", "-n", 16, "-t", threads, "--device", device]
    # Another picture: the files are hashed once, the first time that they are ever used.
    warm_up = [*command, "-i", Path(__file__).parents[1] / "examples" / "horses.png"]
    command += ["-i", photo]
    answers: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as home:
            ask([*warm_up, "-p", QUESTIONS[0]], home)
            (first,) = ask([*command, "-p", QUESTIONS[0]], home)
            _, second = ask(command, home, "\n".join(QUESTIONS))
            (new,) = ask([*command, "-p", QUESTIONS[1]], home)
        for case, answer in zip(CASES, (first, second, new), strict=True):
            answers[case].append(answer)
    record = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe_machine(),
        "llama_cpp_python": version("llama-cpp-python"),
        "device": device,
        "threads": threads,
        "repeats": repeats,
        "picture": "astronaut 512x512 (scikit-image)",
        "cases": {case: summary(found) for case, found in answers.items()},
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    click.echo(json.dumps(record, indent=1))


def ask(command: list[Any], home: str, questions: str = "") -> list[dict[str, Any]]:
    """One process; the reports of its answers."""
    result = subprocess.run(
        list(map(str, command)),
        input=questions,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMNIVLM_HOME": home},
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats."""

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 1)

    timings = [answer["timings"] for answer in answers]
    return {
        "encode_ms": median([t["image_encode_ms"] for t in timings]),
        "prompt_ms": median([t["prompt_ms"] for t in timings]),
        "ttft_ms": median([t["ttft_ms"] for t in timings]),
        **{key: answers[0]["usage"][key] for key in ("prompt_tokens", "cached_tokens")},
    }


if __name__ == "__main__":
    main()
