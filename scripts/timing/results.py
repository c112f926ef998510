"""One line of the benchmark's table, and the table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WIDTHS = {
    "mode": 5, "precision": 9, "batch": 5, "side": 4, "budget": 6, "network": 8, "layout": 6, "time (ms)": 17,
    "images/s": 9, "to static": 9, "to ours": 7, "floor (ms)": 10, "floor to static": 15,
}  # fmt: skip
MEMORY_WIDTHS = {"peak (MiB)": 10, "peak to static": 14}


@dataclass
class Result:
    """A network in its faster layout, in one case.

    Attributes:
        mode: "infer" or "train".
        precision: As `clock.PRECISIONS`.
        batch: Images at a time.
        side: Of an image, in pixels.
        budget: `cell_num_ratio`; a list where warehouses differ, None of an operator without such a field.
        network: "static", "upstream", "ours", "folded", or a forced implementation.
        layout: "NCHW" or "NHWC".
        seconds: Of each round.
        floor_seconds: The least time by `floor`.
        peak_bytes: The most memory held at once, None if it was not measured.
        to_static: Median time as a ratio to the static network's.
        to_ours: The same to ours.
        floor_to_static: Ratio of the floors.
        peak_to_static: Ratio of the peaks.
    """

    mode: str
    precision: str
    batch: int
    side: int
    budget: float | tuple[float, ...] | None
    network: str
    layout: str
    seconds: list[float]
    floor_seconds: float
    peak_bytes: int | None = None
    to_static: float = 1.0
    to_ours: float = 1.0
    floor_to_static: float = 1.0
    peak_to_static: float | None = None

    @property
    def median(self) -> float:
        """Median seconds of a round."""
        return statistics.median(self.seconds)

    def cells(self) -> list[str]:
        """What the table shows of it, in the order of its columns."""
        spread = (max(self.seconds) - min(self.seconds)) / 2
        shown = [
            *(self.mode, self.precision, str(self.batch), str(self.side)),
            _budget(self.budget),
            *(self.network, self.layout, f"{1e3 * self.median:.2f} ± {1e3 * spread:.2f}"),
            *(f"{self.batch / self.median:,.1f}", f"{self.to_static:.2f}", f"{self.to_ours:.2f}"),
            *(f"{1e3 * self.floor_seconds:.2f}", f"{self.floor_to_static:.2f}"),
        ]
        if self.peak_bytes is not None:
            shown += [f"{self.peak_bytes / 2**20:,.0f}", f"{self.peak_to_static:.2f}"]
        return shown


def compare(results: Sequence[Result]) -> None:
    """Fill in the ratios among the networks of one case; "static" and "ours" are among them."""
    by_name = {result.network: result for result in results}
    static, ours = by_name["static"], by_name["ours"]
    for result in results:
        result.to_static = result.median / static.median
        result.to_ours = result.median / ours.median
        result.floor_to_static = result.floor_seconds / static.floor_seconds
        if result.peak_bytes is not None and static.peak_bytes is not None:
            result.peak_to_static = result.peak_bytes / static.peak_bytes


def _budget(budget: float | tuple[float, ...] | None) -> str:
    if budget is None:
        return "–"
    return f"{budget:g}×" if isinstance(budget, int | float) else "lists"


def table_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A row of a Markdown table, aligned as plain text too."""
    return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def table_head(columns: dict[str, int]) -> str:
    """The two lines above the rows."""
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in columns.values()) + "|"
    return table_row(list(columns), list(columns.values())) + "\n" + rule


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as what stands in them."""
    columns = {name: max(map(len, column)) for name, *column in zip(head, head, *rows, strict=True)}
    return "\n".join([table_head(columns), *(table_row(row, list(columns.values())) for row in rows)])
