"""Answers on stdout, as text or as JSON; what there is to say about them on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError
from ..memory import peak_rss
from ..report import milliseconds, usage
from ..values import Answer, GenerateOptions, ImageEmbedding

if TYPE_CHECKING:
    from ..engine import OmniVLM
    from ..image import Picture


@dataclass(frozen=True)
class Output:
    """How answers are reported: the choices of `run`'s user."""

    model: str  # as the user named it
    as_json: bool = False
    stats: bool = False

    def answer(
        self,
        engine: OmniVLM,
        stream: Generator[str, None, Answer],
        options: GenerateOptions,
    ) -> None:
        """Prints an answer while it is generated, or as one JSON object once it is finished."""
        while True:
            try:
                piece = next(stream)
            except StopIteration as finished:
                answer: Answer = finished.value
                break
            if not self.as_json:
                click.echo(piece, nl=False)
                sys.stdout.flush()
        if self.as_json:
            self._print_json(
                engine,
                answer.images,
                answer=answer.text,
                finish_reason=answer.finish_reason,
                usage=usage(answer),
                timings=milliseconds(answer.timings, answer.completion_tokens),
            )
        else:
            click.echo()
        if self.stats:
            click.echo(_stats(answer), err=True)
        if answer.finish_reason == "length":
            if options.grammar is not None:
                raise OptionError(
                    f"the answer was cut off after {answer.completion_tokens} tokens, before it "
                    "was complete: raise -n"
                )
            click.echo(f"(cut off after {answer.completion_tokens} tokens: see -n)", err=True)

    def doubts(self, engine: OmniVLM, pictures: Sequence[Picture]) -> None:
        """Says which pictures the demo had better not be asked about."""
        if self.model != "demo":
            return
        from ..photographs import out_of_depth

        for picture in pictures:
            if out_of_depth(engine, picture):
                text = f"({picture.name}: looks like a photograph; the demo knows drawings alone, "
                click.echo(text + "and guesses)", err=True)

    def choices(
        self, engine: OmniVLM, chances: dict[str, float], images: Sequence[ImageEmbedding]
    ) -> None:
        """Prints the probability of each choice, the likeliest first."""
        if self.as_json:
            rounded = {choice: round(chance, 6) for choice, chance in chances.items()}
            self._print_json(engine, images, answer=next(iter(chances)), choices=rounded)
            return
        for choice, chance in chances.items():
            click.echo(f"{choice}\t{chance:.4f}")

    def _print_json(self, engine: OmniVLM, images: Sequence[ImageEmbedding], **fields: Any) -> None:
        hashes = engine.file_hashes()
        report = {
            **fields,
            "images": [
                {"name": image.name, "tokens": len(image.data), "cached": image.cached or None}
                for image in images
            ],
            "model": {"name": self.model, **_file(engine.files.text, hashes)},
            "mmproj": _file(engine.files.mmproj, hashes),
            "device": engine.device,
            "vision_device": engine.vision_device,
            "peak_rss_mb": round(peak_rss() / 1e6, 1),
        }
        text = json.dumps(report, ensure_ascii=False)
        click.echo(text.encode(errors="backslashreplace").decode())  # names may be no text


def describe(engine: OmniVLM, picture: Picture) -> str:
    """One line about a picture and what the model sees of it."""
    width, height = picture.original_size
    turned = "turned upright (EXIF), " if picture.turned else ""
    return (
        f"{picture.name}: {picture.format or 'picture'}, {width} x {height} pixels, {turned}"
        f"seen as {engine.image_size} x {engine.image_size} in {engine.image_tokens} tokens"
    )


def _file(path: Path, hashes: dict[Path, str | None]) -> dict[str, str | None]:
    return {"file": path.name, "sha256": hashes[path]}


def _stats(answer: Answer) -> str:
    timings = answer.timings
    rate = answer.completion_tokens / timings.decode if timings.decode else 0.0
    return (
        f"load {timings.load:.2f} s, encode {timings.encode:.2f} s, "
        f"first token {timings.first_token:.2f} s, {rate:.1f} tokens/s; "
        f"{answer.prompt_tokens} tokens in ({answer.cached_tokens} cached), "
        f"{answer.completion_tokens} out; peak {peak_rss() / 1e6:.0f} MB"
    )
