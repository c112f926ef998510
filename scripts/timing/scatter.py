"""Time over that of the static network against parameters: a panel for each case, a colour for each operator."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .labels import place_labels
from .networks import UPSTREAM
from .survey import OURS, Case, Row

_MARKERS = "osD^vP*X"


def draw(rows: Sequence[Row], cases: Sequence[Case], parameters: int, backbone: str, title: str) -> Figure:
    """Draw the rows that were timed: ours filled, above it the authors' formulation empty, and the static network.

    Args:
        rows: Of all operators.
        cases: What was timed.
        parameters: Of the static network.
        backbone: Its name, which labels leave out.
        title: Above the picture.
    """
    timed = [row for row in rows if row.ratios]
    operators = list(dict.fromkeys(row.operator for row in timed))
    figure = Figure(figsize=(4.6 * len(cases), 4.8), layout="constrained", dpi=120)
    figure.suptitle(title)
    axes = figure.subplots(1, len(cases), squeeze=False)[0]
    for axis, case in zip(axes, cases, strict=True):
        for number, operator in enumerate(operators):
            style = {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)], "linestyle": "none"}
            own = [row for row in timed if row.operator == operator]
            axis.plot(*_columns(own, case, OURS), **style, label=operator)
            theirs = [row for row in own if UPSTREAM in row.ratios[case]]
            axis.plot(*_columns(theirs, case, UPSTREAM), **style, fillstyle="none")
            for row in theirs:
                x, ratios = _millions(row), row.ratios[case]
                axis.plot([x, x], [ratios[OURS].median, ratios[UPSTREAM].median], color=style["color"], linewidth=0.8)
        axis.plot(parameters / 1e6, 1, "k+", markersize=9, label="static")
        _scale(axis)
        axis.set(title=str(case), xlabel="parameters (M)", ylabel="time / static")
    entries, words = axes[0].get_legend_handles_labels()
    figure.legend(entries, words, loc="outside lower center", ncols=len(words), title="empty: the authors' formulation")
    figure.draw_without_rendering()  # sizes of the axes, which labels are placed in
    figure.set_layout_engine("none")
    names = [row.name.removesuffix(f"_{backbone}") for row in timed]
    for axis, case in zip(axes, cases, strict=True):
        points = [(_millions(row), row.ratios[case][OURS].median) for row in timed]
        theirs = [row for row in timed if UPSTREAM in row.ratios[case]]
        others = [(_millions(row), row.ratios[case][UPSTREAM].median) for row in theirs]
        lines = [(x, row.ratios[case][OURS].median, y) for (x, y), row in zip(others, theirs, strict=True)]
        place_labels(axis, points, names, [*others, (parameters / 1e6, 1.0)], lines)
    return figure


def _columns(rows: Sequence[Row], case: Case, network: str) -> tuple[list[float], list[float]]:
    return [_millions(row) for row in rows], [row.ratios[case][network].median for row in rows]


def _millions(row: Row) -> float:
    assert row.cost is not None
    return row.cost.parameters / 1e6


def _ticks(low: float, high: float) -> list[float]:
    """1, 1.5, 2, 3, 5 and 7 times powers of ten between two numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 1.5, 2, 3, 5, 7)]
    return [tick for tick in ticks if low <= tick <= high]


def _scale(axis) -> None:
    """Both logarithmic, with room for labels, and numbers as they are read."""
    axis.set(xscale="log", yscale="log")
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    axis.set(xlim=(left / 1.3, right * 1.9), ylim=(min(low, 0.9) / 1.05, high * 1.15))
    for line, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        line.set_ticks(_ticks(low, high))
        line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        line.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)
