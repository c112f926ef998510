"""Stage 1: what machine it is, and what it can do at best."""

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch
from timing.clock import PRECISIONS
from timing.floor import Machine

from .cases import Case
from .journal import Record, find_result
from .scope import INTERPRETED, Scope

STAGE = "machine"
_PACKAGES = ("torch", "triton", "torchvision", "timm", "numpy")


def cases(scope: Scope) -> Iterator[Case]:
    """Names and versions first, which take no time; then the rates."""
    yield Case("description", lambda: describe(scope.device))
    yield Case("rates", lambda: dataclasses.asdict(Machine.measure(scope.device, precisions(scope.device))))


def precisions(device: torch.device) -> tuple[str, ...]:
    """What products are timed in; fp32 alone on a CPU that would emulate the others."""
    if device.type == "cuda":
        return PRECISIONS
    return ("fp32",)


def known(scope: Scope, records: Sequence[Record]) -> Machine:
    """The rates as the stage has measured them, or as they are measured now if it has not."""
    rates = find_result(records, STAGE, "rates")
    return Machine(**rates) if rates else Machine.measure(scope.device, precisions(scope.device))


def describe(device: torch.device) -> Record:
    """Names and versions."""
    found: Record = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "interpreter of Triton": INTERPRETED,
        **{name: _version(name) for name in _PACKAGES},
    }
    if device.type == "cpu":
        return found | {"name": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory (GiB)": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as e:
        print(f"the driver's version is unknown: {e}", file=sys.stderr)
        return None
