"""`convolution.cpp` as a library, compiled by GCC on first use and kept for later processes."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCES = [Path(__file__).with_name(name) for name in ("convolution.cpp", "product.h")]
_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}
# OpenMP's and C's functions are those of the process: torch's threads work here too, and none but them.
_FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-fPIC", "-shared", "-nodefaultlibs"]


class NativeError(RuntimeError):
    """Why there is no library."""


@functools.cache
def library() -> ctypes.CDLL:
    """Load the library, and compile it first if no process of this machine and user did.

    It is kept in `TORCH_EXTENSIONS_DIR`, by default ~/.cache/torch_extensions, under a name made from its sources and
    how they are compiled. The compiler is `CXX`, by default g++.

    Raises:
        NativeError: A processor without the instructions, no compiler, or one that fails.
    """
    command = [*shlex.split(os.environ.get("CXX") or "g++"), *_FLAGS, *_instructions(), str(_SOURCES[0])]
    key = hashlib.sha256("\0".join(command[:-1]).encode())
    for source in _SOURCES:
        key.update(source.read_bytes())
    name = f"native_{key.hexdigest()[:16]}.so"
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
    return _INSTRUCTIONS[capability]


def _compile(command: list[str], path: Path) -> None:
    if shutil.which(command[0]) is None:
        raise NativeError(f"no compiler {command[0]!r} was found; install GCC (g++), or name it in CXX")
    partial = path.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
    if done.returncode:
        partial.unlink(missing_ok=True)
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise NativeError(f"{command[0]} could not compile it ({lines[0].strip()}); it takes GCC 9 or later")
    os.replace(partial, path)  # whole or not at all: other processes may be looking for it


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"it could not be loaded ({error})") from error
