"""The C++ files compiled by GCC into one library, on first use, and kept for later processes."""

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# In reverse, since values.cpp takes longest and should begin first.
_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"), reverse=True)
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
# What an x86 processor can have, each with all before it, and how the compiler is told so.
_LEVELS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"],
    "avx512_bf16": ["-mavx512bf16"],
    "amx": ["-DTILES"],
}
# Pairs of bfloat16 are read as words, which strict aliasing forbids.
_FLAGS = ["-std=c++17", "-O3", "-fno-strict-aliasing", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-fPIC"]
# OpenMP's and C's functions are those of the process: torch's threads work here too, and none but them.
_LINKED = ["-shared", "-nodefaultlibs"]


class NativeError(RuntimeError):
    """Why there is no library."""


@contextlib.contextmanager
def built() -> Iterator[Path]:
    """Where the library is, which is compiled first if no process of this machine and user did.

    It is kept in `TORCH_EXTENSIONS_DIR`, by default ~/.cache/torch_extensions, under a name made from its sources and
    how they are compiled; where nothing can be kept, it is there for the time of the context. The compiler is `CXX`, by
    default g++.

    Raises:
        NativeError: A processor without the instructions, no compiler, or one that fails.
    """
    command = [*shlex.split(os.environ.get("CXX") or "g++"), *_FLAGS, *flags()]
    key = hashlib.sha256("\0".join(command + _LINKED).encode())
    for source in _SOURCES + _HEADERS:
        key.update(source.read_bytes())
    with contextlib.ExitStack() as stack:
        folder = _folder() or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder / f"native_{key.hexdigest()[:16]}.so"
        if not path.exists():
            with _alone(folder):
                if not path.exists():  # another process may have compiled it meanwhile
                    _compile(command, path)
        yield path


def instructions() -> list[str]:
    """Those of avx2, avx512, avx512_bf16 and amx that are used here, in this order; none on a processor that is no x86.

    They are those that the processor has and torch uses; `KERNELWAREHOUSE_CPU` names the last one, in place of that.

    Raises:
        ValueError: `KERNELWAREHOUSE_CPU` is none of them.
    """
    levels = list(_LEVELS)
    last = os.environ.get("KERNELWAREHOUSE_CPU") or levels[-1]
    if last not in levels:
        raise ValueError(f"KERNELWAREHOUSE_CPU is {last!r}, which is none of {', '.join(levels)}")
    if platform.machine() != "x86_64":
        return []
    found = {"AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
    if found == 2 and torch.cpu._is_avx512_bf16_supported():
        found = 4 if torch.cpu._is_amx_tile_supported() else 3
    return levels[: min(found, levels.index(last) + 1)]


def flags() -> list[str]:
    """Those that tell the compiler of the `instructions`.

    Raises:
        NativeError: Nothing can be compiled for this system or this processor.
    """
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        raise NativeError(f"it is compiled on Linux for x86_64 and aarch64, not on {system} for {machine}")
    if machine == "x86_64" and not instructions():
        found = torch.backends.cpu.get_cpu_capability()
        raise NativeError(f"the processor needs AVX512 or AVX2, and torch found {found}")
    return [flag for level in instructions() for flag in _LEVELS[level]]


def _folder() -> Path | None:
    """Where libraries are kept, or None if nothing can be kept there."""
    try:
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
        folder = folder / "kernelwarehouse"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where there is no home
        return None
    return folder if os.access(folder, os.W_OK) else None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process has this folder, where its file system can lock."""
    import fcntl  # Windows, where nothing is compiled, has none

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(command: Sequence[str], path: Path) -> None:
    """Write the library, from all sources at once."""
    if shutil.which(command[0]) is None:
        raise NativeError(f"no compiler {command[0]!r} was found; install GCC (g++), or name it in CXX")
    partial = path.with_suffix(f".{os.getpid()}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(folder, source.stem + ".o")) for source in _SOURCES]
        list(pool.map(_run, [[*command, "-c", str(a), "-o", b] for a, b in zip(_SOURCES, objects, strict=True)]))
        try:
            _run([*command, *_LINKED, *objects, "-o", str(partial)])
            os.replace(partial, path)  # whole or not at all: other processes may be looking for it
        finally:
            partial.unlink(missing_ok=True)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise NativeError(f"{command[0]} could not compile it ({lines[0].strip()}); it takes GCC 10 or later")
