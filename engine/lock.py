"""One training to a folder: a lock that the kernel releases when its process ends, in whatever way."""

import errno
import importlib
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..configs.schema import ConfigError
from .distributed import World
from .outputs import LOCK, SaveError
from .signals import Interrupted, Notice
from .terminal import say

# Seconds that another training is given to end: a process that is told to end finishes its step and saves it.
WAIT = 30.0
# Descriptors of the locks that this process has.
_held: set[int] = set()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl, msvcrt = _module("fcntl"), _module("msvcrt")  # the latter on Windows
TAKEN = (BlockingIOError, PermissionError)


def _lock(file: int) -> None:
    """Lock an open file; one of the errors TAKEN says that another process has it locked."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt:
        os.lseek(file, 2**30, os.SEEK_SET)  # what is locked cannot be read, and the holder's name is to be
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@contextmanager
def locked(folder: str, world: World, notice: Notice) -> Iterator[None]:
    """Let no other training write to a folder. The main process has the lock, and all of them hear of its outcome.

    Args:
        folder: Which, and it exists; empty for none.
        world: This process's place.
        notice: Says whether the process has been told to end, while it waits for another to end.

    Raises:
        ConfigError: Another training still writes there after `WAIT` seconds.
        Interrupted: A signal ended the wait.
    """
    file = error = None
    path = Path(folder, LOCK)
    if folder and world.is_main:
        try:
            file = _wait(path, notice)
        except (ConfigError, Interrupted, SaveError) as e:
            error = e
    try:
        if error := world.gather(error)[0]:
            raise error
        yield
    finally:
        if file is not None:
            with suppress(OSError):  # Windows deletes no open file, nor anybody one on what has become read-only
                path.unlink()
            _close(file)


def _wait(path: Path, notice: Notice) -> int:
    """Lock a file, which is made if need be, as soon as no other process has it locked; return its descriptor."""
    end, told = time.monotonic() + WAIT, False
    while (file := _try(path)) is None:
        holder = "another process"
        with suppress(OSError):  # which has just ended and deleted the file
            holder = path.read_text(encoding="utf-8", errors="replace") or holder
        if notice.received:
            raise Interrupted("told to end by a signal")
        if time.monotonic() > end:
            raise ConfigError(
                f"field 'output_dir': {path.parent} is in use by {holder}, which trains there; wait for its end, or "
                "pass another --output_dir"
            )
        if not told:
            say(f"{path.parent} is in use by {holder}; waiting for up to {WAIT:g} s for its end")
            told = True
        time.sleep(0.05)
    with suppress(OSError):  # a full disk: the name is for the messages of others
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    return file


def _try(path: Path) -> int | None:
    """Open and lock a file; None where another process has it locked. A file system without locks is a warning."""
    file = _open(path, os.O_RDONLY)  # what is open for writing keeps a file system from becoming read-only
    try:
        try:
            _lock(file)
        except OSError as e:
            if e.errno != errno.EBADF:
                raise
            _close(file)
            file = _open(path, os.O_RDWR)  # as NFS wants it
            _lock(file)
        if os.path.samestat(os.fstat(file), path.stat()):
            return file
    except (*TAKEN, FileNotFoundError):
        pass
    except OSError as e:
        warnings.warn(
            f"{path.parent}: this file system has no locks ({e.strerror or e}): make sure that no other training "
            "writes there",
            stacklevel=5,
        )
        return file
    _close(file)  # it is locked, or whoever had it locked has deleted it
    return None


def _open(path: Path, access: int) -> int:
    try:
        file = os.open(path, access | os.O_CREAT, 0o666)
    except OSError as e:
        raise ConfigError(f"field 'output_dir': {path} cannot be opened: {e.strerror or e}") from e
    _held.add(file)
    return file


def _close(file: int) -> None:
    _held.discard(file)
    os.close(file)


def _leave_to_parent() -> None:
    """A forked process, such as a loader's worker, must not keep the lock of a parent that has died."""
    for file in _held:
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
