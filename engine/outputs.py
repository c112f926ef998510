"""Where a run writes: every place is tried before the work starts, and a write that fails later says which it was."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase

from ..configs.schema import ConfigError, RunConfig
from .distributed import World


class SaveError(OSError):
    """Something that could not be written; what was written before is as it was."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an error of writing to `path`, such as on a full disk, into a SaveError that names it."""
    try:
        yield
    except OSError as e:
        raise SaveError(f"{path}: could not be written: {e.strerror or e}") from e


def check_outputs(run: RunConfig, world: World) -> None:
    """Try every folder and file that the main process of `run` is going to write; folders are made.

    Raises:
        ConfigError: One of them cannot be written; on all processes.
    """
    problem = None
    if world.is_main:
        try:
            for field in ("output_dir",) if run.eval else ("output_dir", "log_dir"):
                if folder := getattr(run, field):
                    _try_folder(field, Path(folder))
            for name in ("log.txt", "eval.json" if run.eval else "config.json") if run.output_dir else ():
                check_file("field 'output_dir'", Path(run.output_dir, name), regular=True)
            for field in ("per_class", "predictions", "confusion") if run.eval else ():
                if file := getattr(run, field):
                    (check_picture if field == "confusion" else check_file)(f"field '{field}'", Path(file))
        except ConfigError as e:
            problem = str(e)
    if problem := world.gather(problem)[0]:
        raise ConfigError(problem)


def check_file(name: str, path: Path, regular: bool = False) -> None:
    """Make sure that a file can be written; one that is there stays as it is.

    Args:
        name: Who asks for it, for the message.
        path: The file.
        regular: Whether it is read again, as a pipe or a device cannot be.

    Raises:
        ConfigError: It cannot.
    """
    try:
        new = not path.exists()
        if regular and not new and not path.is_file():
            raise ConfigError(f"{name}: {path} is no file; move it away, or name another folder")
        # Without waiting for a reader, where it is a pipe that has none.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666))
        if new:
            path.unlink()
    except OSError as e:
        raise ConfigError(f"{name}: {path} cannot be written: {e.strerror or e}") from e


def check_picture(name: str, path: Path) -> None:
    """Make sure that a picture can be written, in a format that its name ends with; see `check_file`.

    Raises:
        ConfigError: It cannot, or there is no such format.
    """
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ConfigError(f"{name}: {path} must end with the name of a picture's format, such as .png, .pdf or .svg")
    check_file(name, path)


def _try_folder(field: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise ConfigError(f"field '{field}': {path} cannot be written: {e.strerror or e}") from e
