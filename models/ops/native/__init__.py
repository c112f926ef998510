"""Operators in C++, for a CPU: how they are compiled, and what they are called with; README.md describes each file."""

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
