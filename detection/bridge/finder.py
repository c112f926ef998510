"""Where Python looks last for `mmcv._ext`."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .missing import missing_operator
from .operators import OPERATORS

EXTENSION = "mmcv._ext"


class BridgeFinder(MetaPathFinder, Loader):
    """Finds and loads the stand-in for `mmcv._ext`."""

    def find_spec(self, fullname: str, *_where: Any) -> ModuleSpec | None:
        """Answer for `mmcv._ext` and nothing else."""
        return ModuleSpec(fullname, self, origin=__name__) if fullname == EXTENSION else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module; names that it lacks become operators that raise when they are called."""
        vars(module).update(OPERATORS, __getattr__=missing_operator)


def install() -> None:
    """Let `mmcv._ext` be found, after every other finder has been asked; a second call changes nothing."""
    if not any(isinstance(finder, BridgeFinder) for finder in sys.meta_path):
        sys.meta_path.append(BridgeFinder())
