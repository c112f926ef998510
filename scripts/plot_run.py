"""Draw loss, accuracy, learning rate and temperature of runs into one picture: plot_run.py RUN [RUN ...]."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.engine import check_picture


def read_log(run: Path) -> list[dict[str, float]]:
    """Return the record of each epoch in log.txt; of an epoch that was repeated, the last.

    Raises:
        ConfigError: There is no such file, or it is none of ours.
    """
    path = run / "log.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last one short
        return list({record["epoch"]: record for record in records}.values())
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}: no log of a run: {e}") from e


def plot(runs: Sequence[Path]) -> Figure:
    """Draw the logs in the folders `runs`."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    (loss, accuracy), (rate, temperature) = axes
    for number, run in enumerate(runs):
        records, color = read_log(run), f"C{number}"

        def draw(axis, name, records=records, color=color, **style):
            points = [(r["epoch"] + 1, r[name]) for r in records if name in r]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, marker="." if len(points) < 50 else None, **style)

        draw(loss, "train_loss", linestyle="--", alpha=0.6, label=f"{run.name}, training")
        draw(loss, "test_loss", label=f"{run.name}, held out")
        final = f" ({records[-1]['test_acc1']:.2f} %)" if "test_acc1" in records[-1] else ""
        draw(accuracy, "test_acc1", label=run.name + final)
        draw(rate, "train_lr", label=run.name, linestyle=("-", "--", ":")[number % 3])
        draw(temperature, "train_temperature", label=run.name, linestyle=("-", "--", ":")[number % 3])
    titles = ("loss", "top-1 accuracy, held out (%)", "learning rate", "attention temperature τ")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend()
    return figure


def main() -> int:
    """Run the command line; return 0, or 2 for a file that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with a log.txt")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="picture to write")
    arguments = parser.parse_args()
    try:
        check_picture("--output", arguments.output)
        plot(arguments.runs).savefig(arguments.output, dpi=120)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"curves: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
