"""Labels beside points of a picture that overlap neither each other nor a point or a line."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

# Offsets in widths of a point, nearest first: beside it, then above and below it, then further away.
_RINGS = (1.0, 2.0, 3.2, 4.6, 6.4, 8.6, 11.0)
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


def place_labels(
    axis: Axes,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    others: Sequence[tuple[float, float]] = (),
    lines: Sequence[tuple[float, float, float]] = (),
) -> list[Bbox]:
    """Write a label beside each point, with a line to it where it stands away.

    Args:
        axis: With its final limits, scales and size.
        points: In the coordinates of the data.
        labels: One for each.
        others: Points without a label, which are kept free too.
        lines: Upright ones that are kept free, (x, y of one end, y of the other).

    Returns:
        Where the labels are, in pixels of the figure. One for which there is no free place within the axes is written
        where it overlaps least.
    """
    renderer = renderer_of(axis.figure)
    unit = 5 * renderer.points_to_pixels(1)  # half a marker and a gap
    inside = axis.get_window_extent(renderer)
    marks = [_around(*axis.transData.transform([point, point]), 0.7 * unit) for point in (*points, *others)]
    marks += [_around(*axis.transData.transform([(x, a), (x, b)]), 0.3 * unit) for x, a, b in lines]
    taken: list[Bbox] = []
    for point, label in sorted(zip(points, labels, strict=True), key=lambda item: (-item[0][1], item[0][0])):
        x, y = axis.transData.transform(point)
        text = axis.annotate(label, point, fontsize=8, annotation_clip=False)
        size = text.get_window_extent(renderer)
        found = min(
            (
                (_overlap(box, [*taken, *marks]) + 10 * _outside(box, inside), number, box)
                for number, box in enumerate(_places(x, y, size.width, size.height, unit))
            ),
            key=lambda item: item[:2],
        )
        box = found[2]
        text.remove()
        taken.append(box)
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        place = {"xytext": (box.x0, box.y0), "textcoords": "figure pixels", "va": "bottom", "ha": "left"}
        axis.annotate(label, point, fontsize=8, **place, arrowprops=line if _distance(box, x, y) > 1.5 * unit else None)
    return taken


def renderer_of(figure: Any) -> RendererBase:
    """What measures the texts of a figure."""
    canvas = figure.canvas
    return (canvas if isinstance(canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)).get_renderer()


def _places(x: float, y: float, width: float, height: float, unit: float) -> Iterator[Bbox]:
    for ring, (right, up) in itertools.product(_RINGS, _SIDES):
        left = x + unit * ring if right > 0 else x - unit * ring - width if right < 0 else x - width / 2
        bottom = y + unit * ring if up > 0 else y - unit * ring - height if up < 0 else y - height / 2
        yield Bbox.from_bounds(left, bottom, width, height)


def _around(a: Sequence[float], b: Sequence[float], margin: float) -> Bbox:
    """The box of two corners and a margin."""
    (x0, x1), (y0, y1) = sorted((a[0], b[0])), sorted((a[1], b[1]))
    return Bbox.from_extents(x0 - margin, y0 - margin, x1 + margin, y1 + margin)


def _overlap(box: Bbox, others: Sequence[Bbox]) -> float:
    """Area that a box has in common with others, in pixels."""
    common = (Bbox.intersection(box, other) for other in others)
    return sum(part.width * part.height for part in common if part is not None)


def _outside(box: Bbox, frame: Bbox) -> float:
    part = Bbox.intersection(box, frame)
    return box.width * box.height - (part.width * part.height if part is not None else 0)


def _distance(box: Bbox, x: float, y: float) -> float:
    return max(box.x0 - x, x - box.x1, box.y0 - y, y - box.y1)
