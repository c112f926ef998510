"""The quickstart's course on a CPU, packed, and whether a run elsewhere takes the same.

The file holds, for each run (they differ in their seeds alone) and each epoch, what log.txt has. A run takes the same
course if, over the last third of the epochs, the mean of each figure is within the spread of the packed runs: between
their least and greatest, and as far beyond either.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKED = Path(__file__).with_name("quickstart_cpu.json")
FIGURES = ("train_loss", "test_loss", "test_acc1")
_LEAST = {"train_loss": 0.01, "test_loss": 0.01, "test_acc1": 0.3}  # a spread that is smaller is chance

Curve = dict[str, list[float]]


def read_run(folder: Path) -> Curve:
    """Figures by name, epoch by epoch, of a run's folder.

    Raises:
        OSError: There is no log.txt.
        KeyError: An epoch lacks a figure, since it was not evaluated.
    """
    lines = [json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
    return {name: [line[name] for line in lines] for name in FIGURES}


def pack(folders: Sequence[Path]) -> None:
    """Write the file from the folders of runs that are complete."""
    curves = [read_run(folder) for folder in folders]
    rounded = [{name: [round(v, 4) for v in values] for name, values in curve.items()} for curve in curves]
    lines = ",\n    ".join(json.dumps(curve) for curve in rounded)
    PACKED.write_text(f"[\n    {lines}\n]\n", encoding="utf-8")


def packed() -> list[Curve]:
    """The runs in the file."""
    return json.loads(PACKED.read_text(encoding="utf-8"))


def compare(curve: Curve) -> dict[str, Any]:
    """For each figure its mean over the last third, the packed runs', and whether it is within their spread.

    Raises:
        ValueError: A run of another length.
    """
    runs = packed()
    length = len(runs[0][FIGURES[0]])
    if any(len(values) != length for values in curve.values()):
        raise ValueError(f"a run of {length} epochs is compared, found {len(curve[FIGURES[0]])}")
    found: dict[str, Any] = {}
    for name in FIGURES:
        theirs, ours = [_end(run[name]) for run in runs], _end(curve[name])
        spread = max(max(theirs) - min(theirs), _LEAST[name])
        within = min(theirs) - spread <= ours <= max(theirs) + spread
        found[name] = {"found": ours, "packed": theirs, "within": within}
    return found


def _end(values: Sequence[float]) -> float:
    last = values[-(len(values) // 3) :]
    return sum(last) / len(last)
