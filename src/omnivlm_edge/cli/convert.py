"""`omnivlm-edge convert`: a checkpoint or a published mmproj -> GGUF files in our layout."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Directory for the GGUF files.",
)
@click.option(
    "--outtype",
    type=click.Choice(["f16", "bf16", "f32"]),
    help="Type of the weights.  [default: f16]",
)
@click.option("--name", help="Name of the model.  [default: that of the checkpoint's directory]")
@click.option("--variant", help="Prompt variant to record, if not the usual one.")
def convert(
    source: Path, out: Path, outtype: str | None, name: str | None, variant: str | None
) -> None:
    """Convert a model to GGUF.

    SOURCE is a Hugging Face checkpoint directory in OmniVision's layout (config.json, safetensors,
    tokenizer), which becomes two GGUF files, or a published mmproj GGUF of the `siglip` layout,
    which becomes one of ours with its weights unchanged.
    """
    from ..convert import convert_checkpoint, convert_mmproj

    if source.is_file():
        if outtype is not None or name is not None:
            raise click.UsageError(
                "--outtype and --name are for checkpoints; a GGUF file keeps its types and name"
            )
        written = [convert_mmproj(source, out, variant=variant)]
    else:
        files = convert_checkpoint(source, out, outtype or "f16", name=name, variant=variant)
        written = [files.text, files.mmproj]
    for path in written:
        click.echo(path)
