"""Options and arguments that several commands share."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.shell_completion import CompletionItem

from ..errors import OptionError
from ..files import check_writable
from ..values import MAX_SEED, VISION_PRECISIONS, GenerateOptions

if TYPE_CHECKING:
    from ..values import ModelFiles

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

#: What `OmniVLM` takes besides the model, the context and the cache.
EngineSettings: TypeAlias = "dict[str, Any]"

DEFAULTS = GenerateOptions()
MODEL_NAMES = ("demo", "omnivision", "omnivlm", "omnivision-ocr", "omnivision-preview")


def setting(*names: str, **attributes: Any) -> Decorator:
    """An option that an environment variable can set too: `--ctx-size` is OMNIVLM_CTX_SIZE."""
    long = next(name for name in names if name.startswith("--"))
    variable = "OMNIVLM_" + long.split("/")[0].removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_envvar=True, **attributes)


def parse_size(_: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """An option's number of bytes: 900M, 1.5G, with or without a B; M and G are powers of 10."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg]?)b?", text.strip(), re.I)
    size = float(found[1]) * 1000 ** " kmg".index(found[2].lower() or " ") if found else 0
    if not 1 <= size < 2**63:
        raise click.BadParameter(f"{text} is no size such as 900M or 1.5G", param=parameter)
    return int(size)


mmproj_option = click.option(
    "--mmproj", type=click.Path(path_type=Path), help="Vision file (GGUF), if not beside MODEL."
)
device_option = setting(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, metal, vulkan, …"
)
n_gpu_layers_option = setting(
    "-ngl",
    "--n-gpu-layers",
    type=click.IntRange(min=0),
    help="Layers of the text model on the GPU.  [default: all]",
)
vision_precision_option = setting(
    "--vision-precision",
    type=click.Choice(VISION_PRECISIONS),
    default="auto",
    show_default=True,
    help="How pictures are encoded on a CPU; auto is int8 where the CPU is made for it.",
)
low_memory_option = setting(
    "--low-memory", is_flag=True, help="Expand weights only while they are used: smaller, slower."
)
no_mmproj_offload_option = setting(
    "--no-mmproj-offload", is_flag=True, help="Encode pictures on the CPU."
)
parallel_option = setting(
    "--parallel",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Answers generated at the same time.",
)
readers_option = setting(
    "--readers",
    type=click.IntRange(1, 64),
    help="Threads that read and resize pictures.  [default: all cores, 4 at most]",
)
no_hashes_option = setting(
    "--no-cache", is_flag=True, help="Keep no hashes of the model's files on disk."
)
private_urls_option = setting(
    "--allow-private-urls", is_flag=True, help="Fetch pictures from private addresses too."
)
offline_option = setting("--offline", is_flag=True, help="Download no models.")
yes_option = click.option(
    "-y", "--yes", is_flag=True, help="Make here, once, what is not published."
)


@dataclass(frozen=True)
class _Given:
    """The options of `answer_options`, as they were given."""

    system: str | None
    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    schema: str | None
    grammar: Path | None
    choices: str | None


class Wanted:
    """What the user wants answers to be like."""

    def __init__(self, given: _Given) -> None:
        if sum(bool(option) for option in (given.schema, given.grammar, given.choices)) > 1:
            raise click.UsageError("--schema, --grammar and --choices exclude each other")
        self._given = given
        self.system = given.system
        self.choices = tuple(given.choices.split(",")) if given.choices is not None else ()

    def options(self) -> GenerateOptions:
        """Reads the schema's or the grammar's file. Raises OptionError."""
        given = self._given
        return GenerateOptions(
            max_tokens=given.max_tokens,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            min_p=given.min_p,
            repeat_penalty=given.repeat_penalty,
            seed=given.seed,
            grammar=_read_grammar(given.schema, given.grammar),
        )


def answer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of what answers are like; the command gets them as `wanted`."""

    @functools.wraps(command)
    def bundled(**parameters: Any) -> Any:
        given = {field.name: parameters.pop(field.name) for field in fields(_Given)}
        return command(wanted=Wanted(_Given(**given)), **parameters)

    made: Callable[..., Any] = bundled
    for option in reversed(_ANSWER_OPTIONS):
        made = option(made)
    return made


def engine_options(n_ctx: int | None, n_ctx_help: str) -> Decorator:
    """The options of how a model is run: `ctx_size`, and all others as `settings`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def bundled(**parameters: Any) -> Any:
            settings: EngineSettings = {
                "device": parameters.pop("device"),
                "n_threads": parameters.pop("threads"),
                "n_gpu_layers": parameters.pop("n_gpu_layers"),
                "mmproj_offload": not parameters.pop("no_mmproj_offload"),
                "vision_precision": parameters.pop("vision_precision"),
                "low_memory": parameters.pop("low_memory"),
                "max_ram": parameters.pop("max_ram"),
            }
            return command(settings=settings, **parameters)

        made: Callable[..., Any] = bundled
        for option in reversed(_ENGINE_OPTIONS):
            made = option(made)
        return setting(
            "-c",
            "--ctx-size",
            type=click.IntRange(min=1),
            default=n_ctx,
            show_default=n_ctx is not None,
            help=n_ctx_help,
        )(made)

    return decorate


_ANSWER_OPTIONS = (
    setting("-s", "--system", help="System text, instead of the model's own."),
    setting(
        "-n",
        "--max-tokens",
        type=click.IntRange(min=1),
        help="Longest answer, in tokens.  [default: 512, or what fits]",
    ),
    setting(
        "--temp",
        "--temperature",
        "temperature",
        type=click.FloatRange(min=0),
        default=DEFAULTS.temperature,
        show_default=True,
        help="0 is greedy: the same answer every time.",
    ),
    setting(
        "--top-k",
        type=click.IntRange(min=0),
        default=DEFAULTS.top_k,
        show_default=True,
        help="Sample from the K likeliest tokens; 0: all.",
    ),
    setting(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        default=DEFAULTS.top_p,
        show_default=True,
        help="… from the likeliest that make up P together; 1: all.",
    ),
    setting(
        "--min-p",
        type=click.FloatRange(0, 1, max_open=True),
        default=DEFAULTS.min_p,
        show_default=True,
        help="… from those at least P times as likely as the first.",
    ),
    setting(
        "--repeat-penalty",
        type=click.FloatRange(min=0, min_open=True),
        default=DEFAULTS.repeat_penalty,
        show_default=True,
        help="Above 1: repeat the last 64 tokens less.",
    ),
    setting("--seed", type=click.IntRange(0, MAX_SEED), help="Makes a random answer repeatable."),
    click.option(
        "--schema", metavar="FILE|JSON", help="Answer with JSON that this JSON schema admits."
    ),
    click.option(
        "--grammar",
        type=click.Path(path_type=Path),
        help="Answer with a text that this GBNF grammar admits.",
    ),
    click.option(
        "--choices", metavar="A,B…", help="Answer with the probability of each of these choices."
    ),
)

_ENGINE_OPTIONS = (
    setting(
        "-t", "--threads", type=click.IntRange(1, 512), help="CPU threads.  [default: all cores]"
    ),
    device_option,
    n_gpu_layers_option,
    vision_precision_option,
    low_memory_option,
    setting(
        "--max-ram",
        metavar="SIZE",
        callback=parse_size,
        help="Refuse a model that may need more memory, such as 900M or 1.5G, before it is loaded. "
        "A picture of up to 12 megapixels is counted.",
    ),
    no_mmproj_offload_option,
)


def model_argument(name: str = "model", **attributes: Any) -> Decorator:
    """The argument MODEL, which a shell completes to known names, files and directories."""
    return click.argument(name, shell_complete=_complete_model, **attributes)


def _complete_model(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    # The file entry comes first, because bash's script forgets what came before it. bash goes on to
    # files when no name fits; zsh and fish offer both.
    names = [CompletionItem(name) for name in MODEL_NAMES if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="file"), *names]


def complete_path(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and directories, for what may be something else as well."""
    return [CompletionItem(incomplete, type="file")]


def note(message: str) -> None:
    """Says something that is no answer."""
    click.echo(message, err=True)


def comma_list(each: Any) -> Callable[[click.Context, click.Parameter, Sequence[str]], Any]:
    """A callback for an option that may be repeated: values of click's type `each`, with commas.

    Each value counts once.
    """

    def split(context: click.Context, parameter: click.Parameter, texts: Sequence[str]) -> Any:
        parts = [part.strip() for text in texts for part in text.split(",")]
        return list(dict.fromkeys(each.convert(part, parameter, context) for part in parts))

    return split


def check_plot(path: Path | None) -> None:
    """Raises UsageError for a plot that is no PNG, OptionError for one that cannot be written."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise click.BadParameter(f"{path}: the file's name must end in .png", param_hint="--plot")
    with writing(path):
        check_writable(path)
    from .. import plot  # noqa: F401  (says so where matplotlib is missing)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into an OptionError that names the file."""
    try:
        yield
    except OSError as exc:
        raise OptionError(f"{path}: cannot be written ({exc.strerror})") from exc


def find_source(model: str) -> ModelFiles:
    """The files of a model that is going to be quantized: of a name's, those in F16."""
    from ..hub import parse_reference
    from ..models import find_model

    reference = parse_reference(model)
    if reference is not None and reference.quantization is None:
        model += ":f16"  # what is quantized already cannot be quantized well
    return find_model(model, notify=note)


def consent(yes: bool) -> Callable[[str], bool]:
    """Who answers a question: --yes, or the user where there is a terminal, or else nobody."""

    def ask(question: str) -> bool:
        return yes or (sys.stdin.isatty() and click.confirm(question, err=True))

    return ask


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
