"""Measurements as pictures: losses of builds, times of stages. Needs the extra `plot`.

Raises OptionError where matplotlib is not installed, when it is imported.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bench import STAGES, Record, describe_case, find_partner, peak_memory
from .compare import Loss
from .errors import OptionError
from .files import write_whole

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox
except ImportError as exc:
    raise OptionError(
        'a plot needs matplotlib, which is not installed: pip install "omnivlm-edge[plot]"'
    ) from exc

_Point = tuple[str, float, float]  # label, MB, error

_LEAST_SPAN = 0.1  # of the sizes, as a share of them

# Where a label may stand, seen from its point, in points of 1/72 inch; the first that is free.
_PLACES = [(dx, dy) for dy in (4, -10, 15, -21, 26, -32) for dx in (5, -5)]


def plot_losses(losses: Sequence[Loss], path: Path) -> None:
    """Writes a PNG file of 1200 x 525 pixels: the vision files on the left, the whole on the right.

    Builds that lose nothing in a panel are left out of it, because its axis is logarithmic. Raises
    OSError.
    """
    figure = Figure(figsize=(8, 3.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    vision = [
        (loss.name, loss.vision_bytes / 1e6, 1 - loss.vision.cosine)
        for loss in losses
        if loss.vision
    ]
    whole = [
        (loss.name, (loss.text_bytes + loss.vision_bytes) / 1e6, loss.whole.kl)
        for loss in losses
        if loss.whole
    ]
    vision_labels = _draw(left, vision, "vision file (MB)", "1 − cosine of the image embeddings")
    whole_labels = _draw(right, whole, "both files (MB)", "KL divergence (nats per token)")
    figure.draw_without_rendering()  # settles where the points are
    _place(left, vision_labels)
    _place(right, whole_labels)
    _save(figure, path)


def plot_stages(records: Sequence[Record], path: Path, before: Sequence[Record] = ()) -> None:
    """Writes a PNG file, 1200 pixels wide: bars of the stages' medians, and of peak memory.

    A case that has a partner in `before` (see `bench.find_partner`) has its bars below the
    partner's, in the same colour. Cases that measured nothing are left out. Raises OSError.
    """
    shown = []  # record, colour, whether it is an earlier one
    for i, record in enumerate(record for record in records if record["stages"]):
        earlier = find_partner(record, before)
        shown += [] if earlier is None else [(earlier, f"C{i}", True)]
        shown.append((record, f"C{i}", False))
    height = 0.8 / len(shown)
    inches = 1.5 + len(STAGES) * max(0.3, 0.11 * len(shown))
    figure = Figure(figsize=(8, inches), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for i, (record, colour, is_earlier) in enumerate(shown):
        style: dict[str, Any] = {"facecolor": colour}
        if is_earlier:
            style |= {"alpha": 0.5, "hatch": "////", "edgecolor": "white"}
        rows = {row["test"]: row for row in record["stages"]}
        present = [stage for stage in STAGES if stage in rows]
        medians = [rows[stage]["median_ns"] / 1e6 for stage in present]
        places = [STAGES.index(stage) + (i + 0.5) * height - 0.4 for stage in present]
        name = ("before: " if is_earlier else "") + describe_case(record)
        left.barh(places, medians, height, label=name, **style)
        for stage, median, place in zip(present, medians, places, strict=True):
            samples = rows[stage].get("samples_ns") or [rows[stage]["median_ns"]]
            least, most = min(samples) / 1e6, max(samples) / 1e6
            left.plot([least, most], [place, place], "|-", color="0.2", lw=0.8, markersize=3)
            text = (max(median, most), place), (3, 0)
            left.annotate(
                f"{median:.4g}", *text, textcoords="offset points", va="center", fontsize=6
            )
        memory = right.barh(i, (peak_memory(record) or 0) / 1e6, 0.8, **style)
        right.bar_label(memory, fmt="%.0f", fontsize=6, padding=2)
    left.set_yticks(range(len(STAGES)), [stage.replace("_", " ") for stage in STAGES])
    left.set_xlabel("ms (median; whiskers: least and most)")
    right.set_xlabel("peak memory (MB)")
    right.set_yticks([])
    for axes in (left, right):
        axes.margins(x=0.15)
        axes.set_xlim(left=0)
        axes.invert_yaxis()
        axes.grid(color="0.9", axis="x")
        axes.set_axisbelow(True)
    last = shown[-1][0]
    title = f"{last['model_filename']}, {last['mmproj_filename']} on {last['cpu_info']}"
    figure.suptitle(title + (f", {last['gpu_info']}" if last["gpu_info"] else ""), fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_whole(path, content.getvalue())


def _draw(axes: Axes, points: Sequence[_Point], x_label: str, y_label: str) -> list[Annotation]:
    points = [point for point in points if point[2] > 0]
    labels = []
    for label, x, y in points:
        axes.plot(x, y, "o", color="C0", markersize=5)
        labels.append(axes.annotate(label, (x, y), (0, 0), textcoords="offset points", fontsize=8))
    if points:
        axes.set_yscale("log")
        axes.margins(0.18)
        sizes = [x for _, x, _ in points]
        middle, span = (min(sizes) + max(sizes)) / 2, max(sizes) - min(sizes)
        if span < _LEAST_SPAN * middle:  # or bytes apart, as with an imatrix, look like a choice
            axes.set_xlim(middle * (1 - _LEAST_SPAN), middle * (1 + _LEAST_SPAN))
    else:
        axes.text(0.5, 0.5, "nothing is lost", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    return labels


def _place(axes: Axes, labels: Sequence[Annotation]) -> None:
    """Puts every label inside the axes where it covers no point and no other label, if it can."""
    taken = []
    for label in labels:
        x, y = axes.transData.transform(label.xy)
        taken.append(Bbox.from_extents(x - 5, y - 5, x + 5, y + 5))
    for label in sorted(labels, key=lambda label: -label.xy[1]):  # those of a column in its order
        for dx, dy in _PLACES:
            label.xyann = (dx, dy)
            label.set_horizontalalignment("left" if dx > 0 else "right")
            box = label.get_window_extent()
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box)
