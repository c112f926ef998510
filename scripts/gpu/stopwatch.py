"""Timing what takes less than a GPU's answer does: the same step many times in a row, or as a graph of its kernels."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kernelwarehouse.models.tuning import measure

_SPAN = {"cuda": 0.02, "cpu": 0.0}  # seconds of steps in a row that count as one measurement
_MOST = 200  # steps in a row
ROUNDS = 3


def median_seconds(steps: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Seconds of one step of each, the median of `ROUNDS` rounds in which they take turns; they have run before."""
    repeats = {name: _repeats(run, device) for name, run in steps.items()}
    rows = {name: _in_a_row(run, repeats[name]) for name, run in steps.items()}
    seconds = measure(rows, ROUNDS, device, warm_up=0)
    return {name: sorted(values)[len(values) // 2] / repeats[name] for name, values in seconds.items()}


def _repeats(run: Callable[[], Any], device: torch.device) -> int:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    once = time.perf_counter() - start
    return max(1, min(_MOST, round(_SPAN[device.type] / max(once, 1e-6))))


def _in_a_row(run: Callable[[], Any], times: int) -> Callable[[], None]:
    def row() -> None:
        for _ in range(times):
            run()

    return row


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """The kernels of a step, on a GPU, as one graph that is launched at once; the step has run before.

    Raises:
        RuntimeError: The step waits for the GPU, or allocates what a graph cannot.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
