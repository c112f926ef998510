"""Operators in C++, for a CPU: how they are compiled (`build.py`), and what they are called with.

`attention.cpp` finds coefficients and `convolution.cpp` convolves with mixed kernels, for `kernel_warehouse`;
`layer.cpp` does one after the other, and `gradients.h` is the adjoint of the latter by coefficients and cells;
`depthwise.cpp` convolves with given kernels, for `dynamic_conv`. All multiply by `product.h`, whose kernels are in
`values.cpp`, `pairs.cpp` and `tiles.cpp`. They compute in single and double precision, and in bfloat16 where the
processor multiplies that.
"""

from .build import NativeError
from .images import from_pixels, in_either_layout, pixels, room_for_pixels
from .library import call, can_run, library, sum_type, use_tiles
from .means import attention_sizes, mean
from .operator import operator
from .problem import output_size, problem, window_of

__all__ = [
    "NativeError",
    "attention_sizes",
    "call",
    "can_run",
    "from_pixels",
    "in_either_layout",
    "library",
    "mean",
    "operator",
    "output_size",
    "pixels",
    "problem",
    "room_for_pixels",
    "sum_type",
    "use_tiles",
    "window_of",
]
