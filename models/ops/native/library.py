"""The library of the C++ files, and calls of its functions."""

import ctypes
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .build import NativeError, built, instructions

_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
_SUMS = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
_ARGUMENTS = {int: ctypes.c_int64, float: ctypes.c_double}


@torch.compiler.assume_constant_result
def can_run(device: str, dtype: torch.dtype, warn: bool = False) -> bool:
    """Whether tensors of a type on a type of device can be computed with; if not, a warning can say why, once."""
    obstacle = _obstacle(device, dtype)
    if warn and obstacle:
        _warn_once(f"implementation 'native' gives way to others, slower on a CPU: {obstacle}")
    return obstacle is None


def use_tiles(wanted: bool = True) -> bool:
    """Multiply bfloat16 in tiles (AMX) from now on, or not; return whether it does.

    They are used by default where the processor has them and the system grants them. Products in them are up to 30
    times as fast as in registers.
    """
    return bool(library().allow_tiles(wanted))


@functools.cache
def _obstacle(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"it runs on a CPU, not on {device!r}"
    if dtype not in _TYPES:
        return f"it computes in {', '.join(map(str, _TYPES))}, not in {dtype}"
    if dtype == torch.bfloat16 and "avx512_bf16" not in instructions():
        return "the processor has no AVX512-BF16"
    try:
        library()
    except NativeError as error:
        return str(error)
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """What products of images of a type are summed in, and the type of cells and their gradients."""
    return _SUMS.get(dtype, dtype)


def call(
    function: str,
    sizes: Sequence[ctypes.Array | int | float],
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype | None = None,
) -> None:
    """Run a function of the library for a type, with torch's number of threads.

    Args:
        function: Its name, without the type.
        sizes: What the C++ function takes before the threads.
        tensors: What it takes after them: contiguous, or given as the memory that is written.
        dtype: The type; that of the first tensor by default.
    """
    run = _function(function, dtype or next(tensor.dtype for tensor in tensors if tensor is not None))
    if run.argtypes is None:
        run.argtypes = [_ARGUMENTS.get(type(size), ctypes.c_void_p) for size in (*sizes, 1)]
        run.argtypes += [ctypes.c_void_p] * len(tensors)
    run(*sizes, torch.get_num_threads(), *[None if tensor is None else tensor.data_ptr() for tensor in tensors])


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    """A function of the library; ctypes has no public name for its class."""
    return library()[f"{name}_{_TYPES[dtype]}"]


@functools.cache
def library() -> ctypes.CDLL:
    """The library as `built` finds it, loaded.

    Raises:
        NativeError: There is none, or none that can be loaded.
    """
    with built() as path:
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeError(f"it could not be loaded ({error})") from error
    loaded.allow_tiles(True)
    return loaded
