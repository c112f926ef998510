"""Images kept as files, in one folder for each class."""

import os
from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder

from ..configs.schema import ConfigError


class ClassFolders:
    """The images in `root`, a folder with one folder per class; a `Source`.

    Args:
        root: The folder.

    Raises:
        ConfigError: No such folder, no class folder in it, or one without images.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise ConfigError(f"field 'data_path': no folder {root}; expected one folder per class in it")
        try:
            found = ImageFolder(root)
        except FileNotFoundError as e:  # no class folder, or one without images
            raise ConfigError(f"{root}: {e}") from e
        self.root, self.classes = root, tuple(found.classes)
        # Arrays, not lists: reading a million Python objects would copy their pages into every worker.
        self.targets = np.array(found.targets)
        self.paths = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in found.samples])

    def name(self, index: int) -> str:
        """The path of an image."""
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def read(self, index: int) -> bytes:
        """An image as it is stored."""
        return Path(self.name(index)).read_bytes()
