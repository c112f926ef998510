"""What mmdetection and its libraries need on a current Python and PyTorch, beside the operators of the bridge."""

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from packaging.specifiers import SpecifierSet

# What mmdet 3.3 accepts, and the mmengine whose functions are replaced below.
VERSIONS = {"mmcv": ">=2.0.0rc4,<2.2", "mmengine": ">=0.10,<1", "mmdet": ">=3.3,<3.4"}
INSTALL = "pip install mmdet==3.3.0 mmengine==0.10.7 mmcv-lite==2.1.0"


@cache
def prepare() -> None:
    """Check the versions, then adapt mmengine; once in a process, and before mmdet is imported.

    Raises:
        ImportError: mmdet, mmengine or mmcv is missing or has an unsuitable version; the message says what to install.
    """
    check_versions()
    if find_spec("pkg_resources") is None:
        _replace("mmengine.utils.package_utils", "is_installed", is_installed)
        _replace("mmengine.utils.package_utils", "get_installed_path", get_installed_path)
    if not hasattr(pkgutil, "find_loader"):
        _replace("mmengine.utils.dl_utils.misc", "mmcv_full_available", mmcv_full_available)
    from .checkpoints import admit_logs, guard_loaders  # which import mmengine

    admit_logs()
    guard_loaders()


def check_versions() -> None:
    """Compare the versions of mmcv, mmengine and mmdet with `VERSIONS`.

    Raises:
        ImportError: One is missing or outside of its range.
    """
    for name, accepted in VERSIONS.items():
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"detection needs {name}, which is not installed: {INSTALL}", name=name)
        version = _version(name)
        if not SpecifierSet(accepted).contains(version, prereleases=True):
            raise ImportError(
                f"detection needs {name} {accepted}, and {name} {version} is installed: "
                f"pip uninstall {name}{' mmcv-lite' if name == 'mmcv' else ''}; {INSTALL}",
                name=name,
            )


def _version(name: str) -> str:
    """The version as mmdet will see it; of mmdet itself, which checks when it is imported, as it was installed."""
    return metadata.version(name) if name == "mmdet" else importlib.import_module(name).__version__


def is_installed(package: str) -> bool:
    """mmengine's function of this name, which asks pkg_resources: is there such a package or module?"""
    return _find_module(package) is not None


def get_installed_path(package: str) -> str:
    """mmengine's function of this name, which asks pkg_resources: the folder of a package's module.

    Raises:
        PackageNotFoundError: It is not installed.
    """
    module = _find_module(package)
    if module is None:
        raise metadata.PackageNotFoundError(package)
    return os.path.dirname(module)


def _find_module(package: str) -> str | None:
    """The file of a package's module, which may be called otherwise, as mmseg of mmsegmentation is."""

    def names() -> Iterator[str]:
        yield package
        with suppress(metadata.PackageNotFoundError):
            distribution = metadata.distribution(package)
            yield from (distribution.read_text("top_level.txt") or "").split()  # which not every wheel has
            yield from (file.parts[0] for file in distribution.files or () if file.parts[1:] == ("__init__.py",))

    return next((spec.origin for spec in map(find_spec, names()) if spec and spec.origin), None)


def mmcv_full_available() -> bool:
    """mmengine's function of this name, which asks what Python 3.14 lacks: is there an `mmcv._ext`?"""
    return find_spec("mmcv") is not None and find_spec("mmcv._ext") is not None


def _replace(owner: str, name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of mmengine's, in every module of it that holds it."""
    original = getattr(importlib.import_module(owner), name)
    for module in [m for key, m in sys.modules.items() if key.split(".")[0] == "mmengine"]:
        if vars(module).get(name) is original:
            setattr(module, name, function)
