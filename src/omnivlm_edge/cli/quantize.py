"""`omnivlm-edge quantize`: smaller files of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import OptionError
from ..recipes import RECIPES, recipe_name
from .options import model_argument, note, setting


def _type_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--type NAME, and --NAME for short."""
    for name in RECIPES:
        command = click.option(
            f"--{name}", is_flag=True, hidden=True, help=f"The same as --type {name}."
        )(command)
    names = ", ".join(RECIPES)
    return click.option("--type", "type_name", metavar="NAME", help=f"One of {names}.")(command)


@click.command()
@model_argument()
@click.argument("out", required=False, type=click.Path(path_type=Path, file_okay=False))
@_type_options
@setting("-t", "--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
def quantize(
    model: str, out: Path | None, type_name: str | None, threads: int | None, **flags: bool
) -> None:
    """Make smaller files of MODEL.

    MODEL is `demo`, a published model's name (its F16 files are taken), a directory that holds a
    text model and its mmproj, or one of the two files alone. The result goes into the directory
    OUT, which is the source's own when left out (the current one for names). Name the type as
    `--type q4_k_m`, or `--q4_k_m` for short.
    """
    from tqdm import tqdm

    from ..hub import parse_reference
    from ..models import find_model
    from ..quantize import output_name, quantize_file

    name = _only_type(type_name, flags)
    if Path(model).is_file():
        sources = [Path(model)]
    else:
        reference = parse_reference(model)
        if reference is not None and reference.quantization is None:
            model += ":f16"  # what is quantized already cannot be quantized well
        files = find_model(model, notify=note)
        sources = [files.text, files.mmproj]
    if out is None:  # a name's files lie where nobody looks for new ones
        named = model == "demo" or parse_reference(model) is not None
        out = Path() if named else sources[0].parent
    before = after = 0
    for source in sources:
        output = out / output_name(source, name)
        with tqdm(desc=output.name, unit=" tensors", disable=None) as bar:

            def show(done: int, total: int, bar: tqdm[Any] = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            quantize_file(source, output, name, n_threads=threads, progress=show)
        click.echo(output)
        before += source.stat().st_size
        after += output.stat().st_size
    click.echo(f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB", err=True)


def _only_type(type_name: str | None, flags: dict[str, bool]) -> str:
    names = [name for name, given in flags.items() if given]
    if type_name is not None:
        names.append(type_name)
    if len(names) != 1:
        raise click.UsageError("name one type, such as --q4_k_m, --q8_0 or --type NAME")
    try:
        return recipe_name(names[0])
    except OptionError as exc:
        raise click.UsageError(str(exc)) from exc
