"""Being told to end: the signals by which SLURM, torchrun, spot machines, terminals and users announce it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# sysexits.h: a temporary failure, the user is invited to try again.
EXIT_INTERRUPTED = 75
# Windows has only two of them, and nothing that would send the others.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP") if hasattr(signal, name)]
# nohup and shells, in the background, let a process ignore these.
IGNORABLE = ("SIGINT", "SIGHUP")
# A second SIGINT after so many seconds is a user's who will not wait; one before may be a launcher's copy of the first.
IMPATIENT = 1.0


class Interrupted(RuntimeError):  # noqa: N818 - an ending, like KeyboardInterrupt
    """The training ended early, on a signal, with its state saved where checkpoints are kept."""


class Notice:
    """Whether this process has been told to end.

    Attributes:
        received: Name of the first signal; None while there was none.
    """

    def __init__(self):
        self.received: str | None = None
        self.since = 0.0

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self.since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > IMPATIENT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)


@contextmanager
def heed_signals() -> Iterator[Notice]:
    """Take note of SIGTERM, SIGUSR1, SIGINT and SIGHUP, which would otherwise end the process at once."""
    notice = Notice()
    heeded = [s for s in SIGNALS if not (s.name in IGNORABLE and signal.getsignal(s) == signal.SIG_IGN)]
    before = {number: signal.signal(number, notice._receive) for number in heeded}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
