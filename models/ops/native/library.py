"""The C++ files as one library, compiled by GCC on first use and kept for later processes."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
_SUMS = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
_ARGUMENTS = {int: ctypes.c_int64, float: ctypes.c_double}
_SOURCES, _HEADERS = (sorted(Path(__file__).parent.glob(pattern)) for pattern in ("*.cpp", "*.h"))
_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}
# OpenMP's and C's functions are those of the process: torch's threads work here too, and none but them.
# Pairs of bfloat16 are read as words, which strict aliasing forbids.
_FLAGS = ["-std=c++17", "-O3", "-fno-strict-aliasing", "-fopenmp", "-fno-exceptions", "-fno-rtti"]
_FLAGS += ["-fPIC", "-shared", "-nodefaultlibs"]


class NativeError(RuntimeError):
    """Why there is no library."""


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
    if dtype == torch.bfloat16 and not _multiplies_bfloat16():
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
    run = _function(function, dtype or tensors[0].dtype)
    if run.argtypes is None:
        run.argtypes = [_ARGUMENTS.get(type(size), ctypes.c_void_p) for size in (*sizes, 1)]
        run.argtypes += [ctypes.c_void_p] * len(tensors)
    run(*sizes, torch.get_num_threads(), *[None if tensor is None else tensor.data_ptr() for tensor in tensors])


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    return library()[f"{name}_{_TYPES[dtype]}"]


@functools.cache
def library() -> ctypes.CDLL:
    """Load the library, and compile it first if no process of this machine and user did.

    It is kept in `TORCH_EXTENSIONS_DIR`, by default ~/.cache/torch_extensions, under a name made from its sources and
    how they are compiled. The compiler is `CXX`, by default g++.

    Raises:
        NativeError: A processor without the instructions, no compiler, or one that fails.
    """
    command = [*shlex.split(os.environ.get("CXX") or "g++"), *_FLAGS, *_instructions()]
    key = hashlib.sha256("\0".join(command).encode())
    for source in _SOURCES + _HEADERS:
        key.update(source.read_bytes())
    name = f"native_{key.hexdigest()[:16]}.so"
    command += map(str, _SOURCES)
    folder = _folder()
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            _compile(command, Path(temporary) / name)
            return _load(Path(temporary) / name)
    if not (folder / name).exists():
        _compile(command, folder / name)
    return _load(folder / name)


def _folder() -> Path | None:
    """Where libraries are kept, or None if nothing can be kept there."""
    try:
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
        folder = folder / "kernelwarehouse"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where there is no home
        return None
    return folder if os.access(folder, os.W_OK) else None


def _instructions() -> list[str]:
    if platform.system() != "Linux":
        raise NativeError(f"it is compiled on Linux, not on {platform.system()}")
    if platform.machine() == "aarch64":
        return []
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _INSTRUCTIONS:
        raise NativeError(f"the processor needs {' or '.join(_INSTRUCTIONS)}, and torch found {capability}")
    pairs, tiles = _multiplies_bfloat16(), torch.cpu._is_amx_tile_supported()
    return _INSTRUCTIONS[capability] + ["-mavx512bf16"] * pairs + ["-DTILES"] * (pairs and tiles)


def _multiplies_bfloat16() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def _compile(command: list[str], path: Path) -> None:
    if shutil.which(command[0]) is None:
        raise NativeError(f"no compiler {command[0]!r} was found; install GCC (g++), or name it in CXX")
    partial = path.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
    if done.returncode:
        partial.unlink(missing_ok=True)
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise NativeError(f"{command[0]} could not compile it ({lines[0].strip()}); it takes GCC 10 or later")
    os.replace(partial, path)  # whole or not at all: other processes may be looking for it


def _load(path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"it could not be loaded ({error})") from error
    loaded.allow_tiles(True)
    return loaded
