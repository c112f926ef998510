"""Prove and measure everything on a GPU, in stages that write what they find as they find it.

    python scripts/gpu_report.py --output gpu            in full: within 7 minutes on an H100
    python scripts/gpu_report.py --output gpu --quick    the machine, correctness and one network, in 2 minutes
    python scripts/gpu_report.py --output cpu --quick --device cpu    whatever a CPU can, within 5 minutes

The folder then holds report.md, report.jsonl with all figures, and log.txt with what the processes have printed.
scripts/gpu/README.md describes the stages, and has the figures of GPUs that were measured.
"""

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

FILES = JOURNAL, REPORT, LOG = "report.jsonl", "report.md", "log.txt"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, metavar="FOLDER", help="where the files go; those of an earlier report are replaced")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where torch finds a GPU")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="what counts most")
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="one layer, to try the script")
    add("--stages", nargs="+", metavar="STAGE", help="run these alone")
    add("--cpp", action="store_true", help="compile the C++ too, of which a GPU needs nothing")
    add("--pack_curve", type=Path, nargs="+", metavar="RUN", help="write quickstart_cpu.json from such folders instead")
    add("--readme", action="store_true", help="write the figures of scripts/gpu/results into the README instead")
    arguments = parser.parse_args()
    if not (arguments.output or arguments.pack_curve or arguments.readme):
        parser.error("one of --output, --pack_curve and --readme is needed")
    return arguments


def main() -> int:
    """Run the command line; return 0, 1 if something failed or was found to be wrong, or 2 where there is no GPU."""
    arguments = parse_arguments()
    if arguments.device != "cpu" and not arguments.cpp:
        os.environ["CXX"] = "no-compiler"
    if arguments.pack_curve:
        from gpu import curve

        curve.pack(arguments.pack_curve)
        return 0
    if arguments.readme:
        from gpu import figures

        figures.write_readme()
        return 0
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Run the stages."""
    import torch
    from gpu import report
    from gpu.conductor import conduct
    from gpu.journal import Journal
    from gpu.scope import Scope
    from gpu.stages import find_stages

    with ProcessPoolExecutor(1, get_context("fork")) as process:  # which looks for a GPU, as this one must not
        found = process.submit(torch.cuda.is_available).result()
    if arguments.device == "cuda" and not found:
        print("error: --device: torch finds no GPU here; take cpu", file=sys.stderr)
        return 2
    device = arguments.device or ("cuda" if found else "cpu")
    scope = Scope.of(torch.device(device), arguments.size or "full")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (arguments.output / name).unlink(missing_ok=True)
    journal, path = Journal(arguments.output / JOURNAL), arguments.output / REPORT
    with tempfile.TemporaryDirectory() as scratch:
        stages = find_stages(scope, journal, Path(scratch))
        chosen = [stage for stage in stages if stage.name in (arguments.stages or [s.name for s in stages])]
        conduct(chosen, journal, arguments.output / LOG, scope.limit, lambda: report.write(journal, path))
    print(path.read_text(encoding="utf-8"))
    return report.status(journal.read())


if __name__ == "__main__":
    sys.exit(main())
