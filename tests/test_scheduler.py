"""Many answers at once: the order of the steps with a fake model, the answers with real ones."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from omnivlm_edge import (
    Answer,
    ClosedError,
    DeadlineError,
    DeviceError,
    GenerateOptions,
    ImageError,
    ModelFileError,
    OmniVLM,
    OmniVLMError,
    OptionError,
    QueueFullError,
    Turn,
)
from omnivlm_edge.scheduler import Accepted, Delta, Job, Scheduler, Update
from omnivlm_edge.values import TokenLogprob

EXAMPLES = Path(__file__).parents[1] / "examples"


class Listener:
    """Hears what becomes of a job."""

    def __init__(self) -> None:
        self.updates: queue.Queue[Update] = queue.Queue()

    def __call__(self, update: Update) -> None:
        self.updates.put(update)

    def next(self) -> Update:
        return self.updates.get(timeout=30)

    def result(self) -> Answer | OmniVLMError:
        """How it ended."""
        while True:
            update = self.next()
            if isinstance(update, Answer | OmniVLMError):
                assert self.updates.empty()
                return update

    def answer(self) -> Answer:
        result = self.result()
        assert isinstance(result, Answer), result
        return result


# --- the order of the steps -----------------------------------------------------------------------


@dataclass(eq=False)
class FakeGeneration:
    """Writes its name `n_tokens` times."""

    name: str
    n_prompt: int = 10
    n_tokens: int = 3
    pictures: list[str] = field(default_factory=list)
    fails: Exception | None = None
    n_prefilled: int = 0
    n_sampled: int = 0
    closed: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    choices: dict[str, object] = field(default_factory=dict)  # none: tokens are sampled

    @property
    def n_positions(self) -> int:
        return self.n_prompt + self.n_tokens

    @property
    def waiting(self) -> Iterator[str]:
        return iter(self.pictures)

    def put(self, embedding: object) -> None:
        self.pictures.pop(0)

    @property
    def prefilled(self) -> bool:
        return self.n_prefilled >= self.n_prompt

    @property
    def finished(self) -> bool:
        return self.n_sampled == self.n_tokens

    def sample(self, since: float) -> str:
        if self.fails is not None:
            raise self.fails
        self.n_sampled += 1
        return self.name

    def answer(self) -> Answer:
        return Answer(self.name * self.n_sampled, "stop", self.n_prompt, 0, self.n_sampled)

    def close(self) -> None:
        self.closed = True


class FakeModel:
    """Writes down what it is asked for; `decode` waits for `go` while `held`."""

    def __init__(self, n_ctx_total: int = 1000) -> None:
        self.n_ctx_total = n_ctx_total
        self.steps: list[tuple[str, ...]] = []
        self.held = False
        self.go = threading.Semaphore(0)
        self.stopped: queue.Queue[None] = queue.Queue()  # one for each `decode` that waits
        self.fails: dict[str, Exception] = {}
        self.closed = threading.Event()

    def _step(self, kind: str, names: Sequence[str]) -> None:
        self.steps.append((kind, *names))
        if kind in self.fails:
            raise self.fails.pop(kind)

    def encode_batch(self, pictures: Sequence[str]) -> list[str]:
        self._step("encode", pictures)
        return list(pictures)

    def prefill_steps(self, generation: FakeGeneration, most: int) -> Iterator[None]:
        while not generation.prefilled:
            self._step("prefill", [generation.name])
            generation.n_prefilled += most
            yield

    def decode(self, generations: Sequence[FakeGeneration]) -> None:
        if self.held:
            self.stopped.put(None)
            assert self.go.acquire(timeout=30)
        self._step("decode", [generation.name for generation in generations])

    def close(self) -> None:
        self.closed.set()

    def of(self, kind: str) -> list[tuple[str, ...]]:
        return [step[1:] for step in self.steps if step[0] == kind]


class Fakes:
    """A scheduler over fake models. `hold` stops it at the next decoding step, `step` lets one go.

    `models` are those that it has loaded; `load_fails` are raised instead, one after the other.
    """

    def __init__(self, **options: Any) -> None:
        self.model = FakeModel(options.pop("n_ctx_total", 1000))
        self.models: list[FakeModel] = []
        self.load_fails: list[Exception] = options.pop("load_fails", [])
        self.generations: dict[str, FakeGeneration] = {}
        self.scheduler = Scheduler(self._load, **{"n_parallel": 4, "n_queue": 8, **options})

    def _load(self) -> OmniVLM:
        if self.load_fails:
            raise self.load_fails.pop(0)
        if self.models:
            self.model = FakeModel(self.model.n_ctx_total)
        self.models.append(self.model)
        return self.model

    def job(self, name: str, *, deadline: float = float("inf"), **options: Any) -> Job:
        def make(_: OmniVLM) -> Any:
            self.generations[name] = FakeGeneration(name, **options)
            return self.generations[name]

        return Job(make, Listener(), deadline)

    def submit(self, name: str, **options: Any) -> tuple[Job, Listener]:
        job = self.job(name, **options)
        self.scheduler.submit([job])
        assert isinstance(job.listener, Listener)
        return job, job.listener

    def hold(self) -> None:
        """A job `held` with as many tokens as one likes is stopped in its decoding step."""
        self.model.held = True
        self.held_job, self.held_listener = self.submit("held", n_tokens=100)
        self.model.stopped.get(timeout=30)

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            self.model.go.release()
            self.model.stopped.get(timeout=30)

    def release(self) -> None:
        self.model.held = False
        self.model.go.release()


@pytest.fixture
def fakes() -> Iterator[Callable[..., Fakes]]:
    made: list[Fakes] = []

    def make(**options: Any) -> Fakes:
        made.append(Fakes(**options))
        return made[-1]

    yield make
    for fake in made:
        fake.release()
        fake.scheduler.close()


def test_a_job_is_accepted_and_answered_piece_by_piece(fakes: Callable[..., Fakes]) -> None:
    _, listener = fakes().submit("a")
    assert listener.next() == Accepted()
    assert [listener.next() for _ in range(3)] == [Delta("a")] * 3
    assert listener.answer().text == "aaa"


def test_answers_are_decoded_together_and_come_and_go_at_any_step(
    fakes: Callable[..., Fakes],
) -> None:
    fake = fakes()
    fake.hold()
    jobs = [fake.submit("a", n_tokens=3), fake.submit("b", n_tokens=5)]
    fake.step(8)
    fake.release()
    assert [listener.answer().text for _, listener in jobs] == ["aaa", "bbbbb"]
    steps = fake.model.of("decode")
    assert ("held", "a", "b") in steps
    assert steps.index(("held", "a")) < steps.index(("held", "a", "b"))  # one prefill in between
    assert steps.index(("held", "a", "b")) < steps.index(("held", "b"))


def test_only_so_many_at_a_time_in_their_order(fakes: Callable[..., Fakes]) -> None:
    fake = fakes(n_parallel=2)
    fake.hold()
    listeners = [fake.submit(name)[1] for name in "abcd"]
    assert (fake.scheduler.n_running, fake.scheduler.n_waiting) == (1, 4)
    fake.step(20)
    assert [listener.answer().text for listener in listeners] == ["aaa", "bbb", "ccc", "ddd"]
    assert max(map(len, fake.model.of("decode"))) == 2
    assert fake.model.of("prefill") == [("held",), ("a",), ("b",), ("c",), ("d",)]


def test_admission_by_context_keeps_the_order(fakes: Callable[..., Fakes]) -> None:
    """`b` does not fit beside `a`; `c` would, and must not overtake it."""
    fake = fakes(n_ctx_total=210)
    fake.hold()  # takes 110
    listeners = [fake.submit(name, n_prompt=n)[1] for name, n in (("a", 60), ("b", 60), ("c", 5))]
    fake.step(2)
    assert (fake.scheduler.n_running, fake.scheduler.n_waiting) == (2, 2)
    fake.step(10)
    assert [listener.answer().text for listener in listeners] == ["aaa", "bbb", "ccc"]
    assert all(len({"a", "b"} & set(names)) < 2 for names in fake.model.of("decode"))


def test_a_long_prompt_is_prefilled_between_the_steps_of_others(
    fakes: Callable[..., Fakes],
) -> None:
    fake = fakes()
    fake.hold()
    _, listener = fake.submit("a", n_prompt=700)
    fake.step(6)
    fake.release()
    listener.answer()
    kinds = [kind for kind, *names in fake.model.steps if kind == "decode" or names == ["a"]]
    assert kinds[:7] == ["decode", "prefill", "decode", "prefill", "decode", "prefill", "decode"]


def test_pictures_are_encoded_one_between_two_steps_or_some_at_once(
    fakes: Callable[..., Fakes],
) -> None:
    fake = fakes(n_parallel=8)
    fake.hold()
    two = fake.submit("a", pictures=["1", "2"])[1], fake.submit("b", pictures=["3"])[1]
    fake.step(8)
    assert fake.model.of("encode") == [("1",), ("2",), ("3",)]
    assert [listener.answer().text for listener in two] == ["aaa", "bbb"]
    fake.held_job.cancel()
    fake.release()

    alone = fakes(n_parallel=8)
    jobs = [alone.job(name, pictures=[name]) for name in "abcdef"]
    alone.scheduler.submit(jobs)
    for job in jobs:
        job.listener.answer()
    assert alone.model.of("encode")[0] == tuple("abcd")


def test_pictures_of_waiting_answers_are_encoded_with_one_that_is_needed(
    fakes: Callable[..., Fakes],
) -> None:
    fake = fakes(n_parallel=2, n_encode=3)
    fake.hold()
    waiting = [fake.submit(name, pictures=[name])[1] for name in "abcde"]
    fake.step(16)
    assert fake.model.of("encode") == [("a", "b", "c"), ("d", "e")]
    assert [listener.answer().text for listener in waiting] == ["aaa", "bbb", "ccc", "ddd", "eee"]


def test_a_cancelled_answer_ends_within_one_step(fakes: Callable[..., Fakes]) -> None:
    fake = fakes(n_parallel=2)
    fake.hold()
    job, listener = fake.submit("a", n_tokens=50)
    _, waiting = fake.submit("b")
    fake.step(3)
    job.cancel()
    before = len(fake.model.of("decode"))
    fake.step()  # the one that was under way
    fake.step()
    assert [("a" in names) for names in fake.model.of("decode")[before:]] == [True, False]
    assert fake.generations["a"].closed
    fake.step(4)
    assert waiting.answer().text == "bbb"
    told = [listener.next() for _ in range(listener.updates.qsize())]
    assert not any(isinstance(update, Answer | OmniVLMError) for update in told)


def test_a_cancelled_job_that_waits_is_never_begun(fakes: Callable[..., Fakes]) -> None:
    fake = fakes(n_parallel=1)
    fake.hold()
    job, _ = fake.submit("a")
    _, listener = fake.submit("b")
    job.cancel()
    fake.held_job.cancel()
    fake.release()
    assert listener.answer().text == "bbb"
    assert ("a",) not in fake.model.of("prefill")


def test_an_answer_has_its_time(fakes: Callable[..., Fakes]) -> None:
    """Whether it is being generated or waits; nobody else minds."""
    fake = fakes(n_parallel=2)
    fake.hold()
    soon = time.monotonic() + 0.05
    _, running = fake.submit("a", deadline=soon, n_tokens=50)
    _, waiting = fake.submit("b", deadline=soon)
    _, other = fake.submit("c")
    fake.step(2)
    time.sleep(0.1)
    fake.step(8)
    assert isinstance(running.result(), DeadlineError)
    assert isinstance(waiting.result(), DeadlineError)
    assert other.answer().text == "ccc"
    assert fake.generations["a"].closed


def test_a_full_queue_takes_all_jobs_or_none(fakes: Callable[..., Fakes]) -> None:
    fake = fakes(n_parallel=2, n_queue=1)
    fake.hold()
    fake.submit("a")
    with pytest.raises(QueueFullError, match="2 answers are being generated and 1 may wait"):
        fake.scheduler.submit([fake.job("b"), fake.job("c")])
    _, listener = fake.submit("b")
    with pytest.raises(QueueFullError):
        fake.submit("c")
    fake.step(12)
    assert listener.answer().text == "bbb"
    fake.submit("c")


def test_a_job_may_come_while_others_are_prepared(fakes: Callable[..., Fakes]) -> None:
    """And then be the first in the queue, though it is not prepared itself."""
    fake = fakes()
    late: list[tuple[Job, Listener]] = []

    def make(_: OmniVLM) -> Any:
        late.append(fake.submit("late"))
        raise OptionError("no")

    first = Listener()
    fake.scheduler.submit([Job(make, first)])
    assert isinstance(first.result(), OptionError)
    assert late[0][1].answer().text == "latelatelate"


# --- failures -------------------------------------------------------------------------------------

FAILURES = [OptionError("no"), RuntimeError("a mistake")]


def told(error: Exception) -> type[OmniVLMError]:
    """What a job hears of it: of a mistake only that there was one."""
    return type(error) if isinstance(error, OmniVLMError) else OmniVLMError


@pytest.mark.parametrize("error", FAILURES)
def test_a_prompt_that_cannot_be_prepared_ends_alone(
    fakes: Callable[..., Fakes], error: Exception
) -> None:
    fake = fakes()

    def make(_: OmniVLM) -> Any:
        raise error

    bad = Job(make, Listener())
    good = fake.job("a")
    fake.scheduler.submit([bad, good])
    assert type(bad.listener.result()) is told(error)
    assert good.listener.answer().text == "aaa"


@pytest.mark.parametrize("error", FAILURES)
def test_a_picture_that_cannot_be_encoded_ends_its_answer(
    fakes: Callable[..., Fakes], error: Exception
) -> None:
    fake = fakes()
    fake.hold()
    fake.model.fails["encode"] = error
    _, bad = fake.submit("a", pictures=["1"])
    _, good = fake.submit("b", pictures=["2"])
    fake.step(8)
    assert type(bad.result()) is told(error)
    assert good.answer().text == "bbb"
    assert fake.generations["a"].closed


@pytest.mark.parametrize("error", FAILURES)
def test_a_prompt_that_cannot_be_prefilled_ends_alone(
    fakes: Callable[..., Fakes], error: Exception
) -> None:
    fake = fakes()
    fake.hold()
    fake.model.fails["prefill"] = error
    _, bad = fake.submit("a")
    _, good = fake.submit("b")
    fake.step(8)
    assert type(bad.result()) is told(error)
    assert good.answer().text == "bbb"


@pytest.mark.parametrize("error", [DeviceError("no"), RuntimeError("a mistake")])
def test_a_failing_step_ends_only_its_answers(
    fakes: Callable[..., Fakes], error: Exception
) -> None:
    fake = fakes(n_parallel=2)
    fake.hold()
    _, also = fake.submit("a", n_tokens=50)
    _, waiting = fake.submit("b")
    fake.step(2)
    fake.model.fails["decode"] = error
    fake.release()
    assert type(fake.held_listener.result()) is told(error)
    assert type(also.result()) is told(error)
    assert waiting.answer().text == "bbb"


@pytest.mark.parametrize("error", FAILURES)
def test_an_answer_that_cannot_go_on_ends_alone(
    fakes: Callable[..., Fakes], error: Exception
) -> None:
    fake = fakes()
    fake.hold()
    _, bad = fake.submit("a", n_tokens=50)
    _, good = fake.submit("b", n_tokens=10)
    fake.step(4)
    fake.generations["a"].fails = error
    fake.step(10)
    assert type(bad.result()) is told(error)
    assert good.answer().text == "b" * 10


# --- loading, sleeping, closing -------------------------------------------------------------------


def test_an_error_while_loading_is_told(fakes: Callable[..., Fakes]) -> None:
    fake = fakes(load_fails=[ModelFileError("no such file")])
    with pytest.raises(ModelFileError, match="no such file"):
        fake.scheduler.wait_until_loaded()
    with pytest.raises(ClosedError):
        fake.submit("a")


def test_an_idle_model_is_freed_and_loaded_again(
    fakes: Callable[..., Fakes], caplog: pytest.LogCaptureFixture
) -> None:
    fake = fakes(sleep_after=0.05)
    fake.scheduler.wait_until_loaded()
    assert fake.models[0].closed.wait(30)
    while not fake.scheduler.sleeping:
        time.sleep(0.01)
    fake.load_fails.append(ModelFileError("no such file"))
    refused = fake.submit("a")[1].result()  # it was removed meanwhile
    assert isinstance(refused, ClosedError)
    assert "no such file" not in str(refused)
    assert "no such file" in caplog.text
    assert fake.submit("b")[1].answer().text == "bbb"  # and put back
    assert len(fake.models) == 2
    assert fake.models[1].closed.wait(30)


def test_closing_finishes_what_runs_and_refuses_what_waits(fakes: Callable[..., Fakes]) -> None:
    fake = fakes(n_parallel=2)
    fake.hold()
    _, running = fake.submit("a", n_tokens=5)
    fake.step(2)
    _, waiting = fake.submit("b")
    fake.held_job.cancel()
    closing = threading.Thread(target=fake.scheduler.close)
    closing.start()
    with pytest.raises(ClosedError):
        while True:
            fake.scheduler.submit([])
    fake.release()
    assert running.answer().text == "aaaaa"
    assert isinstance(waiting.result(), ClosedError)
    closing.join(30)
    assert fake.model.closed.is_set()
    with pytest.raises(ClosedError):
        fake.submit("c")
    fake.scheduler.close()


# --- real models ----------------------------------------------------------------------------------

PICTURES = [EXAMPLES / "horses.png", EXAMPLES / "shopping.png"]


def demo(**options: Any) -> OmniVLM:
    return OmniVLM(
        "demo", device="cpu", n_threads=2, disk_cache=False, **{"n_ctx": 4096, **options}
    )


def real_job(turns: list[Turn], **options: Any) -> Job:
    made = GenerateOptions(**{"max_tokens": 24, **options})
    return Job(lambda model: model.prepare(turns, made), Listener())


MIXED = [
    ([Turn("Describe the image", (PICTURES[0],))], 40),
    ([Turn("Describe the image", (PICTURES[1],))], 40),
    ([Turn("Is there an egg?", (PICTURES[0],))], 24),
    ([Turn("Is there an egg?", (PICTURES[1],))], 3),
    ([Turn("Who are you?")], 30),
    ([Turn("How many carrots are there?", (PICTURES[1],))], 24),
    ([Turn("Where is the duck?", (PICTURES[0],))], 1),
    ([Turn("Where is the glass of milk?", (PICTURES[1],))], 24),
    ([Turn("Is there a duck?", (PICTURES[0], PICTURES[1]))], 24),
    ([Turn("What is this? " * 40, (PICTURES[0],))], 24),
    ([Turn("Is there a duck?", (PICTURES[0],), "Yes."), Turn("Where?")], 24),
    ([Turn("Tell me a story.")], 60),
    ([Turn("Do I have eggs?", (PICTURES[1],))], 24),
    ([Turn("How many horses are there?", (PICTURES[0],))], 24),
    ([Turn("Describe the image", (PICTURES[0],))], 40),
    ([Turn("a")], 2),
]


def test_16_mixed_answers_are_those_of_each_asked_alone() -> None:
    with demo() as model:
        want = []
        for turns, n in MIXED:
            model.forget()
            generation = model.generate_turn(turns, GenerateOptions(max_tokens=n))
            try:
                while True:
                    next(generation)
            except StopIteration as finished:
                want.append(finished.value)
    scheduler = Scheduler(lambda: demo(n_sequences=8), n_parallel=8, n_queue=8)
    jobs = [real_job(turns, max_tokens=n) for turns, n in MIXED]
    for job in jobs:
        scheduler.submit([job])
    found = [job.listener.answer() for job in jobs]
    scheduler.close()
    for (turns, _), one, other in zip(MIXED, found, want, strict=True):
        assert one.text == other.text, turns
        assert one.tokens == other.tokens
        assert one.finish_reason == other.finish_reason
        assert one.prompt_tokens == other.prompt_tokens


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that llama.cpp was given."""
    sizes: list[int] = []
    decode = llama_cpp.llama_decode

    def counted(context: Any, batch: Any) -> int:
        sizes.append(batch.n_tokens)
        status: int = decode(context, batch)
        return status

    monkeypatch.setattr(llama_cpp, "llama_decode", counted)
    return sizes


def test_answers_that_begin_alike_share_the_beginning(decoded: list[int]) -> None:
    """And then go different ways: each is right."""
    questions = ["Describe the image", "Is there an egg?", "Where is the duck?", "Is there a duck?"]
    with demo() as model:
        want = []
        for text in questions:
            model.forget()
            want.append(model.answer(PICTURES[0], text, GenerateOptions(max_tokens=24)).text)
    decoded.clear()
    scheduler = Scheduler(lambda: demo(n_sequences=4), n_parallel=4, n_queue=0)
    scheduler.wait_until_loaded()
    jobs = [real_job([Turn(text, (PICTURES[0],))]) for text in questions]
    scheduler.submit(jobs)
    found = [job.listener.answer() for job in jobs]
    scheduler.close()
    assert [answer.text for answer in found] == want
    first, *others = found
    assert first.cached_tokens == 0
    for answer in others:  # all but the question itself
        assert answer.cached_tokens > answer.image_tokens
        assert answer.prompt_tokens - answer.cached_tokens < 20
    n_decoded = sum(answer.completion_tokens for answer in found)
    n_prompts = sum(answer.prompt_tokens - answer.cached_tokens for answer in found)
    assert sum(decoded) == n_prompts + n_decoded  # the token that ends an answer is not decoded
    assert sum(decoded) < first.prompt_tokens + 3 * 20 + n_decoded
    assert max(decoded[1:]) <= 20


def test_a_cancelled_sequence_leaves_nothing_wrong_behind(tiny_model: Path) -> None:
    """The next one takes its place in the middle of others' answers."""
    options = {"device": "cpu", "n_threads": 2, "disk_cache": False, "n_ctx": 512}
    with OmniVLM(tiny_model, **options) as model:
        want = [model.answer([], text, GenerateOptions(max_tokens=40)).tokens for text in "ab"]
    scheduler = Scheduler(
        lambda: OmniVLM(tiny_model, n_sequences=2, **options),
        n_parallel=2,
        n_queue=2,
    )
    first = real_job([Turn("a")], max_tokens=40)
    gone = real_job([Turn("c" * 50)], max_tokens=200)
    last = real_job([Turn("b")], max_tokens=40)
    scheduler.submit([first, gone, last])
    while not isinstance(gone.listener.next(), Delta | Answer):
        pass
    gone.cancel()
    found = [job.listener.answer().tokens for job in (first, last)]
    scheduler.close()
    assert found == want


def test_errors_of_real_models_reach_their_jobs_alone(tiny_model: Path) -> None:
    scheduler = Scheduler(
        lambda: OmniVLM(
            tiny_model, device="cpu", n_threads=2, disk_cache=False, n_sequences=4, n_ctx=512
        ),
        n_parallel=4,
        n_queue=4,
    )
    too_long = real_job([Turn("a" * 1000)])
    no_picture = real_job([Turn("a", (b"hello",))])
    no_grammar = real_job([Turn("a")], grammar="root ::= nothing")
    good = real_job([Turn("a")])
    scheduler.submit([too_long, no_picture, no_grammar, good])
    assert isinstance(too_long.listener.result(), OptionError)
    assert isinstance(no_picture.listener.result(), ImageError)
    assert isinstance(no_grammar.listener.result(), OptionError)
    assert good.listener.answer().completion_tokens > 0
    scheduler.close()
