"""`omnivlm-edge run`: one question, or a chat."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import OptionError
from ..values import DEFAULT_N_CTX, MAX_SEED, GenerateOptions
from .options import (
    complete_path,
    consent,
    model_argument,
    note,
    parse_size,
    setting,
    vision_precision_option,
)
from .output import Output, describe

DEFAULTS = GenerateOptions()


@click.command()
@model_argument()
@click.option(
    "--mmproj", type=click.Path(path_type=Path), help="Vision file (GGUF), if not beside MODEL."
)
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
@setting("-s", "--system", help="System text, instead of the model's own.")
@setting(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Longest answer, in tokens.  [default: 512, or what fits]",
)
@setting(
    "--temp",
    "--temperature",
    "temperature",
    type=click.FloatRange(min=0),
    default=DEFAULTS.temperature,
    show_default=True,
    help="0 is greedy: the same answer every time.",
)
@setting(
    "--top-k",
    type=click.IntRange(min=0),
    default=DEFAULTS.top_k,
    show_default=True,
    help="Sample from the K likeliest tokens; 0: all.",
)
@setting(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=DEFAULTS.top_p,
    show_default=True,
    help="… from the likeliest that make up P together; 1: all.",
)
@setting(
    "--min-p",
    type=click.FloatRange(0, 1, max_open=True),
    default=DEFAULTS.min_p,
    show_default=True,
    help="… from those at least P times as likely as the first.",
)
@setting(
    "--repeat-penalty",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULTS.repeat_penalty,
    show_default=True,
    help="Above 1: repeat the last 64 tokens less.",
)
@setting("--seed", type=click.IntRange(0, MAX_SEED), help="Makes a random answer repeatable.")
@click.option(
    "--schema", metavar="FILE|JSON", help="Answer with JSON that this JSON schema admits."
)
@click.option(
    "--grammar",
    type=click.Path(path_type=Path),
    help="Answer with a text that this GBNF grammar admits.",
)
@click.option(
    "--choices", metavar="A,B…", help="Answer with the probability of each of these choices."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each answer.")
@click.option("--stats", is_flag=True, help="Say on stderr what an answer took.")
@click.option("--show-image", is_flag=True, help="Say on stderr what the model sees of a picture.")
@setting(
    "-c",
    "--ctx-size",
    type=click.IntRange(min=1),
    default=DEFAULT_N_CTX,
    show_default=True,
    help="Positions for prompt, pictures and answer.",
)
@setting("-t", "--threads", type=click.IntRange(1, 512), help="CPU threads.  [default: all cores]")
@setting("--device", default="auto", show_default=True, help="auto, cpu, cuda, metal, vulkan, …")
@setting(
    "-ngl",
    "--n-gpu-layers",
    type=click.IntRange(min=0),
    help="Layers of the text model on the GPU.  [default: all]",
)
@vision_precision_option()
@setting(
    "--low-memory", is_flag=True, help="Expand weights only while they are used: smaller, slower."
)
@setting(
    "--max-ram",
    metavar="SIZE",
    callback=parse_size,
    help="Refuse a model that may need more memory, such as 900M or 1.5G, before it is loaded. A "
    "picture of up to 12 megapixels is counted.",
)
@setting("--no-mmproj-offload", is_flag=True, help="Encode pictures on the CPU.")
@setting("--no-cache", is_flag=True, help="Keep no pictures, prompts, hashes and lines on disk.")
@setting("--allow-private-urls", is_flag=True, help="Fetch pictures from private addresses too.")
@setting("--offline", is_flag=True, help="Download no models.")
@click.option("-y", "--yes", is_flag=True, help="Make here, once, what is not published.")
def run(
    model: str,
    mmproj: Path | None,
    images: tuple[str, ...],
    prompt: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float,
    seed: int | None,
    schema: str | None,
    grammar: Path | None,
    choices: str | None,
    as_json: bool,
    stats: bool,
    show_image: bool,
    ctx_size: int,
    threads: int | None,
    device: str,
    n_gpu_layers: int | None,
    vision_precision: str,
    low_memory: bool,
    max_ram: int | None,
    no_mmproj_offload: bool,
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
    if sum(option is not None for option in (schema, grammar, choices)) > 1:
        raise click.UsageError("--schema, --grammar and --choices exclude each other")
    if choices is not None and prompt is None:
        raise click.UsageError("--choices answers one question: add -p PROMPT")

    from ..sources import read_sources

    # Before the model: what is wrong fails at once.
    options = GenerateOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
        grammar=_read_grammar(schema, grammar),
    )
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
        device=device,
        n_ctx=ctx_size,
        n_threads=threads,
        n_gpu_layers=n_gpu_layers,
        mmproj_offload=not no_mmproj_offload,
        vision_precision=vision_precision,
        low_memory=low_memory,
        max_ram=max_ram,
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
        if choices is not None and prompt is not None:
            embeddings = [engine.encode(picture) for picture in pictures]
            chances = engine.choose(embeddings, prompt, choices.split(","), system=system)
            output.choices(engine, chances, embeddings)
        elif prompt is not None:
            output.answer(
                engine, engine.generate(pictures, prompt, options, system=system), options
            )
        else:
            from .chat import ChatLoop

            loop = ChatLoop(
                engine,
                output,
                options,
                system,
                allow_private=allow_private_urls,
                keep_history=not no_cache,
            )
            loop.run(pictures)


def _read_grammar(schema: str | None, grammar: Path | None) -> str | None:
    """The grammar that the options ask for, if they do."""
    if grammar is not None:
        return _read_text(grammar)
    if schema is None:
        return None
    from ..grammar import json_schema_grammar

    is_json = schema.lstrip().startswith("{")
    return json_schema_grammar(schema if is_json else _read_text(Path(schema)))


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as exc:
        raise OptionError(f"{path}: cannot be read ({getattr(exc, 'strerror', exc)})") from exc
