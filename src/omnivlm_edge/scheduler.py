"""Many answers at once: one thread owns the model and batches their steps.

Between two decoding steps of all running answers it admits new ones, encodes a picture and prefills
a piece of a prompt, so that none of this stops a running answer for longer than one encode.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from .engine import OmniVLM
from .errors import ClosedError, DeadlineError, OmniVLMError, QueueFullError
from .generation import Generation
from .values import Answer, TokenLogprob

_log = logging.getLogger(__name__)

MISSING = "the model cannot be loaded: the log says why"

# Pictures encoded together when no running answer is held up by it.
ENCODE_BATCH = 4
_RELOAD_SECONDS = 5  # between attempts to load a model that was there before
# Positions prefilled between two decoding steps: about half an encode.
_PREFILL_STEP = 256


@dataclass(frozen=True)
class Accepted:
    """The prompt is valid and fits; the answer will come."""


@dataclass(frozen=True)
class Delta:
    """What one step added to an answer: text, and the logprobs since the last one."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


#: First Accepted, any number of Delta, and Answer; or an error at any time, and nothing after it.
Update: TypeAlias = "Accepted | Delta | Answer | OmniVLMError"


class Listener(Protocol):
    """Is told what happens to a job, on the scheduler's thread: it must be quick."""

    def __call__(self, update: Update, /) -> None: ...


@dataclass(eq=False)
class Job:
    """A request for one answer.

    `make` prepares the answer when the model is there, `deadline` is a time of `time.monotonic`.
    """

    make: Callable[[OmniVLM], Generation]
    listener: Listener
    deadline: float = float("inf")
    submitted: float = field(default_factory=time.perf_counter)
    queue_seconds: float = 0.0  # until it was admitted
    _generation: Generation | None = None
    _prefill: Iterator[None] | None = None
    _cancelled: bool = False
    _decoding: bool = False
    _since: float = 0.0  # when its newest step began
    _told: int = 0  # logprobs that the listener knows

    def cancel(self) -> None:
        """Nobody waits for the answer any more: its place is free within one step."""
        self._cancelled = True

    @property
    def generation(self) -> Generation:
        assert self._generation is not None  # from Accepted on
        return self._generation


class Scheduler:
    """Answers the jobs that are submitted, up to `n_parallel` at a time, in their order.

    `load` makes the model, with `n_sequences` of at least `n_parallel`, in the scheduler's thread:
    at once, and again when it is needed after `sleep_after` seconds without a job, which free it.
    Up to `n_queue` jobs wait. While answers are running, `n_encode` pictures are encoded at once,
    those of waiting jobs among them: one lets the answers go on soonest, more take less time each.
    """

    def __init__(
        self,
        load: Callable[[], OmniVLM],
        *,
        n_parallel: int,
        n_queue: int,
        n_encode: int = 1,
        sleep_after: float | None = None,
    ) -> None:
        self._load = load
        self._n_parallel = n_parallel
        self._n_queue = n_queue
        self._n_encode = n_encode
        self._sleep_after = sleep_after
        self._model: OmniVLM | None = None
        self._failure: Exception | None = None
        self._missing = False
        self._loaded = threading.Event()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="omnivlm-scheduler", daemon=True)
        self._thread.start()

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def sleeping(self) -> bool:
        """Whether the model was freed because nobody asked for it."""
        return self._loaded.is_set() and self._model is None

    @property
    def missing(self) -> bool:
        """Whether the model, freed before, could not be loaded again; attempts go on."""
        return self._missing

    def wait_until_loaded(self) -> None:
        """Raises what `load` raised, if it did."""
        self._loaded.wait()
        if self._failure is not None:
            raise self._failure

    def submit(self, jobs: Sequence[Job]) -> None:
        """All the jobs, or none. Raises QueueFullError, ClosedError."""
        with self._changed:
            if self._closing:
                raise ClosedError("the model is being closed")
            held = len(self._waiting) + len(self._running)
            if held + len(jobs) > self._n_parallel + self._n_queue:
                raise QueueFullError(
                    f"{self._n_parallel} answers are being generated and {self._n_queue} may wait: "
                    "try again later"
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Refuses what waits, finishes what runs, and frees the model. May be called again."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # ---- the scheduler's thread -----------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._model = self._load()
        except Exception as error:
            self._failure = error
            self._closing = True
        self._loaded.set()
        while self._wait_for_work():
            try:
                self._step()
            except Exception:  # a mistake of ours must not leave everybody waiting for ever
                _log.exception("the scheduler failed")
                with self._changed:
                    for job in [*self._running, *self._waiting]:
                        self._end(job, _mistake())
        self._free_model()

    def _wait_for_work(self) -> bool:
        """False when there is nothing left to do, for ever."""
        with self._changed:
            if self._closing:
                self._refuse_waiting(ClosedError("the model is being closed"))
            while not self._changed.wait_for(
                lambda: self._waiting or self._running or self._closing,
                _RELOAD_SECONDS if self._missing else self._sleep_after if self._model else None,
            ):
                if self._missing:
                    return True
                self._free_model()
            return bool(self._waiting or self._running)

    def _step(self) -> None:
        try:
            if self._model is None:
                self._model = self._load()
        except Exception as error:
            if self._waiting or not self._missing:
                mistake = not isinstance(error, OmniVLMError)
                _log.error("the model cannot be loaded: %s", error, exc_info=mistake)
            self._missing = True
            self._refuse_waiting(ClosedError(MISSING))
            return
        self._missing = False
        self._drop_abandoned()
        self._prepare_new(self._model)
        self._admit(self._model)
        self._encode(self._model)
        self._prefill(self._model)
        self._decode(self._model)

    def _free_model(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = None

    def _refuse_waiting(self, error: OmniVLMError) -> None:
        with self._changed:
            refused, self._waiting = self._waiting, deque()
        for job in refused:
            job.listener(error)

    @contextlib.contextmanager
    def _failing(self, jobs: Sequence[Job]) -> Iterator[None]:
        """What fails within ends these jobs, and no others."""
        error: OmniVLMError
        try:
            yield
            return
        except OmniVLMError as failure:
            error = failure
        except Exception:  # a mistake of ours
            _log.exception("an answer failed")
            error = _mistake()
        for job in jobs:
            self._end(job, error)

    def _drop_abandoned(self) -> None:
        now = time.monotonic()
        late = DeadlineError("the answer was not finished in the time that it was given")
        with self._changed:
            for job in [*self._waiting, *self._running]:
                if job._cancelled or now > job.deadline:
                    self._end(job, late)

    def _prepare_new(self, model: OmniVLM) -> None:
        with self._changed:
            new = [job for job in self._waiting if job._generation is None]
        for job in new:
            with self._failing([job]):
                job._generation = job.make(model)
                job.listener(Accepted())

    def _admit(self, model: OmniVLM) -> None:
        """In their order: a long prompt is not overtaken for ever by short ones."""
        taken = sum(job.generation.n_positions for job in self._running)
        while self._waiting and len(self._running) < self._n_parallel:
            job = self._waiting[0]
            if job._generation is None:  # came after `_prepare_new`
                break
            taken += job.generation.n_positions
            if taken > model.n_ctx_total:
                break
            with self._changed:
                self._waiting.popleft()
                self._running.append(job)
            job.queue_seconds = time.perf_counter() - job.submitted

    def _encode(self, model: OmniVLM) -> None:
        """If an answer that has its place needs a picture: this one, and some that come next."""
        jobs = [job for job in self._running if _needs_picture(job)]
        if not jobs:
            return
        n_most = self._n_encode if len(jobs) < len(self._running) else ENCODE_BATCH
        if n_most > len(jobs):
            with self._changed:
                jobs += [job for job in self._waiting if _needs_picture(job)]
        batch = [(job, next(job.generation.waiting)) for job in jobs[:n_most]]
        with self._failing([job for job, _ in batch]):
            embeddings = model.encode_batch([picture for _, picture in batch])
            for (job, _), embedding in zip(batch, embeddings, strict=True):
                job.generation.put(embedding)

    def _prefill(self, model: OmniVLM) -> None:
        """One step for the first answer that has all its pictures, and no logits yet."""
        for job in self._running:
            if not job._decoding and not _needs_picture(job):
                break
        else:
            return
        generation = job.generation
        with self._failing([job]):
            if job._prefill is None:
                job._prefill = model.prefill_steps(generation, _PREFILL_STEP)
            next(job._prefill)
            if generation.prefilled:  # its logits are there until the next step
                if generation.choices:
                    self._end(job, model.score(generation))
                    return
                job._decoding = True
                job._since = time.perf_counter()
                self._sample(job)

    def _decode(self, model: OmniVLM) -> None:
        """One step for all answers that have sampled a token."""
        jobs = [job for job in self._running if job._decoding]
        if not jobs:
            return
        decoded = False
        with self._failing(jobs):
            model.decode([job.generation for job in jobs])
            decoded = True
        for job in jobs if decoded else ():
            with self._failing([job]):
                self._sample(job)

    def _sample(self, job: Job) -> None:
        generation = job.generation
        text = generation.sample(job._since)
        job._since = time.perf_counter()
        logprobs = tuple(generation.logprobs[job._told :])
        if text or (logprobs and generation.finished):
            job._told += len(logprobs)
            job.listener(Delta(text, logprobs))
        if generation.finished:
            self._end(job, generation.answer())

    def _end(self, job: Job, result: Answer | OmniVLMError) -> None:
        """Takes a job out and tells how it ended, unless nobody wants to know."""
        with self._changed:
            if job in self._running:
                self._running.remove(job)
            else:
                self._waiting.remove(job)
        if job._generation is not None:
            job._generation.close()
        if not job._cancelled:
            job.listener(result)


def _needs_picture(job: Job) -> bool:
    return job._generation is not None and any(job._generation.waiting)


def _mistake() -> OmniVLMError:
    return OmniVLMError("the answer failed; the log says why")
