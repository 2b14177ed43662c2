"""`omnivlm-edge bench`: what a model costs on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..values import VISION_PRECISIONS
from .options import (
    check_plot,
    comma_list,
    complete_path,
    device_option,
    low_memory_option,
    mmproj_option,
    model_argument,
    n_gpu_layers_option,
    no_mmproj_offload_option,
    note,
    setting,
    writing,
)

if TYPE_CHECKING:
    from ..bench import Case, Record


@click.command()
@model_argument()
@mmproj_option
@click.option(
    "-i",
    "--image",
    metavar="IMAGE",
    type=click.Path(path_type=Path),
    shell_complete=complete_path,
    help="Picture to ask about: a file, no address or pattern.  [default: a made JPEG of "
    "1046 x 1568]",
)
@click.option(
    "-p",
    "--prompt",
    default="Describe the image",
    show_default=True,
    help="Question about the picture.",
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Longest answer, in tokens.",
)
@click.option(
    "-r",
    "--repeats",
    type=click.IntRange(1, 10_000),
    default=5,
    show_default=True,
    help="How often each case is measured, after once to warm up.",
)
@setting(
    "-t",
    "--threads",
    metavar="N,N…",
    multiple=True,
    callback=comma_list(click.IntRange(1, 512)),
    help="CPU threads. May be repeated.  [default: all cores]",
)
@device_option
@setting(
    "--vision-precision",
    "--precision",
    "precision",
    metavar="P,P…",
    multiple=True,
    callback=comma_list(click.Choice(VISION_PRECISIONS)),
    default=["auto"],
    show_default=True,
    help=f"How pictures are encoded on the CPU: {', '.join(VISION_PRECISIONS)}. May be repeated.",
)
@low_memory_option
@n_gpu_layers_option
@no_mmproj_offload_option
@click.option(
    "-o",
    "--output",
    type=click.Choice(["md", "json", "jsonl", "csv"]),
    default="md",
    show_default=True,
    help="A table for people, or all that was measured.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw time of the stages and memory into this PNG file. Needs the extra `plot`.",
)
@click.option(
    "--compare",
    "earlier",
    type=click.Path(path_type=Path),
    help="Show what changed since an earlier run, of which this file has the -o json or jsonl.",
)
@click.pass_context
def bench(
    context: click.Context,
    model: str,
    mmproj: Path | None,
    image: Path | None,
    prompt: str,
    max_tokens: int,
    repeats: int,
    threads: list[int],
    device: str,
    precision: list[str],
    low_memory: bool,
    n_gpu_layers: int | None,
    no_mmproj_offload: bool,
    output: str,
    plot: Path | None,
    earlier: Path | None,
) -> None:
    """Measure time and memory of MODEL on this machine.

    Every combination of --threads and --vision-precision is a case, in a process of its own.

    \b
    load         of both files, which the system has in memory already
    preprocess   picture file to pixels
    encode       pixels to image tokens
    prefill      prompt and image tokens
    first token  all from the question to the answer's first token, model loaded
    decode       the rest of the answer
    total        all from the question to the end of the answer

    Ctrl-C ends it; what was measured is printed, and a case that was cut short marked as partial.
    """
    check_plot(plot)
    if image is not None and not image.exists() and _is_no_file(str(image)):
        raise click.BadParameter("give a file: save the picture first", param_hint="--image")

    from ..bench import make_cases, read_records, write_made_picture
    from ..device import available_cores
    from ..models import find_model

    # Before the measurements: what is wrong fails at once.
    before = read_records(earlier) if earlier is not None else []
    if max(threads, default=1) > available_cores():
        note(
            f"{max(threads)} threads on {available_cores()} cores wait for each other: this says "
            "little about the machine"
        )
    with tempfile.TemporaryDirectory() as scratch:
        cases = make_cases(
            find_model(model, mmproj, notify=note),
            image or write_made_picture(Path(scratch)),
            threads=threads or [None],
            precisions=precision,
            prompt=prompt,
            max_tokens=max_tokens,
            repeats=repeats,
            device=device,
            low_memory=low_memory,
            n_gpu_layers=n_gpu_layers,
            mmproj_offload=not no_mmproj_offload,
        )
        records, code = _measure(cases)
    _show(records, output, before)
    if plot is not None and any(record["stages"] for record in records):
        from ..plot import plot_stages

        with writing(plot):
            plot_stages(records, plot, before)
    context.exit(code)


def _is_no_file(text: str) -> bool:
    return text in ("-", "clipboard:") or text.startswith(("http:", "https:", "data:"))


def _measure(cases: list[Case]) -> tuple[list[Record], int]:
    """The records, and the command's exit code."""
    from tqdm import tqdm

    from ..bench import run_cases

    records: list[Record] = []
    try:
        with tqdm(total=sum(case.steps for case in cases), desc="bench", disable=None) as bar:
            run_cases(cases, records, progress=bar.update)
    except KeyboardInterrupt:
        finished = sum(not record["partial"] for record in records)
        if records:
            note(f"\nInterrupted: {finished} of {len(cases)} cases are finished.")
        else:
            note("\nInterrupted: nothing was measured.")
        return records, 130
    return records, int(any(record["error"] for record in records))


def _show(records: list[Record], output: str, before: list[Record]) -> None:
    """Results on stdout, a comparison below; errors, and one beside JSON or CSV, on stderr."""
    from ..bench import describe_case
    from .bench_tables import comparison, render

    for record in records:
        if record["error"]:
            note(f"Error: {describe_case(record)}: {record['error']}")
    if records:
        click.echo(render(records, output), nl=False)
    if records and before:
        click.echo(err=output != "md")
        click.echo(comparison(records, before), nl=False, err=output != "md")
