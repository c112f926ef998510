"""Operators in C++, for a CPU: how they are compiled, and what they are called with.

`convolution.cpp` convolves with mixed kernels, for `kernel_warehouse`, `depthwise.cpp` with given ones, for
`dynamic_conv`.
"""

from .images import from_pixels, pixels, room_for_pixels
from .library import NativeError, call, can_run, library, sum_type
from .problem import output_size, problem, window_of

__all__ = [
    "NativeError",
    "call",
    "can_run",
    "from_pixels",
    "library",
    "output_size",
    "pixels",
    "problem",
    "room_for_pixels",
    "sum_type",
    "window_of",
]
