"""`omnivlm-edge compare`: what smaller files of a model cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..values import VISION_PRECISIONS
from .options import (
    check_plot,
    complete_path,
    device_option,
    model_argument,
    note,
    setting,
    writing,
)

if TYPE_CHECKING:
    from ..compare import Loss

_COLUMNS = "model,MB,cosine,worst,error,KL text,top-1,KL whole,top-1,exact".split(",")


@click.command()
@model_argument("reference", metavar="A")
@model_argument("others", metavar="B...", nargs=-1, required=True)
@click.option(
    "--images",
    metavar="FILE|DIR|PATTERN",
    multiple=True,
    shell_complete=complete_path,
    help="Pictures to measure with. May be repeated.  [default: 8 made ones]",
)
@click.option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    help="Question that A answers about each picture. May be repeated.  "
    '[default: "Describe the image"]',
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Tokens of each of A's answers to measure along.",
)
@click.option(
    "--questions",
    type=click.Path(path_type=Path),
    help='Ask these, too: lines of {"image": …, "prompt": …, "answer": …}, the image relative to '
    "the file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw size against error into this PNG file. Needs the extra `plot`.",
)
@setting("-t", "--threads", type=click.IntRange(1, 512), help="CPU threads.  [default: all cores]")
@click.option(
    "--vision-precision",
    type=click.Choice(VISION_PRECISIONS),
    default="ggml",
    show_default=True,
    help="How the builds B encode pictures; A is always computed by ggml, in its own types.",
)
@device_option
def compare(
    reference: str,
    others: tuple[str, ...],
    images: tuple[str, ...],
    prompts: tuple[str, ...],
    max_tokens: int,
    questions: Path | None,
    as_json: bool,
    plot: Path | None,
    threads: int | None,
    vision_precision: str,
    device: str,
) -> None:
    """Measure what builds B of a model lose against its build A.

    A and B are what `run` takes as MODEL, or single files: a text model or a vision file. The other
    half of B is then A's; that of A is looked for beside it.

    \b
    cosine, worst  of the image embeddings: the mean, and of the worst picture
    error          their relative error ||b - a|| / ||a||, the mean
    KL, top-1      of the next-token distributions along A's greedy answers:
                   KL(A || B) in nats a token, and how often both find the same
                   token the likeliest; `text` with A's image embeddings,
                   `whole` with B's own
    exact          questions answered word by word (see --questions)
    """
    check_plot(plot)

    from ..compare import DEFAULT_PROMPTS, compare_models, read_questions
    from ..sources import find_pictures

    # Before the models: what is wrong fails at once.
    exam = read_questions(questions) if questions is not None else []
    pictures = [path for text in images for path in find_pictures(text)]
    prompts = prompts or DEFAULT_PROMPTS
    losses = compare_models(
        reference,
        others,
        pictures or None,
        prompts=prompts,
        max_tokens=max_tokens,
        questions=exam,
        device=device,
        n_threads=threads,
        vision_precision=vision_precision,
        notify=note,
    )
    if as_json:
        reference_loss, *others_losses = map(asdict, losses)
        result = {
            "reference": reference_loss,
            "builds": others_losses,
            "pictures": pictures or "made",
            "prompts": list(prompts),
            "max_tokens": max_tokens,
            "questions": len(exam),
        }
        text = json.dumps(result, indent=2, ensure_ascii=False)
        click.echo(text.encode(errors="backslashreplace").decode())  # names may be no text
    else:
        print_losses(losses, len(pictures), prompts, len(exam))
    if plot is not None:
        from ..plot import plot_losses

        with writing(plot):
            plot_losses(losses[1:], plot)


def print_losses(
    losses: Sequence[Loss], n_pictures: int, prompts: Sequence[str], asked: int = 0
) -> None:
    """The table and what it was measured with; `n_pictures` is 0 where they were made."""
    _print_table(losses)
    click.echo(_conditions(losses, n_pictures, prompts, asked))


def _print_table(losses: Sequence[Loss]) -> None:
    rows = [_COLUMNS, *map(_row, losses)]
    used = [i for i in range(len(_COLUMNS)) if any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in used]
    for row in rows:
        name, *cells = (row[i] for i in used)
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        click.echo("  ".join([f"{name:<{widths[0]}}", *numbers]).rstrip())


def _row(loss: Loss) -> list[str]:
    row = [loss.name, f"{(loss.text_bytes + loss.vision_bytes) / 1e6:,.1f}"]
    vision = loss.vision
    if vision is None:
        row += [""] * 3
    else:
        row += [f"{vision.cosine:.6f}", f"{vision.worst_cosine:.6f}", f"{vision.error:.4f}"]
    for text in (loss.text, loss.whole):
        row += ["", ""] if text is None else [f"{text.kl:.5f}", f"{text.top1:.1%}"]
    return [*row, "" if loss.exact is None else f"{loss.exact:.1%}"]


def _conditions(losses: Sequence[Loss], n_pictures: int, prompts: Sequence[str], asked: int) -> str:
    """What the table was measured with, as one sentence."""
    made = "8 made pictures (coloured noise with shapes)"
    parts = [_counted(n_pictures, "picture") if n_pictures else made]
    if whole := losses[1].whole:
        quoted = ", ".join(f'"{prompt}"' for prompt in prompts)
        parts.append(f"{whole.positions} next tokens along A's answers to {quoted}")
    if asked:
        parts.append(_counted(asked, "question"))
    return f"Over {'; '.join(parts)}."


def _counted(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"
