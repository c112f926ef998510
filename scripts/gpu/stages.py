"""The stages of a scope, in order of their worth."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from kernelwarehouse.engine import keep_freed_memory

from . import correctness, layers, machine, networks, training
from .cases import Case
from .conductor import Stage
from .journal import Journal
from .scope import INTERPRETED, Scope

_KEEP_TILES = {
    "TRITON_CACHE_AUTOTUNING": "1"
}  # Triton keeps on disk which tiles were fastest, for the stages that follow


def _threads(cases: Callable[[], Iterable[Case]], shares: int) -> Callable[[], Iterable[Case]]:
    """The cases, made and run by as many threads as each of the processes that share them can have."""

    def with_threads() -> Iterator[Case]:
        torch.set_num_threads(max(1, torch.get_num_threads() // shares))
        if not torch.cuda.is_available():
            keep_freed_memory()  # as main.py does
        yield from cases()

    return with_threads


def find_stages(scope: Scope, journal: Journal, scratch: Path) -> list[Stage]:
    """The stages that the scope names, with its limits.

    Args:
        scope: What is measured.
        journal: What is known of the machine is read from it.
        scratch: An empty folder for runs of main.py.
    """
    small = scope.compilation
    stages = [
        Stage(machine.STAGE, lambda: machine.cases(scope), 0, case_limit=20, patience=15),
        Stage(
            correctness.STAGE,
            lambda: correctness.cases(scope),
            0,
            case_limit=100 if INTERPRETED else 25,
            patience=30,
            shares=scope.shares,
        ),
        Stage(
            layers.COMPILATION,
            lambda: layers.compilation_cases(small, journal.read()),
            0,
            case_limit=40,
            patience=40,
            shares=max(1, scope.shares * 2 // 3),  # of which each holds all layers' images
        ),
        Stage(
            layers.STAGE,
            lambda: layers.cases(scope, journal.read()),
            0,
            case_limit=3 * layers.SECONDS,
            patience=30,
            environment=_KEEP_TILES,
        ),
        Stage(networks.STAGE, lambda: networks.cases(scope), 0, case_limit=30, patience=30, environment=_KEEP_TILES),
        Stage(
            training.STAGE,
            lambda: training.cases(scope, scratch),
            0,
            case_limit=scope.limits.get(training.STAGE, 0),
            patience=30,
            shares=scope.runs,
        ),
    ]
    return [
        replace(stage, limit=scope.limits[stage.name], cases=_threads(stage.cases, stage.shares))
        for stage in stages
        if stage.name in scope.limits
    ]
