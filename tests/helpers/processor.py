"""What a test needs of the machine: a compiler, and instructions that the C++ is written for."""

import os
import shlex
import shutil

import pytest

from kernelwarehouse.models.ops.cpu.build import BuildError, flags


def _compiles():
    try:
        flags()
    except BuildError:
        return False
    return shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]) is not None


needs_compiler = pytest.mark.skipif(not _compiles(), reason="there is no C++ compiler, or nothing it compiles for here")
