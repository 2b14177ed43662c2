"""`omnivlm-edge pull`, `ls`, `show`, `rm`: the models on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from ..errors import ModelFileError
from .options import consent, model_argument, note, yes_option

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@model_argument("models", metavar="MODEL...", nargs=-1, required=True)
@yes_option
@as_json
def pull(models: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Download models, or bring them up to date.

    MODEL is omnivision, omnivision-ocr, omnivision-preview or hf:USER/REPO, each with a
    quantization if you like: omnivision:q8_0. What is not published in that quantization is made
    from the F16 file, if you agree. An interrupted download goes on where it stopped. Prints the
    two files of each model.
    """
    from .. import hub

    pulled = []
    for model in models:
        wanted = hub.parse_reference(model)
        if wanted is None:
            raise ModelFileError(
                f"'{model}': is not the name of a published model; "
                f"the names are {', '.join(hub.KNOWN)} and hf:USER/REPO"
            )
        files = hub.pull(wanted, consent=consent(yes), make_vision=yes, notify=note)
        pulled.append({"name": str(wanted), "text": str(files.text), "mmproj": str(files.mmproj)})
        if not as_json:
            click.echo(f"{files.text}\n{files.mmproj}")
    if as_json:
        click.echo(json.dumps(pulled, indent=2))


@click.command()
@as_json
def ls(as_json: bool) -> None:
    """List the models on this machine (also: list)."""
    from ..hub import megabytes
    from ..store import list_models

    models = list_models()
    if as_json:
        entries = [
            {
                "name": model.name,
                "text": {"file": str(model.text.path), "quantization": model.text.quantization},
                "vision": {
                    "file": str(model.vision.path),
                    "quantization": model.vision.quantization,
                },
                "size": model.size,
                "where": model.place,
            }
            for model in models
        ]
        click.echo(json.dumps(entries, indent=2))
        return
    rows: list[tuple[str, ...]] = [("NAME", "TEXT", "VISION", "SIZE", "WHERE")]
    rows += [
        (
            model.name,
            model.text.quantization,
            model.vision.quantization,
            megabytes(model.size),
            model.place,
        )
        for model in models
    ]
    _print_table(rows)


@click.command()
@model_argument()
@as_json
def show(model: str, as_json: bool) -> None:
    """Describe a model on this machine.

    MODEL is a name, a directory, or one GGUF file.
    """
    from ..store import describe_model

    about = describe_model(model)
    if as_json:
        click.echo(json.dumps(about, indent=2))
    else:
        _print_table(list(_lines(about)))


@click.command()
@model_argument("models", metavar="MODEL...", nargs=-1, required=True)
@as_json
def rm(models: tuple[str, ...], as_json: bool) -> None:
    """Remove models, or one quantization of them (also: remove).

    MODEL is a name as `ls` prints it. `omnivision` removes all that was downloaded and made;
    `omnivision:q8_0` that text model, and the vision file if no other text model needs it.
    """
    from ..hub import megabytes
    from ..store import remove

    removed = []
    for model in models:
        freed = remove(model)
        removed.append({"name": model, "freed": freed})
        if not as_json:
            click.echo(f"Removed {model}: {megabytes(freed)} freed.")
    if as_json:
        click.echo(json.dumps(removed, indent=2))


def _lines(about: Mapping[str, Any]) -> list[tuple[str, ...]]:
    from ..hub import megabytes
    from ..values import DEFAULT_N_CTX

    lines: list[tuple[str, ...]] = []
    for part in ("text", "vision"):
        if part not in about:
            continue
        details = about[part]
        lines += [
            (f"{part} file", details["file"]),
            ("  size", megabytes(details["size"])),
            ("  architecture", details["architecture"]),
            ("  parameters", f"{details['parameters']:,}"),
            ("  quantization", details["quantization"]),
        ]
        if part == "text":
            lines.append(("  context length", f"{details['context_length']} positions"))
        else:
            side = details["image_size"]
            lines += [
                ("  image size", f"{side}x{side} pixels"),
                ("  image tokens", str(details["image_tokens"])),
                ("  prompt variant", details["variant"]),
            ]
    if "memory" in about:
        lines.append(("memory needed", f"{megabytes(about['memory'])} ({DEFAULT_N_CTX} positions)"))
    return lines


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
