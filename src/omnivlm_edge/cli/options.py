"""Options and arguments that several commands share."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ..errors import OptionError
from ..files import check_writable
from ..values import VISION_PRECISIONS

if TYPE_CHECKING:
    from ..values import ModelFiles

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

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


def vision_precision_option() -> Decorator:
    """The option --vision-precision."""
    return setting(
        "--vision-precision",
        type=click.Choice(VISION_PRECISIONS),
        default="auto",
        show_default=True,
        help="How pictures are encoded on a CPU; auto is int8 where the CPU is made for it.",
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
