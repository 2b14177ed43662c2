"""What our decode loop costs over a bare loop of llama.cpp's, on the same context.

    python bench/decode_overhead.py MODEL_DIR [--text FILE] [--steps 48] [--rounds 10] [--threads N]

MODEL_DIR is what `bench/synthetic.py` wrote; FILE another build of its text model. Three loops take
turns in one process: `decode` is llama-bench's, `llama_decode` of one token after the other;
`sample` adds llama.cpp's greedy sampler; `ours` is `OmniVLM.generate`. Of each step the time inside
`llama_decode` and the time outside are taken apart: the inside is the same work in all three, and
varies by more than the outside lasts. One JSON object is appended to
bench/results/decode_overhead.jsonl.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import llama_cpp
import numpy as np
from full_size import megabytes

from omnivlm_edge import GenerateOptions, ImageEmbedding, OmniVLM
from omnivlm_edge.device import check_threads
from omnivlm_edge.machine import commit, describe_machine

RESULTS = Path(__file__).parent / "results" / "decode_overhead.jsonl"
QUESTION = "Describe the image"


@click.command()
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--steps", default=48, show_default=True)
@click.option("--rounds", default=10, show_default=True)
@click.option("--threads", type=int, help="CPU threads.  [default: all]")
def main(model_dir: Path, text: Path | None, steps: int, rounds: int, threads: int | None) -> None:
    """Measure the loops and append to bench/results/decode_overhead.jsonl."""
    threads = check_threads(threads)
    text = text or model_dir / "synthetic-F16.gguf"
    mmproj = model_dir / "clip" / "mmproj-synthetic-F16.gguf"
    found: dict[str, list[dict[str, float]]] = {"decode": [], "sample": [], "ours": []}
    with OmniVLM(text, mmproj, device="cpu", n_threads=threads, disk_cache=False) as model:
        shape = model.image_tokens, model._decoder.n_embd
        rows = np.random.default_rng(0).normal(scale=0.02, size=shape).astype(np.float32)
        picture = ImageEmbedding(rows)
        n_prompt = prompt_length(model, picture)
        for _ in range(rounds):
            found["ours"].append(ours(model, picture, steps))
            for sampled in (False, True):
                found["sample" if sampled else "decode"].append(
                    bare(model, n_prompt, steps, sampled)
                )
    inside = min(step["inside_ms"] for steps in found.values() for step in steps)
    outside = {
        name: statistics.median(step["outside_us"] for step in steps)
        for name, steps in found.items()
    }
    record = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe_machine(),
        "llama_cpp_python": version("llama-cpp-python"),
        "threads": threads,
        "rounds": rounds,
        "steps": steps,
        "text": text.name,
        "text_mb": megabytes(text),
        "step_ms": round(inside, 3),
        "outside_us": {name: round(value, 1) for name, value in outside.items()},
        "overhead": {
            f"over {name}": round((outside["ours"] - outside[name]) / (1e3 * inside), 5)
            for name in ("decode", "sample")
        },
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    click.echo(json.dumps(record, indent=1))


def prompt_length(model: OmniVLM, picture: ImageEmbedding) -> int:
    answer = model.answer(picture, QUESTION, GenerateOptions(max_tokens=1))
    return answer.prompt_tokens


def ours(model: OmniVLM, picture: ImageEmbedding, steps: int) -> dict[str, float]:
    options = GenerateOptions(max_tokens=steps + 1)
    pieces = model.generate(picture, QUESTION, options)
    next(pieces)  # the prompt, and the first token
    with timed_steps() as step:
        for _ in pieces:
            pass
    return step


def bare(model: OmniVLM, n_prompt: int, steps: int, sampled: bool) -> dict[str, float]:
    """Decodes as many tokens behind the prompt that `ours` left in the context."""
    decoder = model._decoder
    decoder._forget(0, n_prompt)
    context = decoder._context
    sampler = llama_cpp.llama_sampler_init_greedy()
    token = (llama_cpp.llama_token * 1)(1000)
    with timed_steps() as step:
        for i in range(steps):
            llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1))
            token[0] = 1000 + i
            if sampled:
                token[0] = llama_cpp.llama_sampler_sample(sampler, context, -1)
    llama_cpp.llama_sampler_free(sampler)
    decoder._forget(0, n_prompt)
    return step


@contextmanager
def timed_steps() -> Iterator[dict[str, float]]:
    """Medians over the steps within: milliseconds inside `llama_decode`, microseconds between."""
    decode = llama_cpp.llama_decode
    entered: list[float] = []
    left: list[float] = []

    def timed(context: Any, batch: Any) -> Any:
        entered.append(time.perf_counter())
        status = decode(context, batch)
        left.append(time.perf_counter())
        return status

    result: dict[str, float] = {}
    llama_cpp.llama_decode = timed
    try:
        yield result
    finally:
        llama_cpp.llama_decode = decode
    started = np.array(entered)
    ended = np.array(left)
    result["inside_ms"] = float(np.median(ended - started)) * 1e3
    result["outside_us"] = float(np.median(started[1:] - ended[:-1])) * 1e6


if __name__ == "__main__":
    main()
