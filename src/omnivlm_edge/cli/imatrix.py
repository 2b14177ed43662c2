"""`omnivlm-edge imatrix`: what a model's weights meet, for a better quantization."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from .options import complete_path, find_source, model_argument, setting


@click.command()
@model_argument()
@click.option(
    "--images",
    metavar="PATH",
    multiple=True,
    required=True,
    shell_complete=complete_path,
    help="Pictures: a directory with all below it, a file or a pattern. May be repeated.",
)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    help="Question on every picture, instead of three ordinary ones. May be repeated.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.  [default: NAME-imatrix.gguf, as the text model is called]",
)
@setting(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Longest answer, in tokens.",
)
@setting("-t", "--threads", type=click.IntRange(1, 512), help="CPU threads.  [default: all cores]")
def imatrix(
    model: str,
    images: tuple[str, ...],
    prompts: tuple[str, ...],
    out: Path | None,
    max_tokens: int,
    threads: int | None,
) -> None:
    """Measure what matters to MODEL's weights, on pictures of yours.

    MODEL is `demo`, a published model's name (its F16 files are taken), a directory that holds a
    text model and its mmproj, or the text model's GGUF file. It answers questions about the
    pictures; the importance matrix of both files is written, in llama.cpp's GGUF format.
    """
    from tqdm import tqdm

    from ..calibration import PROMPTS, collect
    from ..convert.output import publishing
    from ..quantize.file import model_stem
    from ..sources import find_pictures

    pictures = [path for text in images for path in find_pictures(text)]
    files = find_source(model)
    if out is None:
        out = Path(f"{model_stem(files.text)}-imatrix.gguf")
    inputs = [files.text, files.mmproj, *map(Path, pictures)]
    with (
        publishing([out], 0, inputs) as (part,),
        tqdm(desc=out.name, unit=" questions", disable=None) as bar,
    ):

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        collect(
            files,
            pictures,
            prompts or PROMPTS,
            datasets=[_name(text) for text in images],
            max_tokens=max_tokens,
            n_threads=threads,
            notify=lambda message: bar.write(message, file=sys.stderr),
            progress=show,
        ).write(part)
    click.echo(out)


def _name(text: str) -> str:
    """The last part of a path, as text: files travel, and need not tell where they were made."""
    name = os.path.basename(os.path.abspath(os.path.expanduser(text))) or text
    return name.encode(errors="backslashreplace").decode()
