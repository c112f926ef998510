"""Ratios to the static network, drawn against what varies."""

from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from .results import Result

AXES = {"batch": "batch size", "side": "side of the images (pixels)", "budget": "budget (cell_num_ratio)"}


def draw(results: Sequence[Result], varies: str, title: str) -> Figure:
    """Draw one panel for each mode, precision, and whatever else differs among the results.

    Args:
        results: Of all networks and cases.
        varies: What is on the horizontal axis, a key of `AXES`.
        title: Above the picture.
    """
    fixed = ["mode", "precision", *(name for name in AXES if name != varies)]
    panels = list(dict.fromkeys(tuple(getattr(r, name) for name in fixed) for r in results))
    networks = list(dict.fromkeys(r.network for r in results))
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 0.6 + 3.6 * rows), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis, panel, name in zip(grid.flat, panels, _titles(panels, fixed), strict=False):
        shown = [r for r in results if tuple(getattr(r, name) for name in fixed) == panel]
        for number, network in enumerate(networks):
            points = [(getattr(r, varies), r.to_static) for r in shown if r.network == network]
            if points:
                axis.plot(*_columns(points), marker="o", color=f"C{number}", label=network)
        floor = [(getattr(r, varies), r.floor_to_static) for r in shown if r.network == "ours"]
        axis.plot(*_columns(floor), linestyle=":", color="black", label="floor")
        _scale(axis, [x for x, _ in sorted(floor)])
        axis.set(title=name, xlabel=AXES[varies], ylabel="time / static")
        axis.grid(alpha=0.3)
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    labelled = {line.get_label(): line for axis in figure.axes for line in axis.get_lines()}
    lines = [labelled[name] for name in (*networks, "floor")]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    return figure


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    xs, ys = zip(*sorted(points), strict=True)
    return list(xs), list(ys)


def _scale(axis, values: Sequence[float]) -> None:
    """Logarithmic, for values that double; ticks where something was measured."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.xaxis.set_minor_locator(NullLocator())
    low, high = axis.get_ylim()
    if high > 8:
        axis.set_yscale("log")
        ticks = [t for t in (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500) if low <= t <= high]
        axis.set_yticks(ticks, [str(t) for t in ticks])
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_ylim(bottom=0)


def _titles(panels: Sequence[tuple], fixed: Sequence[str]) -> list[str]:
    """Mode and precision of each panel, and what else is not the same in all."""
    differ = [i for i in range(2, len(fixed)) if len({panel[i] for panel in panels}) > 1]
    modes = {"infer": "inference", "train": "training"}
    return [", ".join((modes[p[0]], p[1], *(f"{fixed[i]} {p[i]}" for i in differ))) for p in panels]
