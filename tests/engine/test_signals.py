"""What becomes of signals while a training heeds them."""

import os
import signal
import time

import pytest

from kernelwarehouse.engine import signals
from kernelwarehouse.engine.signals import heed_signals

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that a signal can end")


def status_of(work):
    """How a process ends that does something: 0 for what returns, or minus the number of a signal."""
    pid = os.fork()
    if pid == 0:
        os.close(2)  # a traceback would be pytest's
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_is_noted_and_its_handler_restored(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with heed_signals() as notice:
        assert notice.received is None
        send(number)
        assert notice.received == name
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_what_nohup_and_shells_let_a_process_ignore_stays_ignored(name):
    def work():
        signal.signal(getattr(signal, name), signal.SIG_IGN)
        with heed_signals() as notice:
            send(getattr(signal, name))
            if notice.received is None:
                send(signal.SIGKILL)

    assert status_of(work) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("first", "wait", "second", "status"),
    [
        ("SIGINT", 0.0, "SIGINT", 0),  # a launcher passes on what its group got from the terminal
        ("SIGINT", 0.1, "SIGINT", -signal.SIGINT),
        ("SIGTERM", 0.1, "SIGINT", -signal.SIGINT),
        ("SIGINT", 0.1, "SIGTERM", 0),
        ("SIGTERM", 0.1, "SIGTERM", 0),
    ],
)
def test_a_second_interrupt_of_a_user_who_will_not_wait_ends_the_process(monkeypatch, first, wait, second, status):
    monkeypatch.setattr(signals, "IMPATIENT", 0.05)

    def work():
        with heed_signals() as notice:
            send(getattr(signal, first))
            time.sleep(wait)
            send(getattr(signal, second))
            if notice.received != first:
                os._exit(7)

    assert status_of(work) == status
