"""Pictures per second: many at a time, one at a time, and by llama.cpp's stock path.

    python bench/batch.py TEXT MMPROJ MODEL_DIR [--pictures 24] [--parallel 1,2,4,8,16]
    python bench/batch.py TEXT MMPROJ --workers 1,2

TEXT and MMPROJ are the 4-bit files (`omnivlm-edge quantize`) of the synthetic model in MODEL_DIR,
which `bench/synthetic.py` wrote; the stock path makes its own files there, as in side_by_side.py.
All answers have 40 tokens. Everything is measured in one run: the stock path and ours one at a
time take turns, picture by picture; then every number of sequences has a process of its own, in
which the command's own runner answers all the pictures; then the demo model answers 1, 10, 100 and
1,000 pictures by `omnivlm-edge batch`. One JSON object a measurement is appended to
bench/results/batch.jsonl; bench/report.py makes docs/scaling.md's table of the newest run, and
bench/plots.py the picture.

`--workers` measures something else: so many processes at once, each with a part of the cores, what
they get done, and their proportional set sizes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from contenders.base import MAX_TOKENS, Contender, Files, peak_megabytes
from contenders.process import Child
from side_by_side import SCRATCH, Numbers, ask_about, write_photos

from omnivlm_edge.machine import commit, describe_machine
from omnivlm_edge.memory import parse_peak

RESULTS = Path(__file__).parent / "results" / "batch.jsonl"
TOKENS = 40
DEMO_COUNTS = (1, 10, 100, 1000)
QUESTION = "Describe the image"
_CONTEXT = multiprocessing.get_context("spawn")


@click.command()
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.argument("mmproj", type=click.Path(exists=True, path_type=Path))
@click.argument("model_dir", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--pictures", type=click.IntRange(1), default=24, show_default=True)
@click.option("--parallel", type=Numbers(), default=(1, 2, 4, 8, 16), help="Sequences, each once.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]")
@click.option("--workers", type=Numbers(), help="Processes at once; nothing else is measured.")
@click.option("--demo/--no-demo", default=True, help="Count pictures with the demo model, too.")
def main(
    text: Path,
    mmproj: Path,
    model_dir: Path | None,
    pictures: int,
    parallel: tuple[int, ...],
    threads: int | None,
    workers: tuple[int, ...] | None,
    demo: bool,
) -> None:
    """Measure the 4-bit model and append to bench/results/batch.jsonl."""
    threads = threads or os.cpu_count() or 1
    about = {
        "run": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe_machine(),
        "threads": threads,
        "tokens": TOKENS,
    }
    with tempfile.TemporaryDirectory(prefix="omnivlm-bench-") as name:
        photos = write_photos(Path(name), pictures + 1)  # the first one to warm up
        if workers is not None:
            for count in workers:
                append(about, measure_workers(text, mmproj, photos, threads, count))
            return
        if model_dir is not None:
            for record in measure_turns(text, mmproj, model_dir, photos, threads):
                append(about, record)
        for count in parallel:
            append(about, measure_batch(text, mmproj, photos, threads, count))
        if demo:
            for count in DEMO_COUNTS:
                append(about, measure_demo(Path(name), count, threads))


# ---- one at a time ------------------------------------------------------------------------------


def measure_turns(
    text: Path, mmproj: Path, model_dir: Path, photos: list[Path], threads: int
) -> list[dict[str, Any]]:
    """The stock path (F16 vision, Q4_K_M text) and ours, a picture each in turn."""
    files = Files(
        text=model_dir / "synthetic-F16.gguf",
        mmproj=model_dir / "clip" / "mmproj-synthetic-F16.gguf",
        scratch=model_dir / SCRATCH,
    )
    files.scratch.mkdir(exist_ok=True)
    small = Files(text=text, mmproj=mmproj, scratch=files.scratch)
    entrants = (
        ("llama.cpp, one at a time", Contender("batch stock", "stock", {"text": "q4_k_m"}), files),
        (
            "ours, one at a time",
            Contender("batch ours", "ours", {"precision": "auto", "build": "f16"}),
            small,
        ),
    )
    children: list[Child] = []
    seconds = [0.0] * len(entrants)
    try:
        for _, contender, where in entrants:
            if contender.module == "stock":
                maker = Child(contender, where)
                maker.ask("prepare")
                maker.close()
            child = Child(contender, where)
            child.ask("load", threads)
            child.ask("answer", ask_about(photos[0], 0))
            children.append(child)
        for number, photo in enumerate(photos[1:], 1):
            for place, child in enumerate(children):
                timed = child.ask("answer", ask_about(photo, number))
                assert timed.answer_tokens == MAX_TOKENS
                # The contenders answer with MAX_TOKENS: the rest's time is that of so many steps.
                seconds[place] += timed.first_token + (TOKENS - 1) * timed.decode
        peaks = [child.ask("peak") for child in children]
    finally:
        for child in children:
            child.close()
    return [
        {
            "kind": "turns",
            "name": name,
            "pictures": len(photos) - 1,
            "seconds": round(spent, 4),
            "pictures_per_second": round((len(photos) - 1) / spent, 4),
            "peak_rss_mb": peak,
        }
        for (name, _, _), spent, peak in zip(entrants, seconds, peaks, strict=True)
    ]


# ---- many at a time -----------------------------------------------------------------------------


def measure_batch(
    text: Path, mmproj: Path, photos: list[Path], threads: int, n_parallel: int
) -> dict[str, Any]:
    """One process that answers all pictures, so many at a time."""
    with _CONTEXT.Pool(1) as pool:
        found = pool.apply(answer_all, (text, mmproj, photos, threads, n_parallel, None))
    name = f"ours, {counted(n_parallel, 'sequence')}"
    return {"kind": "batch", "name": name, "n_parallel": n_parallel, **found}


def answer_all(
    text: Path, mmproj: Path, photos: list[Path], threads: int, n_parallel: int, barrier: Any
) -> dict[str, Any]:
    """In a process of its own: the runner of `omnivlm-edge batch`."""
    from omnivlm_edge import GenerateOptions, OmniVLM
    from omnivlm_edge.batch.inputs import Item
    from omnivlm_edge.batch.runner import Answerer, Task, Work, context_size

    options = GenerateOptions(max_tokens=TOKENS)
    model = OmniVLM(
        text,
        mmproj,
        device="cpu",
        n_ctx=context_size(options, n_parallel),
        n_sequences=n_parallel,
        n_threads=threads,
        disk_cache=False,
    )
    task = Task((QUESTION,), options)
    with Answerer(model, task, n_parallel=n_parallel) as answerer:
        work = [Work(Item(str(path), path), (QUESTION,)) for path in photos]
        list(answerer.run(work[:1]))
        if barrier is not None:
            barrier.wait()
        started = time.perf_counter()
        rows = list(answerer.run(work[1:]))
        seconds = time.perf_counter() - started
        memory = proportional_memory()
    tokens = [row["usage"]["completion_tokens"] for row in rows]
    assert all(count == TOKENS for count in tokens), tokens
    return {
        "pictures": len(rows),
        "seconds": round(seconds, 4),
        "pictures_per_second": round(len(rows) / seconds, 4),
        "peak_rss_mb": peak_megabytes(),
        "memory": memory,
    }


# ---- how many pictures --------------------------------------------------------------------------


def measure_demo(folder: Path, count: int, threads: int) -> dict[str, Any]:
    """The whole command on so many pictures; its own summary tells the seconds without loading."""
    from omnivlm_edge.made_pictures import made_pictures

    pictures = folder / "made"
    pictures.mkdir(exist_ok=True)
    content = made_pictures(1)[0].image
    for number in range(count):
        path = pictures / f"{number:04}.jpg"
        if not path.exists():  # different, for the memory of encoded pictures
            shifted = content.rotate(0, translate=(number % 97, number // 97))
            shifted.save(path, quality=90)
    output = folder / f"demo-{count}.jsonl"
    command = [sys.executable, "-m", "omnivlm_edge", "batch", "demo", str(pictures), "-q"]
    command += ["-p", QUESTION, "-n", str(TOKENS), "-o", str(output), "-t", str(threads)]
    peaks: list[int] = []
    process = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True)
    watcher = threading.Thread(target=_watch_memory, args=(process.pid, peaks))
    watcher.start()
    started = time.perf_counter()
    _, said = process.communicate()
    whole = time.perf_counter() - started
    watcher.join()
    found = re.search(r"(\d+) rows in ([\d.]+) s", said)
    assert process.returncode == 0 and found and int(found[1]) == count, said
    seconds = float(found[2])
    return {
        "kind": "demo",
        "name": f"demo, {counted(count, 'picture')}",
        "pictures": count,
        "seconds": seconds,
        "seconds_whole": round(whole, 3),
        "pictures_per_second": round(count / seconds, 4),
        "peak_rss_mb": max(peaks, default=0),
    }


def _watch_memory(pid: int, peaks: list[int]) -> None:
    status = Path(f"/proc/{pid}/status")
    while True:
        try:
            peaks.append(round(parse_peak(status.read_text()) / 1e6))
        except (OSError, ValueError):  # it has ended
            return
        time.sleep(0.1)


# ---- several workers ----------------------------------------------------------------------------


def measure_workers(
    text: Path, mmproj: Path, photos: list[Path], threads: int, count: int
) -> dict[str, Any]:
    """`count` processes at once, each with its part of the threads; what all get done."""
    each = max(1, threads // count)
    with _CONTEXT.Manager() as manager, _CONTEXT.Pool(count) as pool:
        barrier = manager.Barrier(count)
        jobs = [
            pool.apply_async(answer_all, (text, mmproj, photos, each, 8, barrier))
            for _ in range(count)
        ]
        found = [job.get() for job in jobs]
    seconds = max(result["seconds"] for result in found)
    pictures = sum(result["pictures"] for result in found)
    return {
        "kind": "workers",
        "name": f"{counted(count, 'worker')} of {counted(each, 'thread')}",
        "workers": count,
        "pictures": pictures,
        "seconds": seconds,
        "pictures_per_second": round(pictures / seconds, 4),
        "peak_rss_mb": max(result["peak_rss_mb"] for result in found),
        "memory": [result["memory"] for result in found],
    }


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def proportional_memory() -> dict[str, float]:
    """This process's smaps_rollup in MB: resident, proportional, private, shared and from files."""
    text = Path("/proc/self/smaps_rollup").read_text()
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M))
    kilobytes = {name: int(value) for name, value in fields.items()}
    named = {
        "rss_mb": kilobytes["Rss"],
        "pss_mb": kilobytes["Pss"],
        "pss_anonymous_mb": kilobytes.get("Pss_Anon", 0),
        "pss_file_mb": kilobytes.get("Pss_File", 0),
        "shared_mb": kilobytes["Shared_Clean"] + kilobytes["Shared_Dirty"],
        "private_mb": kilobytes["Private_Clean"] + kilobytes["Private_Dirty"],
    }
    return {name: round(value * 1024 / 1e6, 1) for name, value in named.items()}


def append(about: dict[str, Any], record: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(about | record) + "\n")
    click.echo(
        f"{record['name']}: {record['pictures_per_second']:.3f} pictures/s, "
        f"{record['peak_rss_mb']} MB"
    )


if __name__ == "__main__":
    main()
