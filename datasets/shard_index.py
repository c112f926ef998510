"""The index of shards: where in which tar file each image begins; read, and checked before it is used."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..configs.schema import ConfigError
from .folders import printable

BLOCK = 512  # of a tar file: a header has one, and what follows begins at the next
KINDS = {"U": "text", "S": "bytes", "i": "whole numbers", "u": "whole numbers"}


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Arrays of an index; each has a line for each class, for each tar file or for each image.

    Attributes:
        classes: Names of the classes.
        files: Names of the tar files, which lie beside the index.
        file_sizes: Their bytes.
        names: Names of the images, in the file system's bytes.
        targets: Their classes.
        shards: Their tar files.
        offsets: Where in those they begin.
        sizes: Their bytes.
    """

    classes: np.ndarray
    files: np.ndarray
    file_sizes: np.ndarray
    names: np.ndarray
    targets: np.ndarray
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


TEXTS = {"classes": "U", "files": "U", "names": "SU"}


def read_index(path: Path) -> ShardIndex:
    """Read the index of shards.

    Raises:
        ConfigError: It is damaged, or its arrays do not fit each other; the message names the array.
    """
    try:
        with np.load(path) as content:
            arrays = {field.name: content[field.name] for field in fields(ShardIndex)}
    except Exception as e:  # a damaged archive may make zlib or numpy raise anything
        _refuse(path, f"cannot be read ({e!r})")
    index = ShardIndex(**arrays)
    for name, array in arrays.items():
        kinds = TEXTS.get(name, "iu")
        if array.ndim != 1 or array.dtype.kind not in kinds:
            wanted = " or ".join(dict.fromkeys(KINDS[kind] for kind in kinds))
            _refuse(path, f"'{name}' must be a list of {wanted}; it has the shape {array.shape} of {array.dtype}")
    images = len(index.targets)
    for name, like, count in (
        *((name, "targets", images) for name in ("names", "shards", "offsets", "sizes")),
        ("file_sizes", "files", len(index.files)),
    ):
        if len(arrays[name]) != count:
            _refuse(path, f"'{name}' has {len(arrays[name])} entries, '{like}' has {count}")
    for name in ("targets", "classes", "files"):
        if not len(arrays[name]):
            _refuse(path, f"'{name}' is empty")
    for name in ("classes", "files"):
        if len(set(arrays[name].tolist())) != len(arrays[name]):
            _refuse(path, f"'{name}' has a name twice")
    for name in index.files.tolist():
        if name != Path(name).name or not name.endswith(".tar") or set(name) & set("\0\\"):
            _refuse(path, f"'files' must name tar files beside the index; found {name!r}")
    _check_range(path, index, "targets", 0, len(index.classes) - 1)
    _check_range(path, index, "shards", 0, len(index.files) - 1)
    _check_range(path, index, "file_sizes", 0, 2**62)
    ends = index.file_sizes.astype(np.int64)[index.shards]
    _check_range(path, index, "offsets", BLOCK, ends)
    _check_range(path, index, "sizes", 0, ends - index.offsets.astype(np.int64))
    if len(odd := index.offsets[index.offsets % BLOCK != 0]):
        _refuse(path, f"'offsets' must be multiples of {BLOCK}, as in any tar file; found {odd[0]}")
    return index


def _check_range(path: Path, index: ShardIndex, name: str, low: int, high: int | np.ndarray) -> None:
    array = getattr(index, name)
    wrong = np.flatnonzero((array < low) | (array > high))
    if len(wrong):
        limit = high if isinstance(high, int) else high[wrong[0]]
        _refuse(path, f"'{name}' must be from {low} to {limit}; entry {wrong[0]} is {array[wrong[0]]}")


def _refuse(path: Path, what: str) -> NoReturn:
    raise ConfigError(f"{printable(path)}: {what}; scripts/make_shards.py writes the index and its shards")
