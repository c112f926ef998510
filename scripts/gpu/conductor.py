"""Stages one after the other, each in processes of its own that are watched: nothing in one can stop the next.

A stage's processes are forked, so that what is imported is imported once; this process never touches a GPU. Each takes
a share of the stage's cases. One that breaks, or stays in a case for too long, is ended with all its children, and
another goes on behind that case. At the stage's limit all of them are ended.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from .cases import Case, run_cases
from .journal import Journal

_POLL = 0.05  # seconds
_EVERY = 1.0  # seconds between two calls of `changed`
_LEAST = 2.0  # seconds: with less, a stage is not begun


@dataclass(frozen=True)
class Stage:
    """A part of the report.

    Attributes:
        name: Short, and unique.
        cases: Gives the cases, in the order of their worth; called in a process of the stage.
        limit: Seconds for the whole stage.
        case_limit: Seconds for a case, after which it is given up where Python can do that.
        patience: Seconds more, after which the process is ended; of the time before the first case too.
        shares: How many processes share the cases.
        environment: Variables for its processes.
    """

    name: str
    cases: Callable[[], Iterable[Case]]
    limit: float
    case_limit: float = 60.0
    patience: float = 60.0
    shares: int = 1
    environment: dict[str, str] = field(default_factory=dict)


def conduct(stages: Sequence[Stage], journal: Journal, log: Path, limit: float, changed: Callable[[], None]) -> None:
    """Run all stages; returns when the last has ended, or been ended.

    Args:
        stages: In their order.
        journal: Where results go; whatever it holds of a stage already is not done again.
        log: What the processes print is appended there.
        limit: Seconds for all of it.
        changed: Called when there are new results, and before each stage; it must not fail.
    """
    end = time.monotonic() + limit
    for stage in stages:
        seconds = min(stage.limit, end - time.monotonic())
        if seconds < _LEAST:
            journal.append({"stage": stage.name, "ended": "no time was left for it", "seconds": 0.0})
            continue
        start = time.monotonic()
        journal.append({"stage": stage.name, "begun": time.time(), "limit": seconds})
        how = _run_stage(stage, journal, log, start + seconds, changed)
        journal.append({"stage": stage.name, "ended": how, "seconds": time.monotonic() - start})
        changed()


def _run_stage(stage: Stage, journal: Journal, log: Path, end: float, changed: Callable[[], None]) -> str:
    """Run one stage until it is done or `end` has come, and return how it ended."""
    workers = [_Worker(stage, number, journal, log) for number in range(stage.shares)]
    shown = (-1, 0.0)  # size of the journal, and when
    try:
        while any(worker.is_active() for worker in workers):
            if time.monotonic() >= end:
                return "stopped at its limit"
            time.sleep(_POLL)
            now = journal.path.stat().st_size, time.monotonic()
            if now[0] != shown[0] and now[1] > shown[1] + _EVERY:
                shown = now
                changed()
    finally:
        for worker in workers:
            worker.end()
    failed = {worker.failure for worker in workers if worker.failure}
    return "; ".join(sorted(failed)) or "done"


class _Worker:
    """A process that runs a share of a stage's cases, and those that take its place."""

    def __init__(self, stage: Stage, number: int, journal: Journal, log: Path):
        self.stage, self.number, self.journal, self.log = stage, number, journal, log
        self.failure = ""
        self.before: set[str] = set()
        self._start()

    def _start(self) -> None:
        done = self._begun()
        arguments = (self.stage, self.number, self.journal, self.log, done)
        self.process: BaseProcess = multiprocessing.get_context("fork").Process(target=_work, args=arguments)
        self.before, self.since, self.seen = done, time.monotonic(), len(self._own())
        self.process.start()

    def _own(self) -> list[dict]:
        name, number = self.stage.name, self.number
        return [r for r in self.journal.read() if r.get("stage") == name and r.get("share") == number]

    def _begun(self) -> set[str]:
        return {record["case"] for record in self._own() if "started" in record}

    def is_active(self) -> bool:
        """Whether there is more to wait for; a process that broke, or stays in one case, is replaced here."""
        own = self._own()
        if len(own) != self.seen:
            self.seen, self.since = len(own), time.monotonic()
        inside = bool(own) and "started" in own[-1] and own[-1]["case"] not in self.before
        if self.process.is_alive():
            patience = self.stage.patience + (self.stage.case_limit if inside else 0)
            if time.monotonic() - self.since < patience:
                return True
            reason = "it hung, and its process was ended"
        elif self.process.exitcode == 0:
            return False
        else:
            reason = f"its process ended with status {self.process.exitcode}"
        self.end()
        if inside:
            about = {"stage": self.stage.name, "case": own[-1]["case"], "share": self.number}
            self.journal.append({**about, "error": reason, "seconds": time.time() - own[-1]["started"]})
        if self._begun() == self.before:  # not one case was begun, nor would be
            self.failure = "its cases could not be made (see the log)" if self.process.exitcode == 1 else reason
            return False
        self._start()
        return True

    def end(self) -> None:
        """End the process and all that it has started."""
        if self.process.pid is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(self.process.pid, number)
                except (ProcessLookupError, PermissionError):  # it has no group yet, or none any more
                    break
                self.process.join(0.5)
        if self.process.is_alive():
            self.process.kill()
        self.process.join(5)


def _work(stage: Stage, number: int, journal: Journal, log: Path, done: set[str]) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    for standard in (1, 2):
        os.dup2(output, standard)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115 (a test runner may have replaced it)
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.update(stage.environment)
    try:
        run_cases(stage.name, stage.cases(), journal, (number, stage.shares), stage.case_limit, done)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without the exit functions that the parent's imports have registered
