"""C++ for a CPU: how it is compiled and called; README.md describes each file."""

from .build import BuildError, instructions
from .images import from_pixels, in_either_layout, pixels, room_for_pixels
from .library import call, in_memory, library, unavailable
from .operator import operator
from .problem import output_size, problem, window_of

__all__ = [
    "BuildError",
    "call",
    "from_pixels",
    "in_either_layout",
    "in_memory",
    "instructions",
    "library",
    "operator",
    "output_size",
    "pixels",
    "problem",
    "room_for_pixels",
    "unavailable",
    "window_of",
]
