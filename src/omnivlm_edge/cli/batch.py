"""`omnivlm-edge batch`: every picture of a folder, a table, a data set."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .options import (
    EngineSettings,
    Wanted,
    answer_options,
    complete_path,
    consent,
    engine_options,
    mmproj_option,
    model_argument,
    no_hashes_option,
    note,
    offline_option,
    parallel_option,
    private_urls_option,
    readers_option,
    yes_option,
)

if TYPE_CHECKING:
    from ..batch.inputs import Columns
    from ..batch.output import Output
    from ..batch.runner import Row, Task, Work
    from ..values import GenerateOptions, ModelFiles

FAILED_ROWS = 3  # the exit code


@click.command()
@model_argument()
@click.argument("inputs", nargs=-1, metavar="[INPUT]...", shell_complete=complete_path)
@click.option(
    "-p", "--prompt", "prompts", multiple=True, help="Question. May be repeated: a row for each."
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE|DIR/",
    shell_complete=complete_path,
    help="Where the rows go: a .jsonl or .parquet file, or a directory of shards.",
)
@click.option("--overwrite", is_flag=True, help="Empty the output first.")
@click.option("--retry-errors", is_flag=True, help="Do the rows again that failed.")
@click.option(
    "--format", type=click.Choice(["jsonl", "parquet"]), help="Of the shards in a directory."
)
@click.option(
    "--shard-rows",
    type=click.IntRange(min=1),
    help="Rows in a shard.  [default: 100000]",
)
@click.option("--image-column", default="image", show_default=True, help="Of tables: the picture.")
@click.option("--key-column", help="Of tables: what names a row.  [default: the picture's path]")
@click.option("--prompt-column", help="Of tables: the question, if each row has its own.")
@click.option(
    "--watch",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False),
    help="Answer what is in this folder, and what comes there, until Ctrl-C.",
)
@click.option(
    "--ray",
    "ray_address",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="auto",
    help="Run on this Ray cluster; without an address on the running one, or a local one.",
)
@click.option(
    "--ray-actors",
    metavar="N|MIN,MAX",
    default="1",
    show_default=True,
    help="Copies of the model; with MIN,MAX as many as the work needs.",
)
@click.option(
    "--ray-cpus", type=click.FloatRange(min=0), default=2, show_default=True, help="Each."
)
@click.option(
    "--ray-gpus", type=click.FloatRange(min=0), default=0, show_default=True, help="Each."
)
@mmproj_option
@answer_options
@parallel_option
@readers_option
@engine_options(
    None, "Positions that all running answers share.  [default: 256 and -n for each of them]"
)
@no_hashes_option
@private_urls_option
@offline_option
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@yes_option
def batch(
    model: str,
    inputs: tuple[str, ...],
    prompts: tuple[str, ...],
    output: str,
    overwrite: bool,
    retry_errors: bool,
    format: str | None,
    shard_rows: int | None,
    image_column: str,
    key_column: str | None,
    prompt_column: str | None,
    watch: str | None,
    ray_address: str | None,
    ray_actors: str,
    ray_cpus: float,
    ray_gpus: float,
    mmproj: Path | None,
    wanted: Wanted,
    parallel: int,
    readers: int | None,
    ctx_size: int | None,
    settings: EngineSettings,
    no_cache: bool,
    allow_private_urls: bool,
    offline: bool,
    quiet: bool,
    yes: bool,
) -> None:
    """Ask MODEL the same about every picture, and go on where an earlier run ended.

    INPUT is a folder (with all below it), a pattern, a picture, a list of paths (.txt, or - for
    standard input), a table (.jsonl, .csv, .tsv, .parquet) or a WebDataset shard (.tar).

    A row of JSON is written for each picture and prompt, with the answer or with an error. The same
    command, run again, does only what is missing. Exit code 3: some rows failed.
    """
    if bool(inputs) == bool(watch):
        raise click.UsageError("name INPUT, or a folder with --watch, and not both")
    if bool(prompts) == bool(prompt_column):
        raise click.UsageError("ask with -p PROMPT, or name --prompt-column, and not both")
    if watch and (prompt_column or ray_address):
        raise click.UsageError("--watch goes with -p, and without --ray")
    actors = _parse_actors(ray_actors)
    if ray_address is None:
        _refuse_given("without --ray", "ray_actors", "ray_cpus", "ray_gpus")
    _check_address(ray_address)

    from ..batch.inputs import (
        Columns,
        check_columns,
        check_inputs,
        has_tables,
        named_tables,
        read_inputs,
    )
    from ..batch.output import Output, is_written
    from ..batch.runner import context_size, pending
    from ..batch.watch import watch_folder
    from ..engine import check_choices
    from ..errors import OptionError
    from ..models import find_model

    if not has_tables(inputs):
        _refuse_given("without a table", "image_column", "key_column", "prompt_column")
    options = wanted.options()
    columns = Columns(image_column, key_column, prompt_column)
    check_inputs(inputs)
    for path in named_tables(inputs):
        if is_written(path, output):
            raise OptionError(f"{path}: is an input, and would be written to: name another output")
        check_columns(path, columns)
    if wanted.choices:
        check_choices(wanted.choices)
    files = find_model(
        model, mmproj, offline=offline, consent=consent(yes), make_vision=yes, notify=note
    )
    task = make_task(
        files,
        tuple(dict.fromkeys(prompts)),
        options,
        no_cache,
        choices=wanted.choices,
        system=wanted.system,
    )
    about = _about(task, columns, settings)
    settings |= {
        "n_ctx": ctx_size or context_size(options, parallel),
        "n_sequences": parallel,
        "disk_cache": False,
    }
    stop = threading.Event()
    with ExitStack() as stack:
        out = stack.enter_context(
            Output(
                output,
                about,
                format=format,
                shard_rows=shard_rows,
                overwrite=overwrite,
                retry_errors=retry_errors,
            )
        )
        if out.n_repaired:
            note(f"({out.n_repaired} torn or double rows were taken out of {output})")
        progress = stack.enter_context(Progress(out, quiet))
        items = watch_folder(watch, stop) if watch else read_inputs(inputs, columns)
        skipped = (lambda n: None) if watch else progress.skip
        work: Iterator[Work] = pending(items, task, out.is_new, skipped)
        handle_signals(stop if watch else None)
        if not watch:
            if "-" not in inputs:
                progress.count(inputs, columns, max(1, len(task.prompts)))
            first = next(work, None)  # a finished run needs no model
            if first is None and not progress.n_skipped:
                raise OptionError(f"{', '.join(inputs)}: nothing to ask about was found there")
            work = iter(()) if first is None else itertools.chain([first], work)
        if watch or first is not None:
            if ray_address is not None:
                from ..ray import Cluster, run_on_ray

                cluster = Cluster(ray_address, *actors, num_cpus=ray_cpus, num_gpus=ray_gpus)
                rows = run_on_ray(
                    work, task, files, settings, cluster, allow_private=allow_private_urls
                )
            else:
                rows = _answer_here(
                    stack, work, task, files, settings, parallel, readers, allow_private_urls
                )
            stack.callback(rows.close)
            for row in rows:
                out.append(row)
                progress.note(row)
        out.finish()
    if out.n_errors:
        click.get_current_context().exit(FAILED_ROWS)


def _answer_here(
    stack: ExitStack,
    work: Iterable[Work],
    task: Task,
    files: ModelFiles,
    settings: EngineSettings,
    parallel: int,
    readers: int | None,
    allow_private: bool,
) -> Any:
    from ..batch.runner import Answerer
    from ..engine import OmniVLM

    model = OmniVLM(files.text, files.mmproj, variant=files.variant, **settings)
    answerer = stack.enter_context(
        Answerer(model, task, n_parallel=parallel, n_readers=readers, allow_private=allow_private)
    )
    return answerer.run(work)


def make_task(
    files: ModelFiles,
    prompts: tuple[str, ...],
    options: GenerateOptions,
    no_cache: bool,
    *,
    choices: tuple[str, ...] = (),
    system: str | None = None,
) -> Task:
    """What is asked, of model files that are hashed for it."""
    from ..batch.runner import Task
    from ..files import identity, loaded_digest
    from ..paths import cache_dir

    memo = None if no_cache else cache_dir() / "file-hashes.json"
    text, mmproj = (
        loaded_digest(path, identity(path), memo) for path in (files.text, files.mmproj)
    )
    return Task(
        prompts=prompts,
        options=options,
        choices=choices,
        system=system,
        variant=files.variant,
        model=text,
        mmproj=mmproj,
    )


def _about(task: Task, columns: Columns, settings: EngineSettings) -> dict[str, Any]:
    """What decides about the answers, by the names that a refusal uses."""
    return {
        "model": [task.model, task.mmproj, task.variant],
        "prompt": task.prompts,
        "system text": task.system,
        "choices": task.choices,
        "options": dataclasses.asdict(task.options),
        "columns": dataclasses.asdict(columns),
        "vision precision": settings["vision_precision"],
    }


def handle_signals(stop: threading.Event | None) -> None:
    """SIGTERM is as Ctrl-C; when watching the first one ends it in peace."""

    def end(*_: Any) -> None:
        if stop is None or stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGTERM, end)
    if stop is not None:
        signal.signal(signal.SIGINT, end)


def _refuse_given(where: str, *names: str) -> None:
    """Raises UsageError for an option that would do nothing there."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} does nothing {where}")


def _parse_actors(text: str) -> tuple[int, int]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers) or len(numbers) > 2:
        raise click.UsageError(f"--ray-actors {text}: a number, or two with a comma")
    low, high = int(numbers[0]), int(numbers[-1])
    if not 1 <= low <= high:
        raise click.UsageError(f"--ray-actors {text}: from 1 on, the smaller one first")
    return low, high


def _check_address(address: str | None) -> None:
    if address is None or address in ("auto", "local"):
        return
    if ":" not in address or os.path.exists(address):
        raise click.UsageError(
            f"--ray took {address} for an address (auto, local, HOST:PORT, ray://…): put --ray last"
        )


class Progress:
    """The bar on stderr, and the summary when it ends. Any thread may tell it something."""

    def __init__(self, output: Output, quiet: bool) -> None:
        from tqdm import tqdm

        self._output, self._quiet = output, quiet
        self._started = time.monotonic()
        self._n_before = output.n_rows
        self._n_new = self._n_failed = self._n_tokens = self.n_skipped = 0
        self._ended = threading.Event()
        interval = 0.2 if sys.stderr.isatty() else 30  # seconds; a log gets a line now and then
        self._bar = tqdm(
            unit=" rows", mininterval=interval, maxinterval=interval, smoothing=0.05, disable=quiet
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._bar.close()
        seconds = time.monotonic() - self._started
        rate = self._n_new / seconds if seconds else 0.0
        if kind is None or issubclass(kind, KeyboardInterrupt):
            end = "" if kind is None else "; interrupted: the same command goes on from here"
            note(
                f"{self._n_new} rows in {seconds:.1f} s ({rate:.2f}/s, {self._n_tokens} tokens), "
                f"{self._n_failed} of them failed; {self._output.path} has {self._output.n_rows}, "
                f"{self._output.n_errors} of them failed{end}"
            )
        double = self.n_skipped - self._n_before
        if kind is None and double > 0:
            note(f"({double} more were left out: another one has the same key and prompt)")

    def skip(self, n: int) -> None:
        """Rows that were there before, or that have the key and prompt of another one."""
        self.n_skipped += n
        if not self._quiet:
            self._bar.initial += n  # they say nothing about the rate
            self._bar.n += n

    def note(self, row: Row) -> None:
        """A row that is written."""
        self._n_new += 1
        if row["error"]:
            self._n_failed += 1
            self._bar.set_postfix(failed=self._n_failed, refresh=False)
        else:
            self._n_tokens += row["usage"]["completion_tokens"]
        self._bar.update()

    def expect(self, n: int) -> None:
        """So many rows there will be in all."""
        self._bar.total = n

    def count(self, inputs: tuple[str, ...], columns: Columns, n_prompts: int) -> None:
        """Finds out, meanwhile, how many rows there will be."""
        from ..batch.inputs import count_inputs

        def work() -> None:
            try:
                total = 0
                for total in count_inputs(inputs, columns):  # noqa: B007 - the last one counts
                    if self._ended.is_set():
                        return
                self._bar.total = total * n_prompts
            except Exception:  # whoever reads them will say so
                return

        if not self._quiet:
            threading.Thread(target=work, name="omnivlm-counter", daemon=True).start()
