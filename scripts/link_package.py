"""Used by `pip install -e`: lets this folder, whatever it is called, be imported as the package of the project's name.

The folder's own name cannot be the package's, and a finder in Python could not be followed by editors and type
checkers. So one link, in a folder that git ignores and that is put on Python's path, leads back to the checkout.
"""

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = ".editable"  # as in pyproject.toml, dev-mode-dirs


class LinkPackage(BuildHookInterface):
    """Makes the link when hatchling prepares an editable install; does nothing for a wheel."""

    def initialize(self, version: str, _build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds; `version` says what for."""
        if version == "editable":
            link_package(Path(self.root), self.metadata.core.name)


def link_package(root: Path, name: str) -> None:
    """Make ROOT/.editable/NAME a link to ROOT, if it is not there already.

    Raises:
        OSError: The system makes no links for this user; Windows needs its developer mode for them.
    """
    link = root / FOLDER / name
    if link.exists() and link.samefile(root):
        return
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(os.pardir, target_is_directory=True)
    except OSError as e:
        raise OSError(f"{link} cannot link to {root}: {e}; on Windows, turn on the developer mode") from e


if __name__ == "__main__":
    link_package(Path(__file__).resolve().parents[1], sys.argv[1])
