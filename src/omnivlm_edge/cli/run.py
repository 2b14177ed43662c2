"""`omnivlm-edge run`: one question, or a chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import OmniVLMError, OptionError
from ..values import MAX_SEED, GenerateOptions, ImageEmbedding

if TYPE_CHECKING:
    from ..engine import OmniVLM
    from ..image import Picture

DEFAULTS = GenerateOptions()


@click.command()
@click.argument("model")
@click.option(
    "--mmproj", type=click.Path(path_type=Path), help="Vision file (GGUF), if not beside MODEL."
)
@click.option(
    "-i",
    "--image",
    "images",
    metavar="IMAGE",
    multiple=True,
    help="Picture to ask about: a path, a pattern, an http(s) address, a data: URI, - for standard "
    "input, or clipboard:. May be repeated.",
)
@click.option(
    "--allow-private-urls", is_flag=True, help="Fetch pictures from private addresses as well."
)
@click.option("--show-image", is_flag=True, help="Say on stderr what the model sees of a picture.")
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
    images: tuple[str, ...],
    allow_private_urls: bool,
    show_image: bool,
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
    from ..sources import read_sources

    if prompt is not None and not images:
        raise click.UsageError("a prompt needs a picture: add -i IMAGE")
    if images.count("-") > 1 or ("-" in images and prompt is None):
        raise click.UsageError("-i - can be given once, with -p: it takes all of standard input")
    options = GenerateOptions(max_tokens=max_tokens, temperature=temperature, seed=seed)
    # Before the model: a bad picture fails at once.
    pictures = [
        picture
        for image in images
        for picture in read_sources(image, allow_private=allow_private_urls)
    ]
    if len(pictures) > 1:
        raise OptionError(f"{len(pictures)} pictures are given: a question can have only one")
    with OmniVLM(model, mmproj, device=device, n_ctx=ctx_size, n_threads=threads) as engine:
        if show_image:
            for picture in pictures:
                _show(engine, picture)
        if prompt is not None:
            _print_answer(engine, pictures, prompt, options)
        else:
            _loop(engine, engine.encode(pictures[0]) if pictures else None, options)


def _show(engine: OmniVLM, picture: Picture) -> None:
    """One line about a picture and what the model sees of it."""
    width, height = picture.original_size
    turned = "turned upright (EXIF), " if picture.turned else ""
    click.echo(
        f"{picture.name}: {picture.format}, {width} x {height} pixels, {turned}"
        f"seen as {engine.image_size} x {engine.image_size} in {engine.image_tokens} tokens",
        err=True,
    )


def _print_answer(
    engine: OmniVLM,
    pictures: Sequence[Picture | ImageEmbedding],
    prompt: str,
    options: GenerateOptions,
) -> None:
    for piece in engine.generate(pictures[0], prompt, options):
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
                _print_answer(engine, [embedding], line, options)
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
