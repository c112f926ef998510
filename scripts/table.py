"""One table of all operators: what the shipped configurations cost, or how long and how much memory they take.

    python scripts/table.py                                            every shipped configuration; nothing is timed
    python scripts/table.py --backbone resnet18 --plot operators.png   every operator on one backbone, timed

Without a backbone: parameters (ours and published), multiply-accumulates for one image, and published top-1 accuracy.
With one, rows are the shipped configurations for it, and the defaults of each operator that has none. Times are those
of forward, or of forward and backward in training, over those of the static network: each row is timed in turns with
its static twin, both in the faster of their two memory layouts. In brackets is the authors' formulation (mix all
kernels, then one grouped convolution) with the same weights. Its outputs and gradients are compared with ours in
float64 first, for all rows; if they differ, nothing is printed.
"""

import argparse
import csv
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timing import scatter, shipped
from timing.clock import PRECISIONS
from timing.memory import check_measurable
from timing.networks import UPSTREAM
from timing.results import markdown
from timing.survey import OURS, STATIC, Case, Row, check, find_rows, measure

from kernelwarehouse import ConfigError
from kernelwarehouse.engine import check_picture, keep_freed_memory
from kernelwarehouse.engine.outputs import check_file

CASES = ("infer:1", "infer:8", "train:8")


def configurations() -> list[dict[str, Any]]:
    """Print the table of all shipped configurations, and return what files keep."""
    found = [shipped.record(one) for one in shipped.shipped(shipped.folders())]
    print(markdown(list(shipped.COLUMNS.values()), [shipped.cells(record) for record in found]))
    return found


def operators(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Print the table of every operator on one backbone, draw it if asked to, and return what files keep."""
    cost, rows = find_rows(arguments.backbone, arguments.size, arguments.operators)
    for row in rows:
        check(row, device)
        print(f"{row.name}: {row.compared()}", file=sys.stderr, flush=True)
    for row in rows:
        print(f"{row.name}: timing", file=sys.stderr, flush=True)
        measure(row, arguments.cases, arguments.rounds, arguments.precision, not arguments.no_memory, device)
    parity = max((row.parity for row in rows if row.parity is not None), default=None)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{arguments.backbone}, {where}, torch {torch.__version__}, {arguments.precision}"
    print(f"{title}, medians of {arguments.rounds} rounds; time / static, in brackets the authors' formulation", end="")
    print("\n" if parity is None else f"; parity {parity:.0e}\n")
    trained = [] if arguments.no_memory else [case for case in arguments.cases if case.mode == "train"][-1:]
    head = [
        "network",
        "params (M)",
        "MACs (G)",
        *map(str, (*arguments.cases, *(f"memory, {case}" for case in trained))),
    ]
    body = [static_cells(arguments.backbone, cost, rows, arguments.cases, bool(trained))]
    body += [row_cells(row, arguments.cases, bool(trained)) for row in rows]
    if any(row.remarks for row in rows):
        head.append("remark")
        remarks = ["", *("; ".join(row.remarks) for row in rows)]
        body = [[*cells, remark] for cells, remark in zip(body, remarks, strict=True)]
    print(markdown(head, body))
    if arguments.plot:
        figure = scatter.draw(rows, arguments.cases, cost.parameters, arguments.backbone, title)
        figure.savefig(arguments.plot)
    return [record(row, arguments.cases) for row in rows]


def static_cells(name: str, cost: shipped.Cost, rows: Sequence[Row], cases: Sequence[Case], memory: bool) -> list[str]:
    """The row of the static network, with its times over all rows."""
    cells = [f"{name} (static)", f"{cost.parameters / 1e6:.2f}", f"{cost.macs / 1e9:.3f}"]
    for case in cases:
        seconds = sorted(value for row in rows for value in row.static_seconds.get(case, []))
        spread = 1e3 * (seconds[-1] - seconds[0]) / 2 if seconds else 0.0
        cells.append(f"{1e3 * seconds[len(seconds) // 2]:.1f} ± {spread:.1f} ms" if seconds else "–")
    held = sorted(row.memory[STATIC] for row in rows if row.memory)
    return cells + ([f"{held[len(held) // 2] / 2**20:,.0f} MiB" if held else "–"] if memory else [])


def row_cells(row: Row, cases: Sequence[Case], memory: bool) -> list[str]:
    """The row of a converted network."""
    if row.cost is None:
        return [row.name, *["–"] * (2 + len(cases) + memory)]
    cells = [row.name, f"{row.cost.parameters / 1e6:.2f}", f"{row.cost.macs_in_all / 1e9:.3f}"]
    figures = [row.ratios[case] for case in cases]
    if memory:
        held = {network: row.memory_ratio(network) for network in row.memory}
        figures.append({network: f"{ratio:.2f}" for network, ratio in held.items()})
    return cells + [f"{f[OURS]} ({f[UPSTREAM]})" if UPSTREAM in f else str(f[OURS]) for f in figures]


def record(row: Row, cases: Sequence[Case]) -> dict[str, Any]:
    """The values of a row by column."""
    values: dict[str, Any] = {"network": row.name, "operator": row.operator, "remark": "; ".join(row.remarks) or None}
    values |= {"parameters": row.cost and row.cost.parameters, "macs": row.cost and row.cost.macs_in_all}
    values["parity"] = row.parity
    for case in cases:
        key = f"{case.mode}_{case.batch}"
        values[f"{key}_static_seconds"] = row.static_seconds.get(case)
        for network in (OURS, UPSTREAM):
            ratio = row.ratios.get(case, {}).get(network)
            values[f"{key}_{network}"] = ratio and ratio.median
            values[f"{key}_{network}_spread"] = ratio and ratio.spread
            values[f"{key}_{network}_seconds"] = ratio and ratio.seconds
    for network in (STATIC, OURS, UPSTREAM):
        values[f"memory_{network}_bytes"] = row.memory.get(network)
    return values


def parse_arguments() -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: Options that exclude each other, no such module, or a file that cannot be written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", metavar="NAME", help="folder of shipped configurations, or a name of timm's: time it")
    add("--operators", nargs="+", default=[], metavar="NAME", help="default: all that are registered")
    text = "what is timed: infer or train, and the batch; default: " + " ".join(CASES)
    add("--cases", type=Case.read, nargs="+", default=[*map(Case.read, CASES)], metavar="MODE:N", help=text)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--precision", default="fp32", choices=PRECISIONS, help="bf16 and fp16 by autocast")
    add("--size", type=int, metavar="N", help="side of the images; default: the configurations'")
    add("--rounds", type=int, default=7, metavar="N", help="default: %(default)s")
    add(
        "--no_memory",
        action="store_true",
        help="leave out the memory of training, which takes a process for each network",
    )
    text = "Python module that registers further operators"
    add("--import", action="append", default=[], metavar="MODULE", dest="modules", help=text)
    add("--plot", type=Path, metavar="FILE", help="draw time against parameters")
    add("--json", type=Path, metavar="FILE", help="write all figures there, with the seconds of every round")
    add("--csv", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    for module in arguments.modules:
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise ConfigError(f"--import {module}: {e}") from e
    if arguments.plot and not arguments.backbone:
        raise ConfigError("--plot draws what was timed; name a --backbone")
    if arguments.rounds < 1 or (arguments.size is not None and arguments.size < 1):
        raise ConfigError("--rounds and --size: must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: torch finds no GPU here; take cpu")
    if arguments.device == "cpu" and arguments.precision == "tf32":
        raise ConfigError("--precision: tf32 is of GPUs; on a CPU take fp32, bf16 or fp16")
    if arguments.backbone and not arguments.no_memory and any(case.mode == "train" for case in arguments.cases):
        check_measurable(torch.device(arguments.device))
    if arguments.plot:
        check_picture("--plot", arguments.plot)
    for option in ("json", "csv"):
        if file := getattr(arguments, option):
            check_file(f"--{option}", file)
    return arguments


def write(records: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write the files that were asked for; CSV holds no lists."""
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.csv:
        columns = [name for name in records[0] if not any(isinstance(record[name], list) for record in records)]
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(records)


def main() -> int:
    """Run the command line; return 0, or 2 for a configuration or an option that cannot be used."""
    try:
        arguments = parse_arguments()
        device = torch.device(arguments.device)
        if arguments.backbone:
            if device.type == "cpu":
                keep_freed_memory()  # for all networks alike, as main.py does
            records = operators(arguments, device)
        else:
            records = configurations()
        write(records, arguments)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
