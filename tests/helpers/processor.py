"""What a test needs of the machine: a compiler, or instructions (those that `KERNELWAREHOUSE_CPU` leaves it)."""

import os
import shlex
import shutil

import pytest

from kernelwarehouse.models.ops.native.build import NativeError, flags, instructions


def _compiles():
    try:
        flags()
    except NativeError:
        return False
    return shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]) is not None


def needs(instruction):
    """Skip a test on a processor without it, one of avx2, avx512, avx512_bf16 and amx."""
    return pytest.mark.skipif(instruction not in instructions(), reason=f"the processor has no {instruction}")


needs_compiler = pytest.mark.skipif(not _compiles(), reason="there is no C++ compiler, or nothing it compiles for here")
needs_bfloat16 = needs("avx512_bf16")
