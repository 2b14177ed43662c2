"""The process of one case of a benchmark: reads it from stdin, writes a line of JSON per step.

The lines are messages: `kind` (loaded, warm-up, answer, load, or error with its `text`), `stages`
in nanoseconds, the `tokens` that a stage computed, and `facts` for the record.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from .bench import Case, Record, engine_arguments
from .device import select_device
from .engine import OmniVLM
from .errors import OmniVLMError
from .memory import peak_footprint, peak_rss
from .values import Answer, GenerateOptions


def main() -> None:
    """Measures the case on stdin. Exit code 1 follows an error message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no message
    order = json.load(sys.stdin)
    try:
        for message in measure(Case(**order["case"]), order["started"]):
            channel.write(json.dumps(message) + "\n")
    except (OmniVLMError, MemoryError) as exc:
        text = str(exc) or "there is not enough memory"
        channel.write(json.dumps({"kind": "error", "text": text}) + "\n")
        sys.exit(1)


def measure(case: Case, started: float) -> Iterator[Record]:
    """The messages of a case; `started` is the `time.time` at which this process was started."""
    options = GenerateOptions(max_tokens=case.max_tokens)
    device = select_device(case.device)
    free = device.memory_free
    with OmniVLM(case.text, case.mmproj, **engine_arguments(case)) as engine:
        facts: Record = {"first_load_ns": _ns(engine.load_seconds)}
        facts |= {"device": engine.device, "vision_device": engine.vision_device}
        facts["vision_precision_used"] = engine.vision_precision
        yield _message("loaded", facts=facts)
        for repeat in range(1 + case.repeats):
            engine.forget()  # all stages are computed every time
            began, busy = time.perf_counter(), time.process_time()
            answer = engine.answer(case.image, case.prompt, options)
            seconds, busy = time.perf_counter() - began, time.process_time() - busy
            facts = _answer_facts(answer)
            if device.kind != "cpu":
                facts["device_memory_bytes"] = free - select_device(case.device).memory_free
            if repeat == 0:
                to_first = time.time() - started - seconds + answer.timings.first_token
                facts["start_to_first_token_ns"] = _ns(to_first)
            kind = "answer" if repeat else "warm-up"
            alone = answer.timings.preprocess  # one thread does it
            share = busy / (alone + (seconds - alone) * case.n_threads)
            yield _message(kind, **_stages(answer, seconds), facts=facts, cpu_share=share)
    for _ in range(case.repeats):  # after the memory was looked at
        with OmniVLM(case.text, case.mmproj, **engine_arguments(case)) as engine:
            yield _message("load", stages={"load": _ns(engine.load_seconds)})


def _message(
    kind: str,
    stages: dict[str, int] | None = None,
    tokens: dict[str, int] | None = None,
    facts: Record | None = None,
    **more: Any,
) -> Record:
    return {
        "kind": kind,
        "stages": stages or {},
        "tokens": tokens or {},
        "facts": facts or {},
        **more,
    }


def _stages(answer: Answer, seconds: float) -> dict[str, dict[str, int]]:
    """Nanoseconds and tokens of the stages of an answer that took `seconds`."""
    timings = answer.timings
    stages = {
        "preprocess": _ns(timings.preprocess),
        "encode": _ns(timings.encode),
        "prefill": _ns(timings.prefill),
        "first_token": _ns(timings.first_token),
        "total": _ns(seconds),
    }
    tokens = {"prefill": answer.prompt_tokens - answer.cached_tokens}
    # An answer's first token comes out of the prefill; what ends an answer is a token as well.
    steps = answer.completion_tokens - (answer.finish_reason == "length")
    if steps > 0:
        stages["decode"], tokens["decode"] = _ns(timings.decode), steps
    return {"stages": stages, "tokens": tokens}


def _answer_facts(answer: Answer) -> Record:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "completion_tokens": answer.completion_tokens,
        "finish_reason": answer.finish_reason,
        "peak_rss_bytes": peak_rss(),
        "peak_footprint_bytes": peak_footprint(),
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


if __name__ == "__main__":
    main()
