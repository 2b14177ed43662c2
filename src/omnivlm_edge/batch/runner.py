"""Items -> rows: pictures are read in threads, answered together by the scheduler, in any order.

What is in flight is bounded, and so is the memory: a new picture is read when one is done with.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from ..engine import OmniVLM
from ..errors import (
    ClosedError,
    DeviceError,
    ImageError,
    ModelFileError,
    OptionError,
)
from ..generation import Generation
from ..image import Pixels, shorten
from ..report import milliseconds, usage
from ..scheduler import ENCODE_BATCH, Job, Scheduler, Update
from ..sources import read_address
from ..values import DEFAULT_MAX_TOKENS, Answer, GenerateOptions, Turn
from .inputs import Item, Source, is_text, read_source

#: JSON: key, prompt, answer, finish_reason, error, and what is measured.
Row: TypeAlias = "dict[str, Any]"

_MAX_READERS = 4
_PROMPT_POSITIONS = 256  # of one picture and a short question, and some more
# The whole run ends: the next picture would not fare better.
_FATAL = (ClosedError, DeviceError, ModelFileError)


@dataclass(frozen=True)
class Task:
    """What is asked about every picture, and of which model: all that decides about answers.

    Without `prompts` every item brings its own. `model` and `mmproj` are the files' SHA-256.
    """

    prompts: tuple[str, ...]
    options: GenerateOptions = field(default_factory=GenerateOptions)
    choices: tuple[str, ...] = ()
    system: str | None = None
    variant: str | None = None
    model: str | None = None
    mmproj: str | None = None

    def __post_init__(self) -> None:
        """Raises OptionError for a prompt that no output could hold."""
        if not all(map(is_text, self.prompts)):
            raise OptionError("the prompt is not valid text: it must be UTF-8")

    def make(self, model: OmniVLM, pixels: tuple[Pixels, ...], prompt: str) -> Generation:
        turns = [Turn(prompt, pixels)]
        if self.choices:
            return model.prepare_choice(turns, self.choices, self.system)
        return model.prepare(turns, self.options, self.system)

    def prompt_digest(self, prompt: str) -> str:
        """The SHA-256 of all that stands around a picture."""
        text = json.dumps([self.variant, self.system, prompt])
        return hashlib.sha256(text.encode()).hexdigest()


def context_size(options: GenerateOptions, n_parallel: int) -> int:
    """Positions for so many answers at the same time, about one picture each."""
    return n_parallel * (_PROMPT_POSITIONS + (options.max_tokens or DEFAULT_MAX_TOKENS))


@dataclass(frozen=True)
class Work:
    """A picture and the prompts that it has not answered yet."""

    item: Item
    prompts: tuple[str, ...]


class _Ticket:
    """A picture in flight: so many rows are to come."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.left = len(work.prompts)


@dataclass(frozen=True)
class _Fed:
    """The input is over; so many rows will have come in all."""

    n_rows: int


_Result: TypeAlias = "tuple[_Ticket, Row] | _Fed | BaseException"


@dataclass(frozen=True)
class _Flow:
    """One `run` on its way."""

    results: queue.SimpleQueue[_Result]
    room: threading.Semaphore
    stop: threading.Event
    jobs: set[Job] = field(default_factory=set)  # those that may not have ended

    def abandon(self) -> None:
        self.stop.set()
        for job in list(self.jobs):
            job.cancel()


class Answerer:
    """Answers any number of pictures with one model, up to `n_parallel` at the same time.

    `model`, of at least so many sequences, is closed with this. `n_readers` threads read, decode
    and resize.
    """

    def __init__(
        self,
        model: OmniVLM,
        task: Task,
        *,
        n_parallel: int,
        n_readers: int | None = None,
        allow_private: bool = False,
    ) -> None:
        self._model, self._task, self._allow_private = model, task, allow_private
        self._n_ahead = 2 * n_parallel  # pictures in flight: as many again wait, ready
        self._scheduler = Scheduler(
            lambda: model, n_parallel=n_parallel, n_queue=2**31, n_encode=ENCODE_BATCH
        )
        n_readers = n_readers or min(_MAX_READERS, os.cpu_count() or 1)
        self._readers = ThreadPoolExecutor(n_readers, thread_name_prefix="omnivlm-reader")

    def run(self, work: Iterable[Work]) -> Generator[Row, None, None]:
        """Rows as they are finished. `work` is iterated in a thread of its own.

        A picture that cannot be answered gives a row with an `error`. Raises what `work` raises,
        and DeviceError, ModelFileError when the model fails. To close the generator abandons what
        is in flight.
        """
        flow = _Flow(queue.SimpleQueue(), threading.Semaphore(self._n_ahead), threading.Event())
        feeder = threading.Thread(
            target=self._feed, args=(work, flow), name="omnivlm-feeder", daemon=True
        )
        feeder.start()
        n_rows, n_all = 0, None
        try:
            while n_all is None or n_rows < n_all:
                result = flow.results.get()
                if isinstance(result, _Fed):
                    n_all = result.n_rows
                elif isinstance(result, BaseException):
                    raise result
                else:
                    ticket, row = result
                    n_rows += 1
                    yield row
                    ticket.left -= 1
                    if ticket.left == 0:
                        flow.room.release()
        finally:
            flow.abandon()

    def close(self) -> None:
        """Ends the threads and frees the model."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._scheduler.close()

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- threads --------------------------------------------------------------------------------

    def _feed(self, work: Iterable[Work], flow: _Flow) -> None:
        n_rows = 0
        try:
            for each in work:
                while not flow.room.acquire(timeout=0.2):
                    if flow.stop.is_set():
                        return
                if flow.stop.is_set():
                    return
                n_rows += len(each.prompts)
                self._readers.submit(self._read, _Ticket(each), flow)
        except BaseException as error:
            flow.results.put(error)
        else:
            flow.results.put(_Fed(n_rows))

    def _read(self, ticket: _Ticket, flow: _Flow) -> None:
        """Makes a picture ready and hands it on; whatever happens, every prompt gets its row."""
        try:
            pixels = self._pixels(ticket.work.item)
            if flow.stop.is_set():
                return
            jobs = [self._job(ticket, prompt, pixels, flow) for prompt in ticket.work.prompts]
            flow.jobs.update(jobs)
            self._scheduler.submit(jobs)
            if flow.stop.is_set():  # since when, nobody knows: maybe before they were there
                flow.abandon()
        except Exception as error:
            for prompt in ticket.work.prompts:
                self._end(ticket, prompt, error, flow)

    def _pixels(self, item: Item) -> tuple[Pixels, ...]:
        if item.source is None:
            raise ImageError(item.problem)
        sources = item.source if isinstance(item.source, tuple) else (item.source,)
        return tuple(self._preprocess(source, item.key) for source in sources)

    def _preprocess(self, source: Source, key: str) -> Pixels:
        if isinstance(source, str):
            picture = read_address(source, allow_private=self._allow_private)
            return self._model.preprocess(picture)
        name = str(source) if isinstance(source, Path) else key
        return self._model.preprocess(read_source(source, name), name)

    def _job(self, ticket: _Ticket, prompt: str, pixels: tuple[Pixels, ...], flow: _Flow) -> Job:
        def listen(update: Update) -> None:
            if isinstance(update, Answer | Exception):
                flow.jobs.discard(job)
                self._end(ticket, prompt, update, flow)

        job = Job(lambda model: self._task.make(model, pixels, prompt), listen)
        return job

    def _end(self, ticket: _Ticket, prompt: str, result: Answer | Exception, flow: _Flow) -> None:
        if isinstance(result, _FATAL):
            flow.results.put(result)
        else:
            flow.results.put((ticket, make_row(self._task, ticket.work.item, prompt, result)))


def pending(
    items: Iterable[Item],
    task: Task,
    is_new: Callable[[str, str], bool],
    skipped: Callable[[int], None],
) -> Generator[Work, None, None]:
    """What of the items is still to be done, by key and prompt; tells how many rows are not."""
    for item in items:
        if not task.prompts and item.prompt is None and not item.problem:
            problem = f"{shorten(item.key)}: has no question of its own, as rows of tables do"
            item = replace(item, source=None, problem=problem)
        asked = task.prompts or (item.prompt or "",)
        prompts = tuple(prompt for prompt in asked if is_new(item.key, prompt))
        if len(prompts) < len(asked):
            skipped(len(asked) - len(prompts))
        if prompts:
            yield Work(item, prompts)


def make_row(task: Task, item: Item, prompt: str, result: Answer | Exception) -> Row:
    """The row of an answer, or of what became of it."""
    row: Row = {"key": item.key, "prompt": prompt, "answer": None, "finish_reason": None}
    row |= {"choices": None, "error": None, "usage": None, "timings": None}
    if isinstance(result, Answer) and result.finish_reason == "length" and task.options.grammar:
        result = OptionError(
            f"the answer was cut off after {result.completion_tokens} tokens, before it was "
            "complete: raise max_tokens (-n)"
        )
    if isinstance(result, Answer):
        row |= {
            "answer": result.text,
            "finish_reason": result.finish_reason,
            "choices": {name: round(chance, 6) for name, chance in result.choices.items()} or None,
            "usage": usage(result),
            "timings": milliseconds(result.timings, result.completion_tokens),
        }
    else:
        row["error"] = {"kind": type(result).__name__, "message": _message(result)}
    row |= {"model_sha256": task.model, "mmproj_sha256": task.mmproj}
    return row | {"prompt_sha256": task.prompt_digest(prompt)}


def _message(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.encode(errors="backslashreplace").decode()  # a name in it may be no text
