"""Being told to end: the signals by which SLURM, torchrun and spot machines announce it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# sysexits.h: a temporary failure, the user is invited to try again.
EXIT_INTERRUPTED = 75
# Windows has no SIGUSR1, nor anything that would send it.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(RuntimeError):  # noqa: N818 - an ending, like KeyboardInterrupt
    """The training ended early, on a signal, with its state saved where checkpoints are kept."""


class Notice:
    """Whether this process has been told to end.

    Attributes:
        received: Name of the signal; None while there was none.
    """

    def __init__(self):
        self.received: str | None = None

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name


@contextmanager
def heed_signals() -> Iterator[Notice]:
    """Take note of SIGTERM and SIGUSR1, which would otherwise end the process at once."""
    notice = Notice()
    before = {number: signal.signal(number, notice._receive) for number in SIGNALS}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
