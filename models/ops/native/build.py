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
_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
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
    command = [*shlex.split(os.environ.get("CXX") or "g++"), *_FLAGS, *_instructions()]
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


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies pairs of bfloat16."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def _instructions() -> list[str]:
    if platform.system() != "Linux":
        raise NativeError(f"it is compiled on Linux, not on {platform.system()}")
    if platform.machine() == "aarch64":
        return []
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _INSTRUCTIONS:
        raise NativeError(f"the processor needs {' or '.join(_INSTRUCTIONS)}, and torch found {capability}")
    pairs, tiles = multiplies_bfloat16(), torch.cpu._is_amx_tile_supported()
    return _INSTRUCTIONS[capability] + ["-mavx512bf16"] * pairs + ["-DTILES"] * (pairs and tiles)


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
