"""Print one table of the evaluations of several runs: compare_runs.py RUN [RUN ...], folders with an eval.json."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def table(runs: Sequence[Path]) -> str:
    """Return the table of what `--eval true` left in the folders `runs`."""
    rows = [("run", "parameters", "top-1 (%)", "loss", "images/s")]
    for run in runs:
        result = json.loads((run / "eval.json").read_text(encoding="utf-8"))
        figures = (f"{result['n_parameters']:,}", f"{result['acc1']:.2f}", f"{result['loss']:.3f}")
        rows.append((run.name, *figures, f"{result['images_per_second']:,.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    print(table(parser.parse_args().runs))
