"""What tests of all folders share; nothing here or before imports torch, which reads the environment only once."""

import getpass
import os
import tempfile

import pytest

# A machine that pretends to have fewer instructions (models/ops/cpu/README.md) pretends so to torch and oneDNN too.
_PRETENDED = {
    "avx2": ("avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE"),
}
if (pretended := os.environ.get("KERNELWAREHOUSE_CPU")) in _PRETENDED:
    capability, isa = _PRETENDED[pretended]
    os.environ.update(ATEN_CPU_CAPABILITY=capability, ONEDNN_MAX_CPU_ISA=isa)
    # What torch.compile has kept for the whole processor gives wrong results then (torch 2.15).
    folder = f"torchinductor_{getpass.getuser()}_{pretended}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), folder)


@pytest.fixture
def untuned():
    """Nothing is known of what is fastest, before the test and after it."""
    from kernelwarehouse.models.ops.selection import forget

    forget()
    yield
    forget()
