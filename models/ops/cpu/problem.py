"""The sizes of a convolution as `Problem` in problem.h has them."""

import ctypes
import functools
import math
from collections.abc import Sequence

from ..geometry import Geometry, output_length


def window_of(kernel_size: Sequence[int], geometry: Geometry, padding: Sequence[int]) -> list[int]:
    """Kernel size, stride, padding and dilation of three dimensions: an image is a volume of depth 1."""
    missing = 3 - len(padding)
    ones, zeros = [1] * missing, [0] * missing
    return [*ones, *kernel_size, *ones, *geometry.stride, *zeros, *padding, *ones, *geometry.dilation]


def output_size(input_size: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Of a convolution with a window of three dimensions.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    axes = range(3 - len(input_size), 3)
    size = tuple(
        output_length(length, window[i], window[3 + i], 2 * window[6 + i], window[9 + i])
        for i, length in zip(axes, input_size, strict=True)
    )
    if min(size) < 1:
        kernel_size = tuple(window[i] for i in axes)
        raise ValueError(f"an input of {tuple(input_size)} is too small for a kernel of {kernel_size}")
    return size


def problem(
    counts: Sequence[int],
    input_size: Sequence[int],
    output_size: Sequence[int],
    window: Sequence[int],
    row_blocks: int = 0,
    expert_parts: int = 0,
) -> ctypes.Array[ctypes.c_int64]:
    """Lay out the sizes for an operator.

    Args:
        counts: Samples, blocks of output and of input channels, cells, and the channels of each block.
        input_size: One entry for each spatial dimension.
        output_size: One entry for each spatial dimension.
        window: Of `window_of`.
        row_blocks: Blocks of output channels of α where each part has a bank of its own; 0 where all share one.
        expert_parts: Parts of α where the bank is whole kernels in torch's order: 1, or one for each tap; 0 elsewhere.
    """
    return _laid_out(tuple(counts), tuple(input_size), tuple(output_size), tuple(window), (row_blocks, expert_parts))


@functools.lru_cache(1024)
def _laid_out(
    counts: tuple[int, ...],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    window: tuple[int, ...],
    bank: tuple[int, int],
) -> ctypes.Array[ctypes.c_int64]:
    if window == (1,) * 6 + (0,) * 3 + (1,) * 3:  # all pixels are alike
        inputs = outputs = (math.prod(outputs),)
    missing = (1,) * (3 - len(inputs))
    values = [*counts, *missing, *inputs, *missing, *outputs, *window, *bank]
    return (ctypes.c_int64 * len(values))(*values)
