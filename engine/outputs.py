"""Where a run writes: every place is tried before the work starts, and a write that fails later says which it was."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase

from ..configs.schema import ConfigError, RunConfig
from .distributed import World

LOCK = "train.lock"
KEPT = ("config.json", "log.txt", LOCK)  # what a training keeps in its folder beside checkpoints
UNABLE = (errno.EINVAL, errno.ENOTSUP)  # the answers of file systems that cannot make a folder durable


class SaveError(OSError):
    """Something that could not be written; what was written before is as it was."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an error of writing to `path`, such as on a full disk, into a SaveError that names it."""
    try:
        yield
    except OSError as e:
        raise SaveError(f"{path}: could not be written: {e.strerror or e}") from e


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write to, which then takes its place: `path` is whole at every moment.

    Raises:
        SaveError: It cannot be written, such as on a full disk; `path` is then as it was before.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as e:
        raise SaveError(f"{path}: could not be written, and is as it was before: {e.strerror or e}") from e
    finally:
        with suppress(OSError):  # on a file system that has become read-only
            temporary.unlink(missing_ok=True)
    with writing(path):
        _sync_folder(path.parent)


@contextmanager
def report(path: str | Path) -> Iterator[Path]:
    """Give what to write to so that `path`, which a user has named, becomes a report: see `replacing`.

    The target of a link is replaced; what is no file, such as /dev/stdout, is written to itself.

    Raises:
        SaveError: It cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with writing(path):
            yield target
    else:
        with replacing(target) as temporary:
            yield temporary


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
            if run.output_dir:
                _try_kept(Path(run.output_dir), ("eval.json",) if run.eval else KEPT)
            for field in ("per_class", "predictions", "confusion") if run.eval else ():
                if file := getattr(run, field):
                    (check_picture if field == "confusion" else check_file)(f"field '{field}'", Path(file))
        except ConfigError as e:
            problem = str(e)
    if problem := world.gather(problem)[0]:
        raise ConfigError(problem)


def check_file(name: str, path: Path) -> None:
    """Make sure that a file can be written; one that is there stays as it is.

    Args:
        name: Who asks for it, for the message.
        path: The file.

    Raises:
        ConfigError: It cannot.
    """
    if path.is_fifo():  # to try it would tell its reader that all has been written
        return
    try:
        if path.exists():
            path.open("ab").close()
        if not path.exists() or path.is_file():  # a device is written to itself, a file is replaced
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
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


def _try_kept(folder: Path, names: tuple[str, ...]) -> None:
    """Try what lies where a run keeps files under names of its own."""
    kept = [folder / name for name in names]
    for path in (*kept, *sorted(folder.glob("checkpoint-*.pth"))):
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no file"
            raise ConfigError(f"field 'output_dir': {path} is {kind}, where the run keeps a file; move it away")
    for path in kept:
        try:
            path.open("r+b").close()
        except FileNotFoundError:
            continue
        except OSError as e:
            raise ConfigError(f"field 'output_dir': {path} cannot be read and written: {e.strerror or e}") from e


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder durable."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders, and keeps names in a journal
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in UNABLE:
            raise
    finally:
        os.close(descriptor)
