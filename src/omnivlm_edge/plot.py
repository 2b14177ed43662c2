"""The losses of builds as a picture: size against error, one point a build. Needs the extra `plot`.

Raises OptionError where matplotlib is not installed, when it is imported.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

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
