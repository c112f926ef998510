"""Lines for whoever reads them: on standard output and standard error, which may be full, or closed by now."""

import errno
import os
import sys
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm

from .outputs import SaveError


def say(text: str) -> None:
    """Print a line, above the progress bar if there is one. A terminal that has been closed needs none.

    Raises:
        SaveError: Standard output cannot be written, such as a file on a full disk.
    """
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError as e:
        _to_nowhere(sys.stdout)
        if e.errno != errno.EIO:
            raise SaveError(f"standard output: could not be written: {e.strerror or e}") from e


def complain(text: str) -> None:
    """Print a line on standard error, if that can be."""
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")


def flush_errors() -> None:
    """Let Python end with the exit status that was chosen, also when standard error cannot take what is left for it."""
    try:
        sys.stderr.flush()
    except OSError:
        _to_nowhere(sys.stderr)


def _to_nowhere(stream: TextIO) -> None:
    """Let all that is written, and what could not be written before, vanish."""
    with suppress(OSError):  # a stand-in of a test's has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
