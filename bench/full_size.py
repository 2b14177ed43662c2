"""Run the full-size synthetic model on a real photograph, end to end; record time and memory.

    python bench/full_size.py MODEL_DIR [--repeats 5] [--threads N] [--device cpu]

MODEL_DIR is what `bench/synthetic.py` wrote. Each layout is measured in a process of its own, and
once more through the command line. One JSON object a layout is appended to
bench/results/full_size.jsonl.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from omnivlm_edge.machine import commit, describe_machine

RESULTS = Path(__file__).parent / "results" / "full_size.jsonl"
QUESTION = "Describe the image"
MAX_TOKENS = 64
STAGES = ("load", "preprocess", "encode", "prefill", "decode")


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", type=int, help="CPU threads.  [default: all cores]")
@click.option("--device", default="cpu", show_default=True)
def main(model_dir: Path, repeats: int, threads: int | None, device: str) -> None:
    """Measure the model in MODEL_DIR and append to bench/results/full_size.jsonl."""
    threads = threads or len(os.sched_getaffinity(0))
    photo = write_photo(model_dir / "astronaut.png")
    text = model_dir / "synthetic-F16.gguf"
    for layout in ("siglip", "clip"):
        mmproj = model_dir / layout / "mmproj-synthetic-F16.gguf"
        record = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": describe_machine(),
            "llama_cpp_python": version("llama-cpp-python"),
            "layout": layout,
            "device": device,
            "threads": threads,
            "repeats": repeats,
            "picture": "astronaut 512x512 (scikit-image)",
            "file_mb": {"text": megabytes(text), "mmproj": megabytes(mmproj)},
            **in_child(measure, text, mmproj, photo, repeats, threads, device),
            "command_line_seconds": command_line(text, mmproj, photo, threads, device),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        click.echo(json.dumps(record, indent=1))


def write_photo(path: Path) -> Path:
    from PIL import Image
    from skimage.data import astronaut

    Image.fromarray(astronaut()).save(path)
    return path


def measure(
    text: Path, mmproj: Path, photo: Path, repeats: int, threads: int, device: str
) -> dict[str, Any]:
    """Seconds of every stage (minimum and median) and the peak memory up to and in each phase."""
    from PIL import Image

    from omnivlm_edge import GenerateOptions, OmniVLM
    from omnivlm_edge.memory import peak_rss

    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    peak: dict[str, int] = {}
    with OmniVLM(text, mmproj, device=device, n_threads=threads, disk_cache=False) as model:
        peak["load"] = round(peak_rss() / 1e6)
        # Each time a picture that was not seen before; the first maps the file's pages and plans.
        pictures = [Image.open(photo).rotate(turn) for turn in range(repeats + 1)]
        model.encode(pictures.pop())
        for image in pictures:
            picture = model.encode(image)
            peak["encode"] = round(peak_rss() / 1e6)
            answer = model.answer(picture, QUESTION, GenerateOptions(max_tokens=MAX_TOKENS))
            peak["answer"] = round(peak_rss() / 1e6)
            seconds["preprocess"].append(picture.preprocess_seconds)
            seconds["encode"].append(picture.encode_seconds)
            for stage in ("load", "prefill", "decode"):
                seconds[stage].append(getattr(answer.timings, stage))
    return {
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "completion_tokens": answer.completion_tokens,
        "seconds": {
            stage: {"min": round(min(values), 4), "median": round(statistics.median(values), 4)}
            for stage, values in seconds.items()
        },
        "peak_rss_mb": peak,
    }


def in_child(function: Any, *arguments: Any) -> Any:
    """Peak memory is a process's own, so every case gets a fresh one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def command_line(text: Path, mmproj: Path, photo: Path, threads: int, device: str) -> float:
    """Wall-clock seconds of `omnivlm-edge run`, from nothing to the last token."""
    command = [sys.executable, "-m", "omnivlm_edge", "run", text, "--mmproj", mmproj, "-i", photo]
    command += ["-p", QUESTION, "-n", MAX_TOKENS, "--device", device, "-t", threads, "--no-cache"]
    started = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - started, 3)


def megabytes(path: Path) -> float:
    return round(path.stat().st_size / 1e6, 2)


if __name__ == "__main__":
    main()
