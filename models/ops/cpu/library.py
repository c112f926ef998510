"""The library of the C++ files, and calls of its functions."""

import ctypes
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .build import BuildError, built

_TYPES = {torch.float32: "float", torch.float64: "double"}
_ARGUMENTS = {int: ctypes.c_int64, float: ctypes.c_double}


@torch.compiler.assume_constant_result
def unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Why tensors of a type on a type of device cannot be computed with here; None if they can.

    A library that cannot be built is warned of once, when it is first asked for.
    """
    return _unavailable(device, dtype)


@functools.cache
def _unavailable(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"the C++ runs on a CPU, not on {device!r}"
    if dtype not in _TYPES:
        return f"the C++ computes in {' and '.join(map(str, _TYPES))}, not in {dtype}"
    return _build_error()


@functools.cache
def _build_error() -> str | None:
    try:
        library()
    except BuildError as error:
        warnings.warn(f"layers are computed without C++, which is slower on a CPU: {error}", stacklevel=2)
        return str(error)
    return None


def call(function: str, sizes: Sequence[ctypes.Array | int | float], tensors: Sequence[Tensor | None]) -> None:
    """Run a function of the library for the type of the first tensor, with torch's number of threads.

    Args:
        function: Its name, without the type.
        sizes: What the C++ function takes before the threads.
        tensors: What it takes after them: contiguous, or given as the memory that is written.
    """
    run = _function(function, next(tensor.dtype for tensor in tensors if tensor is not None))
    if run.argtypes is None:
        run.argtypes = [_ARGUMENTS.get(type(size), ctypes.c_void_p) for size in (*sizes, 1)]
        run.argtypes += [ctypes.c_void_p] * len(tensors)
    run(*sizes, torch.get_num_threads(), *[None if tensor is None else tensor.data_ptr() for tensor in tensors])


def in_memory(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Tensors of a type that fill their memory, as the library reads them."""
    # Nearly always they are so already, and asking costs a tenth of converting.
    return [t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous() for t in tensors]


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    """A function of the library; ctypes has no public name for its class."""
    return library()[f"{name}_{_TYPES[dtype]}"]


@functools.cache
def library() -> ctypes.CDLL:
    """The library as `built` finds it, loaded.

    Raises:
        BuildError: There is none, or none that can be loaded.
    """
    with built() as path:
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"it could not be loaded ({error})") from error
