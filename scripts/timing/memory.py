"""Peak memory of a step, measured in a fresh process, so that nothing else's memory is counted or reused."""

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

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
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(_run, contender, train, precision, batch, device).result()
        except (BrokenProcessPool, torch.OutOfMemoryError) as e:
            raise SystemExit(f"error: memory of {contender.name} at a batch of {batch}: it ran out ({e})") from e


def _run(contender: Contender, train: bool, precision: str, batch: int, device: torch.device) -> int:
    def prepare() -> Callable[[], None]:
        images = contender.images(batch, device)
        return step(contender.build_for(images, precision), images, train, precision)

    on_gpu = device.type == "cuda"
    with arithmetic(precision):
        prepare()()  # loads and compiles code, which is no memory of the network
        _give_back()
        before = torch.cuda.memory_allocated() if on_gpu else _resident("VmRSS")
        run = prepare()
        run()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            _RESET.write_text("5")  # by proc(5): the peak starts again from here
        run()
        return (torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")) - before


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
