"""Load the server: what it stands, and what it delivers to several clients at once.

    python bench/serve_load.py endure [--model demo] [--clients 32] [--minutes 5]
    python bench/serve_load.py throughput TEXT MMPROJ [--streams 1,2,4,8] [--stock-mmproj FILE]

`endure`: clients ask about pictures that nobody has seen before, and about none, whole answers and
streams; some hang up. There must be no error but 503, every stream must be complete, and once it is
warm the server's memory must not grow by more than 5 %: otherwise the exit code is 1.

`throughput`: TEXT and MMPROJ are a full-size model, such as `bench/synthetic.py` and
`omnivlm-edge quantize` write. Tokens a second for several numbers of clients at once, then the time
to the first token while as many as that ask on and on. Beside it, with the same text model, the
server of llama-cpp-python, where what it needs is installed (extra `contenders`); with
--stock-mmproj, a vision file that llama.cpp itself can read (`bench/side_by_side.py` writes one),
llama.cpp's multimodal path, too. The servers run one after the other, `--repeats` times in turn.

Everything is on the loopback address. JSON objects are appended to bench/results/serve_load.jsonl.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import psutil
from PIL import Image, ImageDraw

from omnivlm_edge.machine import commit, describe_machine

RESULTS = Path(__file__).parent / "results" / "serve_load.jsonl"
CHAT = "/v1/chat/completions"
QUESTIONS = ("Describe the image", "Is there an egg?", "How many things are there?", "Where is it?")
WARM_SHARE = 0.25  # of the time, before memory counts
MOST_GROWTH = 0.05
HANG_UP = 0.05  # of the requests
PARALLEL, QUEUE = 8, 16


# ---- clients -------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How one request ended; times are seconds since it was sent."""

    status: int
    kind: str  # text or picture
    first_token: float | None = None
    seconds: float = 0.0
    started: float = 0.0  # time.perf_counter
    n_tokens: int = 0
    finished: bool = False  # a stream: to its very end
    hung_up: bool = False
    problem: str = ""


def picture(chance: random.Random) -> str:
    """A drawing that nobody has seen before, as a data: URI."""
    image = Image.new("RGB", (384, 384), f"#{chance.randrange(2**24):06x}")
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        left, top = chance.randrange(300), chance.randrange(300)
        box = (left, top, left + chance.randrange(8, 84), top + chance.randrange(8, 84))
        draw.ellipse(box, fill=f"#{chance.randrange(2**24):06x}")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def body(
    chance: random.Random, *, with_picture: bool, max_tokens: int, stream: bool
) -> dict[str, Any]:
    """A request; the number in it keeps others' prompts from being the same."""
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": f"{chance.choice(QUESTIONS)} ({chance.randrange(10**6)})"}
    ]
    if with_picture:
        parts.insert(0, {"type": "image_url", "image_url": {"url": picture(chance)}})
    return {
        "model": "",
        "messages": [{"role": "user", "content": parts if with_picture else parts[0]["text"]}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    }


def ask(port: int, asked: dict[str, Any], *, hang_up_after: int | None = None) -> Outcome:
    """One request on a connection of its own."""
    outcome = Outcome(0, "picture" if isinstance(asked["messages"][0]["content"], list) else "text")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    outcome.started = time.perf_counter()
    try:
        connection.request("POST", CHAT, json.dumps(asked), {"Content-Type": "application/json"})
        response = connection.getresponse()
        outcome.status = response.status
        if response.status != 200 or not asked["stream"]:
            answer = json.loads(response.read())
            outcome.n_tokens = answer.get("usage", {}).get("completion_tokens", 0)
            outcome.finished = response.status == 200
        else:
            _follow(response, outcome, hang_up_after)
    except (OSError, http.client.HTTPException, ValueError) as exc:
        outcome.problem = f"{type(exc).__name__}: {exc}"
    finally:
        outcome.seconds = time.perf_counter() - outcome.started
        connection.close()
    return outcome


def _follow(
    response: http.client.HTTPResponse, outcome: Outcome, hang_up_after: int | None
) -> None:
    n_events, reason = 0, None
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            outcome.finished = reason is not None
            continue
        event = json.loads(line[6:])
        if "error" in event:
            outcome.problem = event["error"]["message"]
            return
        outcome.n_tokens = event.get("timings", {}).get("predicted_n", outcome.n_tokens)
        for choice in event["choices"]:
            reason = choice["finish_reason"] or reason
            if choice["delta"].get("content") and outcome.first_token is None:
                outcome.first_token = time.perf_counter() - outcome.started
        n_events += 1
        if n_events == hang_up_after:
            outcome.hung_up = True
            return


def at_once(n: int, work: Callable[[int], None]) -> None:
    """So many threads do it, each with its number."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- servers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A server that can be measured."""

    name: str
    command: Callable[[int], list[str]]  # with a port
    pictures: bool
    ours: bool = False


@contextmanager
def running(kind: Kind) -> Iterator[tuple[int, psutil.Process]]:
    """A server that answers: its port and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(kind.command(port), stdout=log, stderr=log)
        try:
            while not _answers(port):
                if process.poll() is not None:
                    log.seek(0)
                    raise click.ClickException(f"{kind.name} did not start: {log.read()[-2000:]}")
                time.sleep(0.2)
            yield port, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(120)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def ours(model: str, mmproj: Path | None, threads: int, *more: str) -> Kind:
    def command(port: int) -> list[str]:
        files = [model] + ([] if mmproj is None else ["--mmproj", str(mmproj)])
        options = ["--port", str(port), "--device", "cpu", "--threads", str(threads)]
        options += ["--parallel", str(PARALLEL), "--queue", str(QUEUE), "--preload"]
        return [sys.executable, "-m", "omnivlm_edge", "serve", *files, *options, *more]

    return Kind("omnivlm-edge serve", command, pictures=True, ours=True)


def stock(text: Path, mmproj: Path | None, threads: int) -> Kind:
    """llama-cpp-python's server; with a vision file, llama.cpp's multimodal path in it."""

    def command(port: int) -> list[str]:
        options = ["--model", str(text), "--port", str(port), "--n_threads", str(threads)]
        options += ["--n_threads_batch", str(threads), "--n_ctx", "2048", "--n_gpu_layers", "0"]
        # Otherwise a new request ends the stream of another.
        options += ["--interrupt_requests", "false", "--flash_attn", "true"]
        if mmproj is not None:
            options += ["--clip_model_path", str(mmproj), "--chat_format", "mtmd"]
        else:
            options += ["--chat_format", "chatml"]
        return [sys.executable, "-m", "llama_cpp.server", *options]

    name = "llama-cpp-python's server"
    return Kind(f"{name}, mtmd" if mmproj else name, command, pictures=mmproj is not None)


# ---- what a server stands ------------------------------------------------------------------------


@dataclass
class Watch:
    """A process's memory, every second."""

    process: psutil.Process
    samples: list[int] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self.stopped.wait(1):
            self.samples.append(self.process.memory_info().rss)

    def growth(self) -> float:
        """From the median of the quarter after the warm-up to that of the last quarter."""
        warm = self.samples[int(len(self.samples) * WARM_SHARE) :]
        part = max(1, len(warm) // 4)
        return statistics.median(warm[-part:]) / statistics.median(warm[:part]) - 1


@click.group()
def main() -> None:
    """Load the server; appends to bench/results/serve_load.jsonl."""


@main.command()
@click.option("--model", default="demo", show_default=True)
@click.option("--mmproj", type=click.Path(exists=True, path_type=Path))
@click.option("--clients", default=32, show_default=True)
@click.option("--minutes", default=5.0, show_default=True)
@click.option("--threads", type=int, help="CPU threads.  [default: all cores]")
@click.option("--seed", default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Append nothing.")
def endure(
    model: str,
    mmproj: Path | None,
    clients: int,
    minutes: float,
    threads: int | None,
    seed: int,
    dry_run: bool,
) -> None:
    """Many clients for some minutes: no error but 503, every stream complete, no memory lost."""
    count = threads or len(os.sched_getaffinity(0))
    outcomes: list[Outcome] = []
    with running(ours(model, mmproj, count)) as (port, process):
        watch = Watch(process)
        watcher = threading.Thread(target=watch.watch)
        watcher.start()
        end = time.monotonic() + 60 * minutes

        def client(number: int) -> None:
            chance = random.Random(1000 * seed + number)
            while time.monotonic() < end:
                asked = body(
                    chance,
                    with_picture=chance.random() < 0.5,
                    max_tokens=chance.randint(1, 64),
                    stream=chance.random() < 0.7,
                )
                hang_up = chance.randint(1, 8) if chance.random() < HANG_UP else None
                outcome = ask(port, asked, hang_up_after=hang_up)
                outcomes.append(outcome)
                if outcome.status == 503:
                    time.sleep(1)  # as Retry-After says

        at_once(clients, client)
        time.sleep(2)
        metrics = _metrics(port)
        watch.stopped.set()
        watcher.join()
    statuses = Counter(outcome.status for outcome in outcomes)
    answered = [o for o in outcomes if o.status == 200 and not o.hung_up]
    incomplete = [o for o in answered if not o.finished]
    record = {
        **_about(count),
        "case": "endure",
        "model": Path(model).name,
        "clients": clients,
        "minutes": minutes,
        "parallel": PARALLEL,
        "queue": QUEUE,
        "statuses": {str(status): n for status, n in sorted(statuses.items())},
        "answers": {
            kind: sum(outcome.kind == kind for outcome in answered) for kind in ("text", "picture")
        },
        "hung_up": sum(outcome.hung_up for outcome in outcomes),
        "incomplete": len(incomplete),
        "problems": sorted({outcome.problem for outcome in outcomes if outcome.problem})[:5],
        "left_running": metrics["requests_processing"] + metrics["requests_deferred"],
        "tokens": metrics["tokens_predicted_total"],
        "rss_mb": [
            round(rss / 1e6, 1) for rss in watch.samples[:: max(1, len(watch.samples) // 30)]
        ],
        "growth": round(watch.growth(), 4),
        "first_token": {
            kind: _spread([o.first_token for o in answered if o.kind == kind and o.first_token])
            for kind in ("text", "picture")
        },
    }
    sound = (
        set(statuses) <= {200, 503}
        and not incomplete
        and not record["problems"]
        and record["left_running"] == 0
        and record["growth"] <= MOST_GROWTH
    )
    record["sound"] = sound
    _write(record, dry_run)
    if not sound:
        raise click.ClickException("the server did not stand it")


def _metrics(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.findall(r"^omnivlm_(\w+)(?:\{.*\})? (\S+)$", text, re.M)
    totals: Counter[str] = Counter()
    for name, value in found:
        totals[name] += float(value)  # type: ignore[assignment]
    return dict(totals)


# ---- what it delivers ----------------------------------------------------------------------------


@main.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("mmproj", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--stock-mmproj", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--streams", default="1,2,4,8", show_default=True)
@click.option("--tokens", default=256, show_default=True, help="Of each answer.")
@click.option("--load-seconds", default=60.0, show_default=True, help="For the first tokens.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", type=int, help="CPU threads.  [default: all cores]")
@click.option("--dry-run", is_flag=True, help="Append nothing.")
def throughput(
    text: Path,
    mmproj: Path,
    stock_mmproj: Path | None,
    streams: str,
    tokens: int,
    load_seconds: float,
    repeats: int,
    threads: int | None,
    dry_run: bool,
) -> None:
    """Tokens a second for several clients at once, and the time to the first one under load."""
    count = threads or len(os.sched_getaffinity(0))
    numbers = [int(number) for number in streams.split(",")]
    kinds = [ours(str(text), mmproj, count), stock(text, None, count)]
    if stock_mmproj is not None:
        kinds.append(stock(text, stock_mmproj, count))
    about = {**_about(count), "case": "throughput", "text": text.name, "mmproj": mmproj.name}
    records: dict[str, dict[str, Any]] = {}
    for repeat in range(repeats):
        for kind in kinds:
            record = records.setdefault(
                kind.name,
                {**about, "server": kind.name, "tokens": tokens, "rates": {}, "first_token": {}},
            )
            try:
                with running(kind) as (port, _):
                    _measure(kind, port, record, numbers, tokens, load_seconds, repeat)
            except click.ClickException as exc:
                record["problem"] = exc.message
                click.echo(exc.message, err=True)
    for record in records.values():
        for what, samples in record["rates"].items():
            record["rates"][what] = {
                "samples": samples,
                "most": max(samples),
                "times_one": round(max(samples) / max(_of_one(record, what)), 2),
            }
        for name, seconds in record["first_token"].items():
            record["first_token"][name] = _spread(seconds)
        _write(record, dry_run)


def _of_one(record: dict[str, Any], what: str) -> list[float]:
    """The samples of the fewest streams, which stand first."""
    first = next(name for name in record["rates"] if name.split()[0] == what.split()[0])
    rates = record["rates"][first]
    return rates["samples"] if isinstance(rates, dict) else rates  # type: ignore[no-any-return]


def _measure(
    kind: Kind,
    port: int,
    record: dict[str, Any],
    numbers: Sequence[int],
    tokens: int,
    load_seconds: float,
    repeat: int,
) -> None:
    chance = random.Random(repeat)
    ask(port, body(chance, with_picture=kind.pictures, max_tokens=8, stream=False))  # warm
    for number in numbers:
        # Whole answers: everything counts, prompts and the network too; for all servers alike.
        outcomes = _together(port, chance, number, tokens, stream=False)
        _note(record, f"whole {number}", _rate(outcomes, 0.0))
        if kind.ours:  # the others do not say how many tokens a stream had
            outcomes = _together(port, chance, number, tokens, stream=True)
            first = min(o.started + (o.first_token or 0.0) for o in outcomes)
            start = min(o.started for o in outcomes)
            _note(record, f"decode {number}", _rate(outcomes, first - start, n_before=1))
    for with_picture in (False, True)[: 1 + kind.pictures]:
        outcomes = _keep_asking(port, max(numbers), load_seconds, with_picture, repeat)
        name = "picture" if with_picture else "text"
        found = [outcome.first_token for outcome in outcomes if outcome.first_token]
        record["first_token"].setdefault(f"{name}, {max(numbers)} at once", []).extend(found)


def _together(
    port: int, chance: random.Random, number: int, tokens: int, *, stream: bool
) -> list[Outcome]:
    """So many answers to prompts without pictures, asked for at the same time."""
    bodies = [
        body(chance, with_picture=False, max_tokens=tokens, stream=stream) for _ in range(number)
    ]
    if stream:
        for asked in bodies:
            asked["stream_options"] = {"include_usage": True}
    outcomes: list[Outcome] = []
    at_once(number, lambda i: outcomes.append(ask(port, bodies[i])))
    wrong = [o.problem or str(o.status) for o in outcomes if not (o.finished and o.n_tokens)]
    if wrong:
        raise click.ClickException(f"an answer failed: {wrong[0]}")
    return outcomes


def _rate(outcomes: Sequence[Outcome], skipped: float, n_before: int = 0) -> float:
    """Tokens a second of all together, from so many seconds after the first was asked for."""
    start = min(o.started for o in outcomes) + skipped
    end = max(o.started + o.seconds for o in outcomes)
    return round((sum(o.n_tokens for o in outcomes) - n_before) / (end - start), 2)


def _keep_asking(
    port: int, number: int, seconds: float, with_picture: bool, repeat: int
) -> list[Outcome]:
    """So many clients, each asking anew as soon as it has its answer."""
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []

    def client(i: int) -> None:
        chance = random.Random(f"{repeat} {i} {with_picture}")
        while time.monotonic() < end:
            asked = body(
                chance, with_picture=with_picture, max_tokens=chance.randint(8, 64), stream=True
            )
            outcomes.append(ask(port, asked))

    at_once(number, client)
    return outcomes


def _note(record: dict[str, Any], name: str, value: float) -> None:
    record["rates"].setdefault(name, []).append(value)
    click.echo(f"{record['server']}: {name} at once: {value} tokens/s", err=True)


# ---- records -------------------------------------------------------------------------------------


def _about(threads: int) -> dict[str, Any]:
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe_machine(),
        "threads": threads,
    }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if len(seconds) < 2:
        return None
    hundredths = statistics.quantiles(seconds, n=100, method="inclusive")
    return {
        "n": len(seconds),
        "least": round(min(seconds), 3),
        **{f"p{p}": round(hundredths[p - 1], 3) for p in (10, 50, 90, 99)},
        "most": round(max(seconds), 3),
    }


def _write(record: dict[str, Any], dry_run: bool) -> None:
    line = json.dumps(record)
    click.echo(line)
    if not dry_run:
        with RESULTS.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
