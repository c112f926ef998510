"""Images kept in WebDataset shards: tar files, a few large ones in place of a million small ones.

The library writes them. They are read by random access, through an index of where in its tar file each image begins,
and not as a stream: so an epoch is a true permutation and has a known length, several processes evaluate each image
exactly once, and a training continues at the very image where it stopped, all as with files of their own.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from tarfile import TarFile
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from webdataset.writer import ShardWriter

from ..configs.schema import ConfigError
from .folders import ClassFolders, printable
from .shard_index import read_index

CLASS = ".cls"


class Shards:
    """The images in the shards ``<split>-*.tar`` of a folder, in the order of their index; a `Source`.

    Args:
        folder: Holds the shards and ``<split>-index.npz``.
        split: "train" or "val".

    Raises:
        ConfigError: No index, one that cannot be, or a shard that is not as it says; or the system is Windows.
    """

    def __init__(self, folder: Path, split: str):
        if not hasattr(os, "pread"):
            raise ConfigError("field 'data_set': WDS needs os.pread, which this system lacks; use image_folder there")
        self.root, index = folder, _index_file(folder, split)
        if not index.is_file():
            raise ConfigError(f"field 'data_path': no {index}; scripts/make_shards.py writes it beside the shards")
        self.index = read_index(index)
        self.classes = tuple(map(printable, self.index.classes))
        self.targets = self.index.targets
        self.files = [folder / name for name in self.index.files]
        self.states = [_state(file) for file in self.files]
        for file, state, size in zip(self.files, self.states, self.index.file_sizes, strict=True):
            found = state.size if state else "no"
            if found != size:
                raise ConfigError(f"{file}: {found} bytes, {index.name} says {size}; copy or write the shards again")

    def name(self, index: int) -> str:
        """The shard of an image and its name."""
        return printable(f"{self.files[self.index.shards[index]]}: {os.fsdecode(self.index.names[index])}")

    def read(self, index: int) -> bytes:
        """An image as it is stored.

        Raises:
            ConfigError: The shard has been written again since the index was read.
        """
        number = self.index.shards[index]
        path, state = self.files[number], self.states[number]
        file = _open(path, state)
        if _state(file.fileno()) != state:
            raise ConfigError(f"{path}: has been written again since its index was read")
        return os.pread(file.fileno(), int(self.index.sizes[index]), int(self.index.offsets[index]))


class State(NamedTuple):
    """What tells whether a file is another than before."""

    device: int
    inode: int
    size: int
    changed: int


def _state(file: Path | int) -> State | None:
    """The state of a file; None where there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    regular = stat.S_ISREG(status.st_mode)
    return State(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) if regular else None


def write_shards(
    source: ClassFolders,
    folder: Path,
    split: str,
    images_per_shard: int = 10_000,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> int:
    """Write the images of class folders as shards, byte for byte and in their order, and the index of these.

    Everything is written aside and moved into place when it is whole, the index last.

    Args:
        source: The images.
        folder: Where the shards go.
        split: "train" or "val".
        images_per_shard: How many images a shard holds at most.
        progress: Wraps the iteration over the images, to show it.

    Returns:
        The number of shards.

    Raises:
        ConfigError: The folder holds shards of this split already, or cannot be written; or shards without images.
    """
    if images_per_shard < 1:
        raise ConfigError(f"images_per_shard: must be at least 1; found {images_per_shard}")
    try:
        return _write_shards(source, folder, split, images_per_shard, progress)
    except OSError as e:
        where = printable(e.filename) if e.filename is not None else printable(folder)
        raise ConfigError(f"{where}: cannot be read or written: {e.strerror or e}") from e


def _write_shards(
    source: ClassFolders,
    folder: Path,
    split: str,
    images_per_shard: int,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> int:
    if present := sorted(folder.glob(f"{split}-*")):
        raise ConfigError(f"{present[0]} is there already; delete the {split} shards, or name another folder")
    aside = folder / f".{split}-unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with ShardWriter(str(aside / f"{split}-%06d.tar"), images_per_shard, maxsize=2**40, mtime=0, verbose=0) as writer:
        for i in progress(range(len(source.targets))):
            kind = Path(source.path(i)).suffix[1:].lower()
            writer.write({"__key__": f"{i:09d}", kind: source.read(i), "cls": int(source.targets[i])})
    files = sorted(aside.glob("*.tar"))
    fields = _locate(files)
    if not np.array_equal(fields["targets"], source.targets):
        raise ConfigError(f"{aside}: the shards do not read back as written")
    index = _index_file(aside, split)
    np.savez(index, classes=np.array(source.classes), names=source.paths, **fields)
    for file in (*files, index):
        file.replace(folder / file.name)
    aside.rmdir()
    return len(files)


def _locate(files: list[Path]) -> dict[str, Any]:
    """Where in which tar file the images are, and their classes."""
    shards, offsets, sizes, targets = [], [], [], []
    for number, file in enumerate(files):
        with file.open("rb") as stream, TarFile(fileobj=stream) as tar:
            for member in tar:
                if member.name.endswith(CLASS):
                    stream.seek(member.offset_data)
                    targets.append(int(stream.read(member.size)))
                else:
                    shards.append(number)
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
    return {
        "files": np.array([file.name for file in files]),
        "file_sizes": np.array([file.stat().st_size for file in files]),
        "shards": np.array(shards, dtype=np.int32),
        "offsets": np.array(offsets, dtype=np.int64),
        "sizes": np.array(sizes, dtype=np.int64),
        "targets": np.array(targets),
    }


def _index_file(folder: Path, split: str) -> Path:
    return folder / f"{split}-index.npz"


@lru_cache(maxsize=256)  # fewer than the files that a process may have open
def _open(file: Path, _state: State | None) -> BinaryIO:
    """A shard, opened anew when it has been written again."""
    return file.open("rb", buffering=0)
