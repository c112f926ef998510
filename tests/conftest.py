"""What tests of all folders share; nothing here or before imports torch, which reads the environment only once."""

import os

import pytest

# A machine that pretends to have fewer instructions (models/ops/cpu/README.md) pretends so to torch and oneDNN too.
_PRETENDED = {
    "avx2": ("avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE"),
}
if os.environ.get("KERNELWAREHOUSE_CPU") in _PRETENDED:
    capability, isa = _PRETENDED[os.environ["KERNELWAREHOUSE_CPU"]]
    os.environ.update(ATEN_CPU_CAPABILITY=capability, ONEDNN_MAX_CPU_ISA=isa)


@pytest.fixture
def untuned():
    """Nothing is known of what is fastest, before the test and after it."""
    from kernelwarehouse.models.ops.selection import forget

    forget()
    yield
    forget()
