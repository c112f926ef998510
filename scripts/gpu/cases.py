"""Running the cases of a stage one after the other, so that one that fails costs only itself."""

import contextlib
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from .journal import Journal, Record

BROKEN = 70  # exit status of a process whose GPU context answers nothing any more


class Case(NamedTuple):
    """One thing to find out.

    Attributes:
        name: Unique in its stage.
        run: Finds it out; returns what is kept in JSON.
    """

    name: str
    run: Callable[[], Record]


class OutOfTime(Exception):  # noqa: N818
    """A case took longer than it may."""


def run_cases(
    stage: str, cases: Iterable[Case], journal: Journal, share: tuple[int, int], seconds: float, done: set[str]
) -> None:
    """Run this process's share of the cases, and record when each starts and what came of it.

    Args:
        stage: Its name.
        cases: All of the stage's, in the order of their worth, the same in every process of the stage.
        journal: Where to record.
        share: (i, n): of all cases, those whose number leaves i when divided by n.
        seconds: A case that takes longer is given up, when its Python code goes on.
        done: Names of cases that an earlier process has run, or was ended by.
    """
    number, of = share
    iterator = enumerate(cases)
    for index, case in iterator:
        if index % of != number or case.name in done:
            continue
        about = {"stage": stage, "case": case.name, "share": number}
        journal.append({**about, "started": time.time()})
        start = time.monotonic()
        try:
            with _limit(seconds):
                found = {"result": case.run()}
        except Exception as e:  # whatever a kernel, a compiler or a driver may raise
            traceback.print_exc()
            found = {"error": _sentence(e)}
        journal.append({**about, **found, "seconds": time.monotonic() - start})
        if "error" in found:
            _recover()


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise OutOfTime(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def _recover() -> None:
    """Free memory; end the process if the GPU's context is broken, as after an illegal access."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    gc.collect()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(BROKEN)
