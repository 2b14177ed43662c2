"""What a model costs on this machine: time of every stage, memory, power.

cases -> a child process each (bench_child.py) -> its messages -> a record each -> cli/bench.py

Records are plain dictionaries, as they are written to JSON; names are llama-bench's where it has
them. Times are in nanoseconds (`_ns`), sizes in bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import product
from math import prod
from pathlib import Path
from typing import IO, Any

from . import _native
from .device import available_devices, check_precision, check_threads, select_device
from .errors import OmniVLMError, OptionError
from .files import digest_file
from .image import load_image
from .machine import commit, describe_machine, peak_bandwidth, peak_gops
from .made_pictures import made_pictures
from .memory import check_fits, memory_needed
from .model_file import ModelFile, inspect_file
from .power import Meter, find_meter, memory_growth, watts
from .values import DEFAULT_N_CTX, ModelFiles

STAGES = ("load", "preprocess", "encode", "prefill", "first_token", "decode", "total")
MADE_SIZE = (1046, 1568)  # pixels
QUESTION = "Describe the image"

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One way to run a model; every case is measured in a process of its own."""

    text: str
    mmproj: str
    image: str
    variant: str | None = None
    prompt: str = QUESTION
    max_tokens: int = 64
    repeats: int = 5
    n_threads: int = 1
    device: str = "auto"
    precision: str = "auto"
    low_memory: bool = False
    n_gpu_layers: int | None = None
    mmproj_offload: bool = True

    @property
    def steps(self) -> int:
        """Messages that a child sends: loaded, the warm-up, answers and loads."""
        return 2 + 2 * self.repeats


class ChildError(OmniVLMError):
    """The process of a case failed; the text says how."""


def engine_arguments(case: Case) -> dict[str, Any]:
    """The keywords of `OmniVLM` for a case."""
    return {
        "variant": case.variant,
        "device": case.device,
        "n_threads": case.n_threads,
        "n_gpu_layers": case.n_gpu_layers,
        "mmproj_offload": case.mmproj_offload,
        "vision_precision": case.precision,
        "low_memory": case.low_memory,
        "disk_cache": False,
    }


def make_cases(
    files: ModelFiles,
    image: Path,
    *,
    threads: Sequence[int | None] = (None,),
    precisions: Sequence[str] = ("auto",),
    **settings: Any,
) -> list[Case]:
    """A case for each combination of threads (None: all cores) and precisions.

    `settings` are further fields of `Case`. Raises OptionError, DeviceError, ModelFileError and
    ImageError for what cannot be run at all, a model larger than the memory among it.
    """
    for precision in precisions:
        check_precision(precision)
    load_image(image)
    places = (str(files.text), str(files.mmproj), str(image), files.variant)
    combinations = product(precisions, dict.fromkeys(map(check_threads, threads)))
    cases = [
        Case(*places, n_threads=n_threads, precision=precision, **settings)
        for precision, n_threads in combinations
    ]
    for case in cases:
        device = select_device(case.device)
        check_fits(_memory_needed(case), device.memory_total, device.name)
    return cases


def _memory_needed(case: Case) -> int:
    text, vision = inspect_file(Path(case.text)), inspect_file(Path(case.mmproj))
    return memory_needed(
        text,
        vision,
        DEFAULT_N_CTX,
        precision=case.precision,
        low_memory=case.low_memory,
        on_cpu=select_device(case.device).kind == "cpu" or not case.mmproj_offload,
    )


def write_made_picture(directory: Path) -> Path:
    """A JPEG file of MADE_SIZE, the same one everywhere. Raises OSError."""
    path = directory / "made.jpg"
    made_pictures(1)[0].image.resize(MADE_SIZE).save(path, quality=90)
    return path


def run_cases(
    cases: Sequence[Case],
    records: list[Record],
    *,
    meter: Meter | None = None,
    progress: Callable[[int], object] = lambda steps: None,
) -> None:
    """Measures the cases one after the other and appends a record of each to `records`.

    A case that fails leaves a record with its `error`, and the next one follows. On
    KeyboardInterrupt, which is passed on, what the running case has measured is kept, too, in a
    record that is marked as `partial`. `progress` is told of steps done (see `Case.steps`).

    Raises DeviceError and ModelFileError for what can be told before the first case.
    """
    meter = meter or find_meter()
    facts = _Facts()
    planned = [facts.of(case) for case in cases]
    for case, record in zip(cases, planned, strict=True):
        record["test_time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        messages: list[Record] = []
        try:
            record |= facts.limits(case)
            for message in _run_child(case, meter):
                messages.append(message)
                progress(1)
            record |= facts.limits(case)  # once more: others may have kept the machine busy
        except OmniVLMError as exc:
            record["error"] = str(exc)
            progress(case.steps - len(messages))
        except KeyboardInterrupt:
            if any(message["kind"] == "answer" for message in messages):
                records.append(record | _results(record, messages, meter) | {"partial": True})
            raise
        records.append(record | _results(record, messages, meter))


# --- the child process ----------------------------------------------------------------------------


def _run_child(case: Case, meter: Meter | None) -> Iterator[Record]:
    """The messages of a case's process, each with the time `at` which it came.

    Raises ChildError when the process says what is wrong, or ends before it is done.
    """
    command = [sys.executable, "-m", "omnivlm_edge.bench_child"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # no module of the working directory's
    with (
        tempfile.TemporaryFile() as stderr,
        meter or contextlib.nullcontext(),
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it is dead already; told below
                process.stdin.write(json.dumps({"case": asdict(case), "started": time.time()}))
                process.stdin.close()
            for line in process.stdout:
                message = json.loads(line)
                if message["kind"] == "error":
                    raise ChildError(message["text"])
                yield message | {"at": time.monotonic()}
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0:
            raise ChildError(_death(process.returncode, stderr))


def _death(code: int, stderr: IO[bytes]) -> str:
    """What is known of a process that ended with that code."""
    stderr.seek(0)
    last = stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
    if code == -signal.SIGKILL:
        text = "its process was killed; was there enough memory?"
    elif code < 0:
        text = f"its process crashed ({signal.Signals(-code).name})"
    else:
        text = f"its process ended with exit code {code}"
    return f"{text} ({last})" if last else text


# --- records --------------------------------------------------------------------------------------


class _Facts:
    """What is known of cases beforehand; what several of them share is found out once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Any] = {}

    def of(self, case: Case) -> Record:
        """The record of a case before it is run."""
        text, vision = self._file(case.text), self._file(case.mmproj)
        machine = self._once(describe_machine)
        device = select_device(case.device)
        on_cpu = device.kind == "cpu"
        gpus = [gpu.description for gpu in available_devices() if gpu.kind != "cpu"]
        return {
            "test_time": None,
            "version": version("omnivlm-edge"),
            "build_commit": self._once(commit),
            "llama_cpp_python": version("llama-cpp-python"),
            "ggml": _native.ggml_version(),
            "cpu_info": machine["cpu"],
            "gpu_info": ", ".join(gpus),
            "backends": ",".join(_native.backends()),
            "machine": machine,
            **self._file_facts("model", text),
            **self._file_facts("mmproj", vision),
            "device": device.name,
            "n_threads": case.n_threads,
            "n_gpu_layers": 0 if on_cpu else -1 if case.n_gpu_layers is None else case.n_gpu_layers,
            "mmproj_offload": case.mmproj_offload,
            "vision_precision": case.precision,
            "vision_precision_used": None,
            "low_memory": case.low_memory,
            "picture": self._once(_describe_picture, case.image),
            "prompt": case.prompt,
            "max_tokens": case.max_tokens,
            "repeats": case.repeats,
            "repeats_done": 0,
            "peak_gops": None,
            "peak_gbs": None,
            "encode_operations": encode_operations(vision),
            "decode_bytes": decode_bytes(text),
            "partial": False,
            "error": None,
        }

    def limits(self, case: Case) -> Record:
        """The most that the machine has done so far with a case's threads; nothing on a GPU.

        It is measured anew at every call.
        """
        if select_device(case.device).kind != "cpu":
            return {}
        gops = peak_gops(case.precision, case.n_threads)
        gbs = peak_bandwidth(case.n_threads)
        return {
            "peak_gops": gops and self._most(("gops", case.precision, case.n_threads), gops),
            "peak_gbs": self._most(("gbs", case.n_threads), gbs),
        }

    def _most(self, key: tuple[Any, ...], value: float) -> float:
        self._known[key] = max(value, self._known.get(key, value))
        return float(self._known[key])

    def _file(self, path: str) -> ModelFile:
        file: ModelFile = self._once(inspect_file, Path(path))
        return file

    def _file_facts(self, name: str, file: ModelFile) -> Record:
        return {
            f"{name}_filename": file.path.name,
            f"{name}_type": file.quantization,
            f"{name}_size": file.size,
            f"{name}_n_params": file.parameters,
            f"{name}_sha256": self._once(digest_file, file.path),
        }

    def _once(self, find: Callable[..., Any], *arguments: Any) -> Any:
        key = (find, *arguments)
        if key not in self._known:
            self._known[key] = find(*arguments)
        return self._known[key]


def _describe_picture(path: str) -> Record:
    picture = load_image(path, Path(path).name)
    width, height = picture.original_size
    return {"name": picture.name, "format": picture.format, "width": width, "height": height}


def encode_operations(vision: ModelFile) -> int:
    """Multiplications and additions that one picture takes, in the matrix products alone."""
    width, layers = vision.number("embedding_length"), vision.number("block_count")
    n_patches = (vision.number("image_size") // vision.number("patch_size")) ** 2
    n_tokens = n_patches // vision.merge_factor
    total = layers * 4 * n_patches**2 * width  # the two products of attention
    for tensor in vision.header.tensors:
        if len(tensor.shape) < 2:
            continue
        if tensor.name.startswith(("v.blk.", "v.patch_embd.")):
            total += 2 * n_patches * prod(tensor.shape)
        elif tensor.name.startswith("mm."):
            total += 2 * n_tokens * prod(tensor.shape)
    return total


def decode_bytes(text: ModelFile) -> int:
    """Bytes of weights that are read for every token of an answer."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    names = {tensor.name for tensor in text.header.tensors}
    total = 0
    for tensor in text.header.tensors:
        if tensor.name == "token_embd.weight" and "output.weight" in names:
            continue  # one row of it; without output.weight it is the head, too
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type)]
        total += prod(tensor.shape) // block * size
    return total


def _results(record: Record, messages: Sequence[Record], meter: Meter | None) -> Record:
    """What a record gains from the messages of its process."""
    answers = [message for message in messages if message["kind"] == "answer"]
    results: Record = {"stages": stage_rows(messages), "repeats_done": len(answers)}
    for message in messages:
        results |= message["facts"]  # peaks grow: the newest counts
    results["cpu_share"] = _mean([message["cpu_share"] for message in answers])
    results["power"] = results["peak_unified_bytes"] = None
    if meter is not None and answers:
        warmed_up, end = messages[1]["at"], answers[-1]["at"]
        power = watts(meter.between(warmed_up, end))
        results["power"] = None if power is None else {"source": meter.name, **power}
        results["peak_unified_bytes"] = memory_growth(meter.between(0, end))
    return results | _shares(record, results["stages"])


def stage_rows(messages: Sequence[Record]) -> list[Record]:
    """A row for each stage that was measured, in llama-bench's terms."""
    rows = []
    measured = [message for message in messages if message["kind"] in ("answer", "load")]
    for stage in STAGES:
        samples = [message["stages"][stage] for message in measured if stage in message["stages"]]
        tokens = [message["tokens"][stage] for message in measured if stage in message["tokens"]]
        if samples:
            rows.append(_row(stage, samples, tokens))
    return rows


def _row(stage: str, samples: Sequence[int], tokens: Sequence[int]) -> Record:
    """`tokens` were computed in each sample, in stages that compute tokens."""
    row: Record = {
        "test": stage,
        "n_tokens": tokens[0] if tokens else None,
        "min_ns": min(samples),
        "median_ns": round(statistics.median(samples)),
        "avg_ns": round(statistics.fmean(samples)),
        "stddev_ns": round(_deviation(samples)),
        "avg_ts": None,
        "stddev_ts": None,
        "samples_ns": list(samples),
        "samples_ts": [],
    }
    if tokens:
        rates = [n / ns * 1e9 for n, ns in zip(tokens, samples, strict=True)]
        row |= {"avg_ts": statistics.fmean(rates), "stddev_ts": _deviation(rates)}
        row["samples_ts"] = rates
    return row


def _shares(record: Record, rows: Sequence[Record]) -> Record:
    """Which part of the machine's limit was reached: of its GOP/s in encode, GB/s in decode."""
    medians = {row["test"]: row["median_ns"] for row in rows}
    tokens = {row["test"]: row["n_tokens"] for row in rows}
    shares: Record = {"encode_share": None, "decode_share": None}
    if "encode" in medians and record["peak_gops"]:
        shares["encode_share"] = (
            record["encode_operations"] / medians["encode"] / record["peak_gops"]
        )
    if "decode" in medians and record["peak_gbs"]:
        read = record["decode_bytes"] * tokens["decode"]
        shares["decode_share"] = read / medians["decode"] / record["peak_gbs"]
    return shares


def _deviation(samples: Sequence[float]) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def peak_memory(record: Record) -> int | None:
    """The peak memory of a case in bytes, as the system counts best, if it got so far.

    Unified memory on a Jetson, the physical footprint on a Mac, else what was resident.
    """
    names = ("peak_unified_bytes", "peak_footprint_bytes", "peak_rss_bytes")
    return next((record[name] for name in names if record.get(name) is not None), None)


def describe_case(record: Record) -> str:
    """What tells a case from the others of its run."""
    n = record["n_threads"]
    threads = "1 thread" if n == 1 else f"{n} threads"
    return f"{record['device']}, precision {record['vision_precision']}, {threads}"


# What any other JSON may lead to.
_NO_RECORD = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def read_records(path: Path) -> list[Record]:
    """The records in a file of JSON or JSON lines. Raises OptionError for anything else."""
    try:
        text = path.read_text("utf-8-sig").strip()
    except (OSError, ValueError) as exc:
        raise OptionError(f"{path}: cannot be read ({getattr(exc, 'strerror', exc)})") from exc
    try:
        lines = filter(str.strip, text.splitlines())
        found = json.loads(text) if text[:1] == "[" else list(map(json.loads, lines))
        records = [record for record in found if record["stages"]]
        for record in records:
            _key(record)
            sizes = record["model_size"], record["mmproj_size"], peak_memory(record) or 0
            numbers = {row["test"]: row["median_ns"] for row in record["stages"]}
            for name, number in (*zip(_SIZES, sizes, strict=True), *numbers.items()):
                if not 0 <= number / 1e6 < math.inf:
                    raise OptionError(f"{path}: {name} is {number}, which nobody has measured")
    except _NO_RECORD as exc:
        raise OptionError(f"{path}: holds no records of `bench -o json` or jsonl") from exc
    if not records:
        raise OptionError(f"{path}: holds no record of a case that was measured")
    return records


def find_partner(record: Record, earlier: Sequence[Record]) -> Record | None:
    """The earlier record to compare one with: the only one, or the newest of the same case.

    A precision is what was used: `auto` has partners in what it became, if none in `auto`.
    """
    if len(earlier) == 1:
        return earlier[0]
    same = [other for other in reversed(earlier) if _key(other) == _key(record)]
    asked = [other for other in same if other["vision_precision"] == record["vision_precision"]]
    return next(iter(asked + same), None)


def _key(record: Record) -> tuple[Any, ...]:
    precision = record["vision_precision_used"] or record["vision_precision"]
    return precision, *(record[name] for name in ("device", "n_threads", "low_memory"))


_SIZES = ("model_size", "mmproj_size", "peak memory")
