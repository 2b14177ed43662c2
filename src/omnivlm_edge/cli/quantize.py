"""`omnivlm-edge quantize`: smaller files of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError
from ..quantize.recipes import BLOCK, RECIPES, QuantizeOptions, recipe_name
from .options import complete_path, find_source, model_argument, note, setting

if TYPE_CHECKING:
    from ..quantize.plan import PlannedTensor


def _type_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--type NAME, and --NAME for short."""
    for name in RECIPES:
        command = click.option(
            f"--{name}", is_flag=True, hidden=True, help=f"The same as --type {name}."
        )(command)
    names = ", ".join(RECIPES)
    return click.option("--type", "type_name", metavar="NAME", help=f"One of {names}.")(command)


def _rule(_context: click.Context, _parameter: click.Parameter, given: Sequence[str]) -> Any:
    rules = []
    for text in given:
        pattern, separator, name = text.rpartition("=")
        if not separator:
            raise click.BadParameter(f"{text!r} is not REGEX=TYPE, as in attn_v=q8_0")
        rules.append((pattern, name))
    return tuple(rules)


@click.command()
@model_argument()
@click.argument("out", required=False, type=click.Path(path_type=Path, file_okay=False))
@_type_options
@click.option("--vision-type", metavar="NAME", help="Another recipe for the vision file.")
@click.option("--text-type", metavar="NAME", help="Another recipe for the text model.")
@click.option("--embedding-type", metavar="TYPE", help="Type of the token embeddings.")
@click.option("--output-type", metavar="TYPE", help="Type of the output matrix.")
@click.option(
    "--tensor-type",
    "tensor_types",
    metavar="REGEX=TYPE",
    multiple=True,
    callback=_rule,
    help=f"Type of the matrices in whose name REGEX is found: {', '.join(BLOCK).lower()}.",
)
@click.option(
    "--imatrix",
    metavar="FILE",
    shell_complete=complete_path,
    help="Importance matrix, made by omnivlm-edge imatrix: what matters loses less.",
)
@click.option("--allow-requantize", is_flag=True, help="Take quantized sources, at a loss.")
@click.option(
    "--report", is_flag=True, help="Print what was lost, as `omnivlm-edge compare` measures it."
)
@click.option("--dry-run", is_flag=True, help="Print what would be written, tensor by tensor.")
@setting("-t", "--threads", type=click.IntRange(1, 512), help="CPU threads.  [default: all]")
def quantize(
    model: str,
    out: Path | None,
    type_name: str | None,
    vision_type: str | None,
    text_type: str | None,
    embedding_type: str | None,
    output_type: str | None,
    tensor_types: tuple[tuple[str, str], ...],
    imatrix: str | None,
    allow_requantize: bool,
    report: bool,
    dry_run: bool,
    threads: int | None,
    **flags: bool,
) -> None:
    """Make smaller files of MODEL.

    MODEL is `demo`, a published model's name (its F16 files are taken), a directory that holds a
    text model and its mmproj, or one of the two files alone. The result goes into the directory
    OUT, which is the source's own when left out (the current one for names). Name the type as
    `--type q4_k_m`, or `--q4_k_m` for short.
    """
    if out is not None and out.suffix.lower() == ".gguf" and not out.exists():
        raise click.BadParameter(
            f"{str(out)!r} would be a directory; the files in it are named by model and type",
            param_hint="OUT",
        )

    from ..model_file import inspect_file
    from ..quantize.file import output_name, plan_file
    from ..quantize.plan import NOT_IN_IMATRIX

    try:
        options = QuantizeOptions(
            tensor_types, embedding_type, output_type, imatrix, allow_requantize
        )
        shared = _only_type(type_name, flags)
        recipes = {
            kind: shared if own is None else recipe_name(own)
            for kind, own in (("vision", vision_type), ("text", text_type))
        }
    except OptionError as exc:
        raise click.UsageError(str(exc)) from exc
    sources = _sources(model)
    if out is None:  # a name's files lie where nobody looks for new ones
        out = Path() if _is_name(model) else sources[0].parent
    jobs = []
    for source in sources:
        recipe = recipes[inspect_file(source).kind]
        if recipe is None:
            raise click.UsageError("name one type, such as --q4_k_m, --q8_0 or --type NAME")
        plan = plan_file(source, recipe, options)
        jobs.append((source, recipe, out / output_name(source, recipe), plan))
    planned = [tensor for *_, plan in jobs for tensor in plan]
    for pattern, _ in tensor_types:
        if not any(tensor.is_matrix and re.search(pattern, tensor.name) for tensor in planned):
            raise click.UsageError(f"--tensor-type: {pattern!r} is found in no matrix's name")
    unknown = sum(NOT_IN_IMATRIX in tensor.note for tensor in planned)
    if unknown:
        note(f"{imatrix}: says nothing of {unknown} matrices; their columns count alike")
    before = sum(source.stat().st_size for source in sources)
    if dry_run:
        for _, _, output, plan in jobs:
            _print_plan(output, plan)
        after = sum(tensor.nbytes for tensor in planned)
        click.echo(f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB and metadata", err=True)
        return
    for source, recipe, output, _ in jobs:
        _quantize(source, output, recipe, options, threads)
        click.echo(output)
    after = sum(output.stat().st_size for _, _, output, _ in jobs)
    click.echo(f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB", err=True)
    if report:
        _report(sources, [output for _, _, output, _ in jobs], threads)


def _report(sources: Sequence[Path], outputs: Sequence[Path], threads: int | None) -> None:
    from ..compare import DEFAULT_PROMPTS, compare_models
    from ..values import ModelFiles
    from .compare import print_losses

    if len(sources) == 1:
        losses = compare_models(sources[0], outputs, n_threads=threads, notify=note)
    else:
        source, output = (ModelFiles(text, mmproj) for text, mmproj in (sources, outputs))
        losses = compare_models(source, [output], n_threads=threads)
    print_losses(losses, 0, DEFAULT_PROMPTS)


def _quantize(
    source: Path, output: Path, recipe: str, options: QuantizeOptions, threads: int | None
) -> None:
    from tqdm import tqdm

    from ..quantize.file import quantize_file

    with tqdm(desc=output.name, unit=" tensors", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        quantize_file(source, output, recipe, options, n_threads=threads, progress=show)


def _only_type(type_name: str | None, flags: dict[str, bool]) -> str | None:
    names = [name for name, given in flags.items() if given]
    if type_name is not None:
        names.append(type_name)
    if len(names) > 1:
        raise OptionError("name one type, such as --q4_k_m, --q8_0 or --type NAME")
    return recipe_name(names[0]) if names else None


def _is_name(model: str) -> bool:
    from ..hub import parse_reference

    return model == "demo" or parse_reference(model) is not None


def _sources(model: str) -> list[Path]:
    if Path(model).is_file():
        return [Path(model)]
    files = find_source(model)
    return [files.text, files.mmproj]


def _print_plan(output: Path, plan: Sequence[PlannedTensor]) -> None:
    click.echo(output)
    widths = max(len(tensor.name) for tensor in plan), max(len(_shape(tensor)) for tensor in plan)
    for tensor in plan:
        click.echo(
            f"  {tensor.name:{widths[0]}}  {_shape(tensor):>{widths[1]}}  {tensor.source.name:>6} "
            f"-> {tensor.target.name:<6}  {tensor.nbytes:>11,}  {tensor.note}".rstrip()
        )


def _shape(tensor: PlannedTensor) -> str:
    return " x ".join(map(str, tensor.shape))
