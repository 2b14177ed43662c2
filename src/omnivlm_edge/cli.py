"""The command line: arguments -> engine -> stdout (answers alone) and stderr (all the rest).

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from .errors import OmniVLMError
from .values import MAX_SEED, GenerateOptions, ImageEmbedding

if TYPE_CHECKING:
    from PIL import Image

    from .engine import OmniVLM

# The engine is imported inside the commands: it loads llama.cpp, which --help does not need.

DEFAULTS = GenerateOptions()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="omnivlm-edge")
def cli() -> None:
    """Ask small vision-language models about pictures, on your own machine."""


@cli.command()
@click.argument("model")
@click.option(
    "--mmproj", type=click.Path(path_type=Path), help="Vision file (GGUF), if not beside MODEL."
)
@click.option("-i", "--image", type=click.Path(path_type=Path), help="Picture to ask about.")
@click.option("-p", "--prompt", help="Question; without it a prompt loop starts.")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=DEFAULTS.max_tokens,
    show_default=True,
    help="Longest answer, in tokens.",
)
@click.option(
    "--temp",
    "--temperature",
    "temperature",
    type=click.FloatRange(min=0),
    default=DEFAULTS.temperature,
    show_default=True,
    help="0 is greedy: the same answer every time.",
)
@click.option("--seed", type=click.IntRange(0, MAX_SEED), help="Makes a random answer repeatable.")
@click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Positions for prompt, picture and answer.",
)
@click.option("-t", "--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, metal, vulkan, …"
)
def run(
    model: str,
    mmproj: Path | None,
    image: Path | None,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    ctx_size: int,
    threads: int | None,
    device: str,
) -> None:
    """Ask MODEL about a picture.

    MODEL is `demo`, a directory that holds a text model and its mmproj, or the text model's GGUF
    file. With no prompt a loop starts: a line that is the path of a picture loads it, any other
    line asks about it; /bye or Ctrl-D leaves.
    """
    from .engine import OmniVLM
    from .image import load_image

    if prompt is not None and image is None:
        raise click.UsageError("a prompt needs a picture: add -i IMAGE")
    options = GenerateOptions(max_tokens=max_tokens, temperature=temperature, seed=seed)
    picture = load_image(image) if image is not None else None  # a bad path fails before the load
    with OmniVLM(model, mmproj, device=device, n_ctx=ctx_size, n_threads=threads) as engine:
        if prompt is not None and picture is not None:
            _print_answer(engine, picture, prompt, options)
        else:
            _loop(engine, engine.encode(picture) if picture is not None else None, options)


@cli.command()
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
    from .convert import convert_checkpoint, convert_mmproj

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


def main() -> NoReturn:
    """Entry point of `omnivlm-edge`: maps every outcome to an exit code."""
    try:
        cli.main(prog_name="omnivlm-edge", standalone_mode=False)
    except click.exceptions.Exit as exc:
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        sys.exit(130)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except OmniVLMError as exc:
        click.echo(f"Error: {exc}", err=True)
        sys.exit(1)
    except OSError as exc:
        if not isinstance(exc, BrokenPipeError):  # a reader that has enough is no error to tell
            click.echo(f"Error: the answer cannot be written ({exc.strerror})", err=True)
        # Python would try once more to write what is left when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _print_answer(
    engine: OmniVLM, picture: Image.Image | ImageEmbedding, prompt: str, options: GenerateOptions
) -> None:
    for piece in engine.generate(picture, prompt, options):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()


def _loop(engine: OmniVLM, embedding: ImageEmbedding | None, options: GenerateOptions) -> None:
    """The original's prompt loop: picture paths and questions, until /bye or the end of input."""
    click.echo("Give the path of a picture, then ask about it. /bye or Ctrl-D leaves.", err=True)
    for line in _lines():
        if line in ("/bye", "/exit", "/quit"):
            return
        try:
            path = _as_picture_path(line)
            if path is not None:
                embedding = engine.encode(path)
            elif embedding is None:
                click.echo("First give the path of a picture.", err=True)
            else:
                _print_answer(engine, embedding, line, options)
        except OmniVLMError as exc:
            click.echo(f"Error: {exc}", err=True)


def _lines() -> Iterator[str]:
    """Non-empty lines from stdin, with a prompt on a terminal; stdout stays clean elsewhere."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            line = input(">>> " if interactive else "").strip()
        except EOFError:
            if interactive:
                click.echo(err=True)
            return
        if line:
            yield line


def _as_picture_path(line: str) -> Path | None:
    """The path that a line names, quoted or not; None when it is a question."""
    text = line.strip("'\"").replace("\\ ", " ")
    try:
        path = Path(text).expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError, ValueError):  # too long for a path, no such user, a null byte
        return None
    from PIL import Image

    looks_like_picture = path.suffix.lower() in Image.registered_extensions() and " " not in text
    return path if looks_like_picture else None
