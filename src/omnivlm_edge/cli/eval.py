"""`omnivlm-edge eval`: how often a model is right, on benchmarks."""

from __future__ import annotations

import dataclasses
import itertools
import os
from contextlib import ExitStack
from pathlib import Path

import click

from ..errors import OptionError
from ..evaluation import BENCHMARKS
from .batch import FAILED_ROWS, Progress, handle_signals, make_task
from .options import (
    EngineSettings,
    complete_path,
    consent,
    engine_options,
    mmproj_option,
    model_argument,
    no_hashes_option,
    note,
    offline_option,
    parallel_option,
    readers_option,
    setting,
    writing,
    yes_option,
)

PROMPT_POSITIONS = 512  # of a question with choices and a picture, and some more
FEWEST_POSITIONS = 2048  # for one with seven pictures, as MMMU has, however few run side by side


@click.command("eval")
@model_argument()
@click.argument("benchmark", type=click.Choice(BENCHMARKS))
@click.argument("data", type=click.Path(path_type=Path), shell_complete=complete_path)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where answers, scores and examples of failures go.",
)
@click.option("--split", help="Which part of the data.  [default: the one usually reported]")
@click.option(
    "--images",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the pictures lie, if not where they are published.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Ask so many questions, drawn at random but always alike.  [default: all]",
)
@click.option("--overwrite", is_flag=True, help="Ask everything again.")
@click.option("--retry-errors", is_flag=True, help="Ask the questions again that failed.")
@mmproj_option
@setting(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Longest answer, in tokens.  [default: what suits the benchmark]",
)
@parallel_option
@readers_option
@engine_options(
    None,
    "Positions that all running answers share.  [default: 512 and -n for each of them, at least "
    "2048]",
)
@no_hashes_option
@offline_option
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@yes_option
def eval_(
    model: str,
    benchmark: str,
    data: Path,
    output: Path,
    split: str | None,
    images: Path | None,
    limit: int | None,
    overwrite: bool,
    retry_errors: bool,
    mmproj: Path | None,
    max_tokens: int | None,
    parallel: int,
    readers: int | None,
    ctx_size: int | None,
    settings: EngineSettings,
    no_cache: bool,
    offline: bool,
    quiet: bool,
    yes: bool,
) -> None:
    """Score MODEL on BENCHMARK, whose files lie in the directory DATA as they are published.

    \b
    testset    scenes made by train/testset.py: captions, descriptions, questions
               in English and Chinese, POPE
    pope       *pope_random.json, …popular, …adversarial; COCO's pictures
    scienceqa  problems.json, pid_splits.json, images/; test, val, minival, train
    mmmu       SUBJECT/validation-*.parquet; validation, dev, test
    mmvet      mm-vet.json, images/: answers for its judge, no scores
    chartqa    test_human.json, test_augmented.json, png/; test, val, train

    Answers are greedy. The scores are printed and written to DIR/result.md and result.json, with
    95 % intervals; DIR/failures.png shows wrong answers. The same command, run again, asks only
    what is missing. Exit code 3: some questions failed. docs/evaluation.md tells the rules.
    """
    from ..batch.output import Output
    from ..batch.runner import Answerer
    from ..engine import OmniVLM
    from ..evaluation import find_benchmark
    from ..evaluation import run as steps
    from ..models import find_model
    from ..values import GenerateOptions

    chosen = find_benchmark(benchmark)
    split = _check_split(benchmark, chosen.splits, split)
    if not data.is_dir():
        raise OptionError(f"{data}: there is no such directory")
    everything = chosen.read(data, images, split)
    questions = steps.choose(everything, limit)
    steps.check_pictures(questions)

    files = find_model(
        model, mmproj, offline=offline, consent=consent(yes), make_vision=yes, notify=note
    )
    longest = max_tokens or chosen.max_tokens
    options = GenerateOptions(max_tokens=longest)
    task = make_task(files, (), options, no_cache)
    about = {
        "model": [task.model, task.mmproj, task.variant],
        "benchmark": benchmark,
        "split": split,
        "data": steps.digest(everything),
        "options": dataclasses.asdict(options),
        "vision precision": settings["vision_precision"],
    }
    wanted = parallel * (PROMPT_POSITIONS + longest)
    settings |= {
        "n_ctx": ctx_size or max(FEWEST_POSITIONS, wanted),
        "n_sequences": parallel,
        "disk_cache": False,
    }
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        out = stack.enter_context(
            Output(
                os.fspath(output / steps.ANSWERS),
                about,
                overwrite=overwrite,
                retry_errors=retry_errors,
            )
        )
        ran = None if overwrite else steps.read_ran(output)
        with Progress(out, quiet) as progress:
            handle_signals(None)
            progress.expect(steps.count(questions))
            work = steps.pending(questions, out.is_new, progress.skip)
            first = next(work, None)  # a finished run needs no model
            if first is not None:
                engine = OmniVLM(files.text, files.mmproj, variant=files.variant, **settings)
                ran = steps.describe(engine, settings["n_threads"])
                answerer = Answerer(engine, task, n_parallel=parallel, n_readers=readers)
                stack.enter_context(answerer)
                rows = answerer.run(itertools.chain([first], work))
                stack.callback(rows.close)
                for row in rows:
                    out.append(row)
                    progress.note(row)
            out.finish()
        result = {
            "benchmark": benchmark,
            "split": split or None,
            "limit": limit,
            "model": {
                "name": model,
                "text": {"file": files.text.name, "sha256": task.model},
                "mmproj": {"file": files.mmproj.name, "sha256": task.mmproj},
            },
            "options": {
                "max_tokens": options.max_tokens,
                "temperature": options.temperature,
                "parallel": parallel,
            },
            "ran": ran,
            "data_sha256": about["data"],
        }
        answers = steps.read_answers(out.path, questions)
        with writing(output):
            text = steps.report(output, chosen, questions, answers, result)
    click.echo(text.encode(errors="backslashreplace").decode(), nl=False)  # names may be no text
    if not all(row and row["answer"] is not None for row in answers):
        click.get_current_context().exit(FAILED_ROWS)


def _check_split(name: str, splits: tuple[str, ...], split: str | None) -> str:
    if split is None:
        return splits[0] if splits else ""
    if split not in splits:
        known = f"has {', '.join(splits)}" if splits else "has none"
        raise click.BadParameter(f"'{split}': {name} {known}", param_hint="--split")
    return split
