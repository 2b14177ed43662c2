"""The loop of all stages: batches -> losses -> steps, with checkpoints, a log and its curves.

FOLDER/model       what the stage is for; it is there when the stage is done
FOLDER/state.pt    where the stage stands; a run that finds it goes on as if it had never stopped
FOLDER/log.jsonl   losses and throughput, and at each report what validation says
FOLDER/curves.png  the log as curves
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from config import Config, Stage, load_config
from errors import TrainError
from muon import Float32Muon

# Does not change what is learned, or may be changed while the rate is level.
FREE = {"workers", "steps", "log_every", "report_every", "save_every", "validation"}


class Task(nn.Module, ABC):
    """A stage, as the loop sees it: an `nn.Module` whose call gives the loss of a batch."""

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and numbers for the log."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Measures on validation pictures; called with the averaged weights."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the stage's result; called with the averaged weights."""


class Stopped(SystemExit):
    """A signal came, and the checkpoint is written; in some process if `signals` has none."""

    def __init__(self, signals: Sequence[int]) -> None:
        super().__init__(128 + (signals or [signal.SIGTERM])[0])


def emulates_bfloat16() -> bool:
    """Whether training runs on a CPU that has no bfloat16, and emulates it many times slower."""
    emulated = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return emulated and not torch.accelerator.is_available()


def make_optimizers(task: nn.Module, settings: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the towers and the projector, AdamW for all else."""
    inner, outer = [], []
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            inside = parameter.ndim == 2 and (".layers." in name or "projector" in name)
            muon = settings.muon and inside and "lora_" not in name
            (inner if muon else outer).append(parameter)
    decay = settings.weight_decay
    optimizers: list[torch.optim.Optimizer] = []
    if inner:
        kind = Float32Muon if emulates_bfloat16() else torch.optim.Muon
        optimizers.append(kind(inner, settings.rate, decay, adjust_lr_fn="match_rms_adamw"))
    if outer:
        optimizers.append(
            torch.optim.AdamW(outer, settings.rate, betas=(0.9, 0.98), weight_decay=decay / 5)
        )
    return optimizers


def rate(step: int, settings: Stage) -> float:
    """The learning rate of a step: a short rise, level, then a straight fall."""
    progress = step / settings.steps
    rise = (progress / settings.rise + 0.02) if settings.rise else 1.0
    fall = ((1 - progress) / settings.fall + 0.01) if settings.fall else 1.0
    return settings.rate * min(1.0, rise, fall)


class Average:
    """A moving average of the parameters that learn."""

    def __init__(self, task: nn.Module, decay: float) -> None:
        self.parameters = [p for p in task.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After a step; the first steps are forgotten sooner."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the parameters are the averages."""
        current = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.values)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, current)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are put into the list, to be heeded after the step."""
    seen: list[int] = []
    before = {
        s: signal.signal(s, lambda n, _: seen.append(n)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_interrupts(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the loop ends the workers


def fingerprint(config: Config, settings: Stage) -> dict[str, Any]:
    """The settings that a resumed run must share with the one that it goes on with."""
    known = dataclasses.asdict(config)
    shared = ("seed", "precision", "vision", "text", "projector", "data", "lora")
    values = {name: known[name] for name in shared} | {"stage": dataclasses.asdict(settings)}
    for name in ("data", "stage"):
        values[name] = {k: v for k, v in values[name].items() if k not in FREE}
    return json.loads(json.dumps(values))


def check_made_with(file: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises TrainError unless what a file was made with is what would make it now."""
    for name, value in now.items():
        if before.get(name) != value:
            raise TrainError(
                f"{file} was made with other settings ({name} was {before.get(name)}, is {value}); "
                "delete it to begin this stage anew"
            )


class Checkpoint:
    """state.pt: all that a run is at the end of a step."""

    def __init__(self, file: Path, made_with: dict[str, Any]) -> None:
        self.file, self.made_with = file, made_with

    def save(self, content: dict[str, Any]) -> None:
        """Written beside, then moved to its place."""
        fresh = self.file.with_suffix(".tmp")
        torch.save(content | {"made_with": self.made_with}, fresh)
        os.replace(fresh, self.file)

    def load(self) -> dict[str, Any]:
        """Checked."""
        try:
            content = torch.load(self.file, map_location="cpu", weights_only=True)
            made_with = content["made_with"]
        except Exception as error:  # zip, pickle and torch have many words for damage
            raise TrainError(
                f"{self.file} is damaged; delete it to begin this stage anew"
            ) from error
        check_made_with(self.file, made_with, self.made_with)
        return content


# ---- the loop ---------------------------------------------------------------------------------


def mixed_precision(config: Config) -> str:
    """`config.precision`, but float32 ("no") where bfloat16 would be emulated."""
    return "no" if emulates_bfloat16() else config.precision


def train(
    task: Task,
    batches: Dataset[dict[str, Tensor]],
    config: Config,
    settings: Stage,
    folder: Path,
) -> None:
    """Take `settings.steps` steps, from the checkpoint on if there is one, and export the result.

    Raises `Stopped` after a signal, and `TrainError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=mixed_precision(config), gradient_accumulation_steps=settings.accumulate
    )
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    task.to(accelerator.device)
    average = Average(task, settings.average)
    plain = make_optimizers(task, settings)
    wrapped, *optimizers = accelerator.prepare(task, *plain)
    checkpoint = Checkpoint(folder / "state.pt", fingerprint(config, settings))
    log = Log(folder, settings, accelerator.is_main_process)
    done = 0
    if checkpoint.file.exists():
        state = checkpoint.load()
        done = state["steps"]
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["parameters"][name])
            torch._foreach_copy_(
                average.values, [v.to(accelerator.device) for v in state["average"]]
            )
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        _set_generators(state["generators"][accelerator.process_index])
    log.begin(done)

    def save(step: int) -> None:
        generators = gather_object([_generators()])
        if accelerator.is_main_process:
            checkpoint.save(
                {
                    "steps": step,
                    "parameters": {name: p.detach() for name, p in trained.items()},
                    "average": average.values,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "generators": generators,
                }
            )
        accelerator.wait_for_everyone()

    first = done * settings.accumulate * accelerator.num_processes + accelerator.process_index
    last = settings.steps * settings.accumulate * accelerator.num_processes
    loader = iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(first, last, accelerator.num_processes),
            num_workers=config.data.workers,
            prefetch_factor=4 if config.data.workers else None,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # else it draws from the one that the stages use
            pin_memory=accelerator.device.type == "cuda",
        )
    )
    pictures = settings.batch * settings.accumulate * accelerator.num_processes
    stopped = False
    with noted_signals() as signals, log.progress(done) as bar:
        for step in range(done, settings.steps):
            for _ in range(settings.accumulate):
                batch = {k: v.to(accelerator.device) for k, v in _next(loader).items()}
                with accelerator.accumulate(wrapped):
                    loss, numbers = wrapped(batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(trained.values(), 1.0)
                    for optimizer in optimizers:
                        for group in optimizer.param_groups:
                            group["lr"] = rate(step, settings)
                        optimizer.step()
                        optimizer.zero_grad()
                log.add({"loss": loss.detach()} | numbers)
            average.update(step)
            bar.update()
            log.step(step + 1, pictures, bar)
            ended = step + 1 == settings.steps
            if signals:
                accelerator.set_trigger()
            stopped = accelerator.check_trigger()  # in any process
            if (step + 1) % settings.report_every == 0 or ended:
                if accelerator.is_main_process:
                    with log.paused(), average.in_place():
                        log.report(step + 1, validated(task))
                accelerator.wait_for_everyone()
            if stopped or (step + 1) % settings.save_every == 0 or ended:
                with log.paused():
                    save(step + 1)
            if stopped and not ended:
                print(f"stopped; {checkpoint.file} holds step {step + 1}", file=sys.stderr)
                raise Stopped(signals)
    if accelerator.is_main_process:
        with average.in_place():
            task.export(folder / "model")
    accelerator.wait_for_everyone()
    if stopped:  # in the last step: the stage is done, but not what would follow
        raise Stopped(signals)


def _next(loader: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The next batch; of a worker's complaint only what it says is kept, not its traceback."""
    try:
        return next(loader)
    except TrainError as error:
        raise TrainError(str(error).strip().splitlines()[-1].split("TrainError: ")[-1]) from None


def validated(task: Task) -> dict[str, float]:
    """The task's own measures, without a trace in the training."""
    generators = _generators()
    task.eval()
    with torch.no_grad():
        measures = task.validate()
    task.train()
    _set_generators(generators)
    return measures


def _generators() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


# ---- the log ----------------------------------------------------------------------------------


class Log:
    """log.jsonl, the progress bar and the curves."""

    def __init__(self, folder: Path, settings: Stage, writes: bool) -> None:
        self.file, self.settings, self.writes = folder / "log.jsonl", settings, writes
        self.name = folder.name
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.parts = 0
        self.since = time.monotonic()

    def begin(self, done: int) -> None:
        """Forget what an interrupted run wrote after its last checkpoint, and half a line."""
        if self.writes and self.file.exists():
            lines = self.file.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= done]
            fresh = self.file.with_suffix(".tmp")
            fresh.write_text("".join(kept))
            os.replace(fresh, self.file)

    def progress(self, done: int) -> tqdm:  # type: ignore[type-arg]
        """The bar; on a terminal only."""
        return tqdm(
            total=self.settings.steps,
            initial=done,
            desc=self.name,
            unit="step",
            disable=None if self.writes else True,
        )

    def add(self, numbers: dict[str, Tensor]) -> None:
        """The numbers of one forward pass."""
        for name, number in numbers.items():
            self.sums[name] = self.sums[name] + number.detach()
        self.parts += 1

    def step(self, step: int, pictures: int, bar: tqdm) -> None:  # type: ignore[type-arg]
        """Write the means of the last steps, now and then."""
        if step % self.settings.log_every and step != self.settings.steps:
            return
        now = time.monotonic()
        means = {name: float(total) / self.parts for name, total in self.sums.items()}
        steps = self.parts / self.settings.accumulate
        speed = steps * pictures / (now - self.since)
        self._write({"step": step, "pictures_per_second": speed} | means)
        bar.set_postfix(loss=f"{means['loss']:.3f}", pictures_per_second=f"{speed:.0f}")
        self.sums.clear()
        self.parts, self.since = 0, now

    def report(self, step: int, measures: dict[str, float]) -> None:
        """Write and print what validation says."""
        self._write({"step": step, "time": round(time.time())} | measures, shown=True)
        plot_curves(self.file)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within does not count for the throughput."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def _write(self, numbers: dict[str, float], shown: bool = False) -> None:
        if self.writes:
            line = json.dumps(
                {k: v if isinstance(v, int) else round(v, 5) for k, v in numbers.items()}
            )
            with open(self.file, "a") as out:
                out.write(line + "\n")
            if shown:
                tqdm.write(f"{self.name} {line}")
                sys.stdout.flush()


def plot_curves(file: Path) -> None:
    """log.jsonl -> curves.png beside it: losses, and measures between 0 and 1."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in file.read_text().splitlines():
        numbers = json.loads(line)
        for name, value in numbers.items():
            if name not in ("step", "time", "pictures_per_second"):
                curves[name].append((numbers["step"], value))
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9, 10), sharex=True)
    for name, points in curves.items():
        axes = upper if "loss" in name else lower
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    upper.set(ylabel="loss", yscale="log")
    lower.set(ylabel="measure", xlabel="step")
    for axes in (upper, lower):
        if axes.lines:
            axes.legend(fontsize=6, ncols=2)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    fresh = file.with_name("curves.tmp.png")
    figure.savefig(fresh, dpi=110)
    pyplot.close(figure)
    os.replace(fresh, file.with_name("curves.png"))


# ---- the command line of every stage -----------------------------------------------------------


def stage_main(run: Any, description: str) -> None:
    """`python train/STAGE.py --config TOML --out DIR`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="one of train/configs")
    parser.add_argument("--out", type=Path, required=True, help="the folder of all stages")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()  # it reports each weight that a part has no use for
    transformers.logging.disable_progress_bar()
    PartialState(
        cpu=not torch.accelerator.is_available(),
        timeout=timedelta(days=7),  # the processes wait for what the first one does alone
    )
    try:
        run(load_config(args.config), args.out)
    except TrainError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # outside a stage's steps
        sys.exit(128 + signal.SIGINT)
