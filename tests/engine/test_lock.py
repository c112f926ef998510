"""Only one training writes to a folder, and nothing is left of a lock when its process has ended."""

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.engine import Interrupted, lock, train_run
from kernelwarehouse.engine.lock import locked
from kernelwarehouse.engine.signals import Notice


def hold(folder, cpu, ready, seconds=60.0, then=lambda: None):
    with locked(str(folder), cpu, Notice()):
        then()
        ready.set()
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path, cpu):
    """A function that lets another process lock the folder, and returns that process."""
    context, started = multiprocessing.get_context("fork"), []

    def start(**options):
        ready = context.Event()
        started.append(context.Process(target=hold, args=(tmp_path, cpu, ready), kwargs=options))
        started[-1].start()
        assert ready.wait(60)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_folder_in_use_is_refused_after_a_wait(tmp_path, cpu, holder, monkeypatch, capsys):
    monkeypatch.setattr(lock, "WAIT", 0.2)
    process = holder()
    message = rf"'output_dir': {tmp_path} is in use by process {process.pid} on .*, which trains there; .*--output_dir"
    with pytest.raises(ConfigError, match=message), locked(str(tmp_path), cpu, Notice()):
        pass
    assert capsys.readouterr().out.count("waiting for up to 0.2 s") == 1


def test_a_training_refuses_a_folder_in_use_and_changes_nothing(tmp_path, cpu, holder, monkeypatch, tiny_config):
    monkeypatch.setattr(lock, "WAIT", 0.2)
    holder()
    with pytest.raises(ConfigError, match="is in use by"):
        train_run(tiny_config(output_dir=str(tmp_path)), cpu)
    assert os.listdir(tmp_path) == ["train.lock"]


def test_a_predecessor_that_ends_is_waited_for(tmp_path, cpu, holder):
    holder(seconds=0.3)
    with locked(str(tmp_path), cpu, Notice()):
        assert (tmp_path / "train.lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not os.listdir(tmp_path)


def test_a_killed_process_has_no_lock_though_a_child_of_it_lives_on(tmp_path, cpu, holder, monkeypatch):
    """As a loader's worker does for some seconds."""
    read, write = os.pipe()

    def leave_a_child():
        if os.fork() == 0:
            os.write(write, f"{os.getpid()}\n".encode())
            signal.pause()

    process = holder(then=leave_a_child)
    child = int(os.read(read, 20))
    try:
        process.kill()
        process.join()  # with a limit, it would wait for the child too
        monkeypatch.setattr(lock, "WAIT", 0.0)
        with locked(str(tmp_path), cpu, Notice()):
            os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_a_signal_ends_the_wait(tmp_path, cpu, holder):
    holder()
    notice = Notice()
    notice.received = "SIGTERM"
    with pytest.raises(Interrupted), locked(str(tmp_path), cpu, notice):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, cpu, monkeypatch):
    def no_locks(file):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock, "_lock", no_locks)
    warned = pytest.warns(UserWarning, match=r"no locks \(No locks available\): make sure that no other")
    with warned, locked(str(tmp_path), cpu, Notice()):
        pass


def test_a_file_system_that_locks_only_what_is_open_for_writing(tmp_path, cpu, monkeypatch, recwarn):
    """As NFS does."""
    fcntl = pytest.importorskip("fcntl")
    real, refused = lock._lock, []

    def lock_writable(file):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            refused.append(file)
            raise OSError(9, "Bad file descriptor")
        real(file)

    monkeypatch.setattr(lock, "_lock", lock_writable)
    with locked(str(tmp_path), cpu, Notice()):
        assert len(refused) == 1
    assert not recwarn.list


def test_windows_locks_a_byte_beyond_the_name(tmp_path, cpu, holder, monkeypatch):
    """By a stand-in."""
    fcntl = pytest.importorskip("fcntl")

    def locking(file, mode, size):
        assert (mode, size) == ("no waiting", 1)
        assert os.lseek(file, 0, os.SEEK_CUR) > 1000
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(13, "Permission denied") from None

    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK="no waiting"))
    monkeypatch.setattr(lock, "WAIT", 0.1)
    process = holder()
    refused = pytest.raises(ConfigError, match=f"in use by process {process.pid} on ")
    with refused, locked(str(tmp_path), cpu, Notice()):
        pass
    process.kill()
    process.join()
    with locked(str(tmp_path), cpu, Notice()):
        pass


def test_other_processes_do_not_lock_and_hear_of_the_outcome(tmp_path):
    refused = SimpleNamespace(is_main=False, gather=lambda mine: [ConfigError("in use"), mine])
    with pytest.raises(ConfigError, match="in use"), locked(str(tmp_path), refused, Notice()):
        pass
    assert not os.listdir(tmp_path)


def test_without_a_folder_there_is_nothing_to_lock(cpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with locked("", cpu, Notice()):
        assert not os.listdir(tmp_path)
