"""What the process does with memory that it no longer needs."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_… of <malloc.h>
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory for the next step, as torch's allocator does on a GPU.

    Every step on a CPU takes what the step before it gave back. glibc returns the end of its heap and every block of
    32 MiB or more to the system, and each of their pages is a fault when it is taken anew: a tenth of the time of a
    step of a static ResNet18, and more of a converted one's. The process then stays as large as it once was.

    Returns:
        Whether it does so from now on: no other C library is known to need it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_THRESHOLD, _MOST) and libc.mallopt(_TRIM_THRESHOLD, _MOST))
