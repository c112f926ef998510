"""Triton without a GPU: its interpreter, and its compiler for GPUs that are not here.

Triton decides when a kernel is defined whether it is interpreted, so that one process cannot do both.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def _multiplies_double():
    try:
        return tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 5)
    except importlib.metadata.PackageNotFoundError:
        return False


def needs_triton(test):
    """Mark a test as one that runs Triton, and skip it where none multiplies float64."""
    skip = pytest.mark.skipif(not _multiplies_double(), reason="there is no Triton that multiplies float64")
    return pytest.mark.triton(skip(test))


in_interpreter = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="runs in test_in_the_interpreter, and on a GPU"
)


def run_in_interpreter(file):
    """Run `TestKernels` of a file in a process of its own, and return how many tests passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "-k", "TestKernels"], capture_output=True, text=True, cwd=root, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    return int(done.stdout.splitlines()[-1].split()[0])


def compile_for_gpu(kernel, architecture, types, constants, options, divisible=()):
    """Down to machine code; arguments that are neither among the types nor among the constants are whole numbers.

    As for a call, Triton can be told which arguments are `divisible` by 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible if name not in constants}
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), options)
    assert compiled.asm["cubin"]
    return compiled
