"""Peak memory of a step, measured in a fresh process, so that nothing else's memory is counted or reused."""

import ctypes
import gc
import importlib
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import nn

from kernelwarehouse.models import get_operator

from .clock import arithmetic, step
from .networks import Contender

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(contender: Contender, train: bool, precision: str, batch: int, device: torch.device) -> int:
    """Return the most that a network, its gradients and its steps hold at once.

    On a GPU it is what the allocator has given out; on a CPU, what the process holds above what it held before the
    network was built.

    Raises:
        SystemExit: The process was killed, most likely because memory ran out.
    """
    return max(_in_fresh_process(contender, train, precision, batch, device)[:2])


def working_bytes(contender: Contender, precision: str, batch: int, device: torch.device) -> int:
    """Return the most that a training step holds besides parameters and gradients: activations, and what is computed.

    In the forward pass that is the peak less the parameters, since gradients are given up before it. In the backward
    pass gradients are subtracted too, as if all of them were there at the peak.

    Raises:
        SystemExit: As `peak_bytes`.
    """
    forward, backward, parameters = _in_fresh_process(contender, True, precision, batch, device)
    return max(forward - parameters, backward - 2 * parameters)


def _in_fresh_process(
    contender: Contender, train: bool, precision: str, batch: int, device: torch.device
) -> tuple[int, int, int]:
    spawn, operator = multiprocessing.get_context("spawn"), contender.config.operator
    module = type(get_operator(operator)).__module__ if operator else __name__  # which makes the operator known there
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=importlib.import_module, initargs=(module,)) as pool:
        try:
            return pool.submit(_run, contender, train, precision, batch, device).result()
        except (BrokenProcessPool, torch.OutOfMemoryError) as e:
            raise SystemExit(f"error: memory of {contender.name} at a batch of {batch}: it ran out ({e})") from e


def _run(contender: Contender, train: bool, precision: str, batch: int, device: torch.device) -> tuple[int, int, int]:
    """Peaks of a step until the network's output is there and afterwards, and the bytes of the parameters."""

    def prepare() -> tuple[nn.Module, Callable[[], None]]:
        images = contender.images(batch, device)
        net = contender.build_for(images, precision)
        return net, step(net, images, train, precision)

    on_gpu = device.type == "cuda"

    def reset() -> None:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            _RESET.write_text("5")  # by proc(5): the peak starts again from here

    def peak() -> int:
        return (torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")) - before

    forward: list[int] = []

    def note(*_: object) -> None:
        forward.append(peak())
        reset()

    with arithmetic(precision):
        prepare()[1]()  # loads and compiles code, which is no memory of the network
        _give_back()
        before = torch.cuda.memory_allocated() if on_gpu else _resident("VmRSS")
        net, run = prepare()
        run()
        net.zero_grad()
        _give_back()
        net.register_forward_hook(note)
        reset()
        run()
        return forward[0], peak(), sum(p.nbytes for p in net.parameters())


def _give_back() -> None:
    """Free what nobody refers to, and what C's allocator has kept for later."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def check_measurable(device: torch.device) -> None:
    """Make sure that peaks can be read.

    Raises:
        ValueError: On a CPU without Linux's /proc.
    """
    if device.type == "cpu" and not _RESET.exists():
        raise ValueError("--memory: on a CPU it is read from /proc/self, which only Linux has")


def _resident(field: str) -> int:
    """VmRSS, the bytes that the process holds, or VmHWM, their peak."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), flags=re.MULTILINE)[1]) << 10
