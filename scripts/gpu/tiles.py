"""Triton kernels with tiles that are chosen by timing: found in the package without naming one."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

_PACKAGE = "kernelwarehouse."


def tuned_kernels() -> list[Any]:
    """The kernels of the package's modules, as far as they are imported, that Triton would time tiles for."""
    autotuner = getattr(sys.modules.get("triton.runtime"), "Autotuner", None)
    if autotuner is None:
        return []
    modules = [module for name, module in sys.modules.items() if name.startswith(_PACKAGE) and module is not None]
    found = {id(v): v for module in modules for v in vars(module).values() if isinstance(v, autotuner)}
    return list(found.values())


@contextlib.contextmanager
def one_tile(number: int) -> Iterator[None]:
    """Let each kernel have only that one of its tiles, counted round, so that none is timed."""
    kernels = tuned_kernels()
    before = [kernel.configs for kernel in kernels]
    for kernel, configs in zip(kernels, before, strict=True):
        kernel.configs = [configs[number % len(configs)]]
    try:
        yield
    finally:
        for kernel, configs in zip(kernels, before, strict=True):
            kernel.configs = configs


def most_tiles() -> int:
    """Of any kernel; 1 where there is none."""
    return max((len(kernel.configs) for kernel in tuned_kernels()), default=1)


def is_too_large(error: BaseException) -> bool:
    """Whether Triton says that a tile does not fit on the GPU."""
    return type(error).__name__ == "OutOfResources"
