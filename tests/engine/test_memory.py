import platform
import subprocess
import sys

import pytest

from kernelwarehouse.engine import memory

FAULTS = """
import resource, runpy, sys, torch
if sys.argv[1] == "keep":
    assert runpy.run_path(sys.argv[2])["keep_freed_memory"]()
for _ in range(10):  # until the heap is as large as it will be
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_a_block_that_was_freed_is_taken_again_without_faults():
    """64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", FAULTS, word, memory.__file__], check=True, stdout=subprocess.PIPE, text=True
        )
        for word in ("keep", "return")
    ]
    kept, returned = (int(run.stdout) for run in runs)
    assert 4 * kept < returned


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed_memory()
