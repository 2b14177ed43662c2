"""`omnivlm-edge run`: one question, or a chat."""

from __future__ import annotations

from pathlib import Path

import click

from ..values import DEFAULT_N_CTX
from .options import (
    EngineSettings,
    Wanted,
    answer_options,
    complete_path,
    consent,
    engine_options,
    mmproj_option,
    model_argument,
    note,
    offline_option,
    private_urls_option,
    setting,
    yes_option,
)
from .output import Output, describe


@click.command()
@model_argument()
@mmproj_option
@click.option(
    "-i",
    "--image",
    "images",
    metavar="IMAGE",
    multiple=True,
    shell_complete=complete_path,
    help="Picture to ask about: a path, a pattern, an http(s) address, a data: URI, - for standard "
    "input, or clipboard:. May be repeated.",
)
@click.option("-p", "--prompt", help="Question; without it a chat starts.")
@answer_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each answer.")
@click.option("--stats", is_flag=True, help="Say on stderr what an answer took.")
@click.option("--show-image", is_flag=True, help="Say on stderr what the model sees of a picture.")
@engine_options(DEFAULT_N_CTX, "Positions for prompt, pictures and answer.")
@setting("--no-cache", is_flag=True, help="Keep no pictures, prompts, hashes and lines on disk.")
@private_urls_option
@offline_option
@yes_option
def run(
    model: str,
    mmproj: Path | None,
    images: tuple[str, ...],
    prompt: str | None,
    wanted: Wanted,
    as_json: bool,
    stats: bool,
    show_image: bool,
    ctx_size: int,
    settings: EngineSettings,
    no_cache: bool,
    allow_private_urls: bool,
    offline: bool,
    yes: bool,
) -> None:
    """Ask MODEL about pictures.

    MODEL is `demo`; a published model (omnivision, omnivision-ocr, omnivision-preview or
    hf:USER/REPO, with a quantization if you like: omnivision:q8_0), downloaded once; a directory
    that holds a text model and its mmproj; or the text model's GGUF file.

    With -p, one question is answered: its pictures come first, in the order given. Without, a chat
    starts; /help lists its commands.
    """
    if prompt is not None and not images:
        raise click.UsageError("a prompt needs a picture: add -i IMAGE")
    if images.count("-") > 1 or ("-" in images and prompt is None):
        raise click.UsageError("-i - can be given once, with -p: it takes all of standard input")
    if wanted.choices and prompt is None:
        raise click.UsageError("--choices answers one question: add -p PROMPT")

    from ..sources import read_sources

    # Before the model: what is wrong fails at once.
    options = wanted.options()
    pictures = [
        picture
        for image in images
        for picture in read_sources(image, allow_private=allow_private_urls)
    ]

    from ..engine import OmniVLM
    from ..image import shrink
    from ..model_file import inspect_file
    from ..models import find_model

    files = find_model(
        model, mmproj, offline=offline, consent=consent(yes), make_vision=yes, notify=note
    )
    # What the model will not see takes no memory beside it.
    size = inspect_file(files.mmproj).number("image_size")
    pictures = [shrink(picture, size) for picture in pictures]
    with OmniVLM(
        files.text,
        files.mmproj,
        variant=files.variant,
        n_ctx=ctx_size,
        **settings,
        disk_cache=not no_cache,
    ) as engine:
        if (
            engine.n_ctx < ctx_size
            and click.get_current_context().get_parameter_source("ctx_size")
            != click.core.ParameterSource.DEFAULT
        ):
            note(f"(-c {ctx_size}: the model was trained for {engine.n_ctx} positions only)")
        output = Output(model, as_json, stats)
        if show_image:
            for picture in pictures:
                click.echo(describe(engine, picture), err=True)
        if wanted.choices and prompt is not None:
            embeddings = [engine.encode(picture) for picture in pictures]
            chances = engine.choose(embeddings, prompt, wanted.choices, system=wanted.system)
            output.choices(engine, chances, embeddings)
            output.doubts(engine, pictures)
        elif prompt is not None:
            output.answer(
                engine, engine.generate(pictures, prompt, options, system=wanted.system), options
            )
            output.doubts(engine, pictures)
        else:
            from .chat import ChatLoop

            loop = ChatLoop(
                engine,
                output,
                options,
                wanted.system,
                allow_private=allow_private_urls,
                keep_history=not no_cache,
            )
            loop.run(pictures)
