"""Images kept as files, in one folder for each class."""

import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..configs.schema import ConfigError

# What systems, editors and file servers leave beside data, in lower case; and all whose name begins with a dot.
SYSTEM_FOLDERS = {
    "@eadir", "@recently-snapshot", "@recycle", "@sharebin", "@tmp", "#recycle", "#snapshot", "$recycle.bin",
    "__macosx", "__pycache__", "lost+found", "network trash folder", "recycler", "system volume information",
    "temporary items",
}  # fmt: skip


class ClassFolders:
    """The images in `root`, a folder with one folder per class, in the order of their names; a `Source`.

    Hidden and system folders, and hidden files, are none of the data. Links are followed.

    Args:
        root: The folder.

    Raises:
        ConfigError: No such folder, no class folder in it, one without images, or a folder or an image that cannot be
            listed or read as such.
    """

    def __init__(self, root: Path):
        if not os.path.isdir(root):
            raise ConfigError(f"field 'data_path': no folder {printable(root)}; expected one folder per class in it")
        folders = [entry.path for entry in _listed(root) if entry.is_dir()]
        if not folders:
            raise ConfigError(f"couldn't find any class folder in {printable(root)}; expected one for each class")
        found = [_images(folder) for folder in folders]
        if empty := [os.path.basename(folder) for folder, images in zip(folders, found, strict=True) if not images]:
            raise ConfigError(
                f"{printable(root)}: found no valid file for the classes {', '.join(map(printable, empty))}; supported "
                f"extensions are {', '.join(IMG_EXTENSIONS)}"
            )
        self.root, self.classes = root, tuple(printable(os.path.basename(folder)) for folder in folders)
        # Arrays, not lists: reading a million Python objects would copy their pages into every worker.
        self.targets = np.repeat(np.arange(len(found)), [len(images) for images in found])
        self.paths = np.array([os.fsencode(os.path.relpath(path, root)) for images in found for path in images])

    def name(self, index: int) -> str:
        """The path of an image, for people."""
        return printable(self.path(index))

    def path(self, index: int) -> str:
        """The path of an image."""
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def read(self, index: int) -> bytes:
        """An image as it is stored."""
        return Path(self.path(index)).read_bytes()


def printable(path: str | bytes | os.PathLike) -> str:
    """A path as text for any file and terminal: a byte that is not UTF-8, or a line break, becomes an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fsdecode(path))


def _listed(folder: str | os.PathLike) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, without what is hidden or a system's."""
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in SYSTEM_FOLDERS]
        for entry in visible:
            if entry.is_symlink() and not entry.name.lower().endswith(IMG_EXTENSIONS):
                os.stat(entry)  # which says what is wrong with a link that leads nowhere
    except OSError as e:
        where = printable(e.filename if e.filename is not None else folder)
        raise ConfigError(f"{where}: cannot be read: {e.strerror or e}") from e
    return sorted(visible, key=lambda entry: entry.name)


def _images(top: str) -> list[str]:
    """The images in a folder and in those within it; as torchvision orders them, by folder and then by name."""
    found: dict[str, list[str]] = {}
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(top, ())]
    while waiting:  # no recursion: folders lie deeper in each other than Python's calls may
        folder, above = waiting.pop()
        try:
            status = os.stat(folder)
        except OSError as e:
            raise ConfigError(f"{printable(folder)}: cannot be read: {e.strerror or e}") from e
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise ConfigError(f"{printable(folder)}: is a link to a folder that it lies in; delete it")
        found[folder] = []
        for entry in _listed(folder):
            if entry.is_dir():
                waiting.append((entry.path, (*above, here)))
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                if not entry.is_file():
                    raise ConfigError(f"{printable(entry.path)}: is not a file that can be read as an image; delete it")
                found[folder].append(entry.path)
    return [path for _, images in sorted(found.items()) for path in images]
