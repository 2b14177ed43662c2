"""`omnivlm-edge run`: one question, or a chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import OmniVLMError
from ..values import MAX_SEED, GenerateOptions, ImageEmbedding
from .options import model_argument

if TYPE_CHECKING:
    from PIL import Image

    from ..engine import OmniVLM

DEFAULTS = GenerateOptions()


@click.command()
@model_argument()
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
    from ..engine import OmniVLM
    from ..image import load_image

    if prompt is not None and image is None:
        raise click.UsageError("a prompt needs a picture: add -i IMAGE")
    options = GenerateOptions(max_tokens=max_tokens, temperature=temperature, seed=seed)
    picture = load_image(image) if image is not None else None  # a bad path fails before the load
    with OmniVLM(model, mmproj, device=device, n_ctx=ctx_size, n_threads=threads) as engine:
        if prompt is not None and picture is not None:
            _print_answer(engine, picture, prompt, options)
        else:
            _loop(engine, engine.encode(picture) if picture is not None else None, options)


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
