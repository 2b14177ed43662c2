"""Draw the newest run of bench/side_by_side.py: python bench/plots.py [OUT_DIR]

    side_by_side_stages.png    what a picture and a first token take, by stage
    side_by_side_memory.png    the most memory that was resident
    side_by_side_threads.png   encode seconds against threads, of a run with several
    batch.png                  what a picture costs, of the newest run of bench/batch.py
    side_by_side_batch.png     encode seconds of a picture against pictures in a call, likewise

Times are minima. Needs the extra `plot`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import RESULTS, batch_records, side_by_side_run, with_most_threads

Record = dict[str, Any]
STAGES = ("preprocess", "encode", "prefill")


@click.command()
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path), default=RESULTS)
def main(out_dir: Path) -> None:
    """Write the pictures into OUT_DIR; bench/results when it is left out."""
    out_dir.mkdir(parents=True, exist_ok=True)
    records = side_by_side_run()
    plots: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
        "stages": plot_stages,
        "memory": plot_memory,
        "threads": plot_threads,
        "batch": plot_batch,
    }
    for name, plot in plots.items():
        figure = plot(records)
        path = out_dir / f"side_by_side_{name}.png"
        if figure is None:
            click.echo(f"{path.name}: left out, the newest run did not vary that")
            continue
        figure.savefig(path)
        click.echo(path)
    if (RESULTS / "batch.jsonl").exists():
        plot_many(batch_records()).savefig(out_dir / "batch.png")
        click.echo(out_dir / "batch.png")


def plot_many(records: Sequence[Record]) -> Figure:
    """On the left against the number of sequences, on the right against that of pictures."""
    figure, panels = _panels()
    for axes, kind, x, label in (
        (panels[0], "batch", "n_parallel", "answers at a time (full size, 4 bits)"),
        (panels[1], "demo", "pictures", "pictures (demo model)"),
    ):
        found = sorted((r[x], 1 / r["pictures_per_second"]) for r in records if r["kind"] == kind)
        if found:
            axes.plot(*zip(*found, strict=True), "o-")
            axes.set_xscale("log")
            axes.set_xticks([x for x, _ in found], [f"{x:,}" for x, _ in found], minor=False)
            axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set(xlabel=label, ylabel="seconds for a picture")
        axes.grid(color="0.9")
    return figure


def plot_stages(records: Sequence[Record]) -> Figure:
    """The vision paths on the left; on the right the answers, up to their first token."""
    figure, (left, right) = _panels()
    encoders, answerers = _by_kind(records)
    left.barh(_names(encoders), [_least(record, "encode") for record in encoders])
    starts = [0.0] * len(answerers)
    for stage in STAGES:
        widths = [_least(record, stage) for record in answerers]
        right.barh(_names(answerers), widths, left=starts, label=stage)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    figure.legend(loc="outside lower right", ncols=len(STAGES), fontsize=8)
    _label(left, "seconds to encode a picture")
    _label(right, "seconds to the first token")
    return figure


def plot_memory(records: Sequence[Record]) -> Figure:
    """The vision paths on the left, the whole programs on the right."""
    figure, axes = _panels()
    for panel, group, what in zip(
        axes, _by_kind(records), ("the vision path", "the whole program"), strict=True
    ):
        panel.barh(_names(group), [record["peak_rss_mb"] for record in group])
        _label(panel, f"peak memory of {what} (MB)")
    return figure


def plot_threads(records: Sequence[Record]) -> Figure | None:
    """One line a vision path."""
    encoders = [r for r in records if r["kind"] == "encode" and r["status"] == "ok"]
    if len({record["threads"] for record in encoders}) < 2:
        return None
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in encoders:
        point = record["threads"], _least(record, "encode")
        lines.setdefault(record["contender"], []).append(point)
    return _lines(lines, "threads", "seconds to encode a picture")


def plot_batch(records: Sequence[Record]) -> Figure | None:
    """One line a vision path that was given several pictures at a time."""
    lines = {
        record["contender"]: [
            (count, _least(record, name) / count) for count, name in _batches(record)
        ]
        for record in with_most_threads(records)
        if _batches(record)
    }
    return _lines(lines, "pictures in a call", "seconds for a picture") if lines else None


def _batches(record: Record) -> list[tuple[int, str]]:
    """Numbers of pictures, and what their seconds are called."""
    names = [name for name in record["seconds"] if name.startswith("batch ")]
    return [(int(name.removeprefix("batch ")), name) for name in names]


def _lines(lines: dict[str, list[tuple[int, float]]], x_label: str, y_label: str) -> Figure:
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
    axes.set_ylim(bottom=0)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(color="0.9")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _panels() -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(10, 3.5), dpi=150, layout="constrained")
    return figure, figure.subplots(1, 2)


def _label(axes: Axes, text: str) -> None:
    axes.set_xlabel(text)
    axes.invert_yaxis()
    axes.grid(color="0.9", axis="x")
    axes.set_axisbelow(True)


def _by_kind(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The vision paths and the whole programs of those that ran."""
    ran = [record for record in with_most_threads(records) if record["status"] == "ok"]
    encoders = [record for record in ran if record["kind"] == "encode"]
    return encoders, [record for record in ran if record["kind"] == "answer"]


def _names(records: Sequence[Record]) -> list[str]:
    return [record["contender"] for record in records]


def _least(record: Record, stage: str) -> float:
    seconds: float = record["seconds"][stage]["min"]
    return seconds


if __name__ == "__main__":
    main()
