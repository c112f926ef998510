"""Means of images over space."""

import ctypes
import functools
import math
from collections.abc import Sequence

from torch import Tensor

from .images import in_either_layout
from .library import call, sum_type
from .operator import operator


def _empty_means(images: Tensor) -> Tensor:
    return images.new_empty(images.shape[:2], dtype=sum_type(images.dtype))


@operator("mean", fake=_empty_means)
def mean(images: Tensor) -> Tensor:
    """The means of images (B, C, *spatial) over space, (B, C), of the type in which they are summed."""
    means = _empty_means(images)
    images, channels_last = in_either_layout(images)
    call("mean", [attention_sizes(images.shape, channels_last)], (images, means))
    return means


def attention_sizes(
    shape: Sequence[int],
    channels_last: bool,
    width: int = 0,
    mixtures: int = 0,
    cells: int = 0,
    norm: int = 0,
) -> ctypes.Array[ctypes.c_int64]:
    """`Attention` of attention.h, for images (B, C, *spatial)."""
    return _laid_out(tuple(shape), channels_last, width, mixtures, cells, norm)


@functools.lru_cache(1024)
def _laid_out(shape: tuple[int, ...], *rest: int) -> ctypes.Array[ctypes.c_int64]:
    values = shape[0], math.prod(shape[2:]), shape[1], *map(int, rest)
    return (ctypes.c_int64 * len(values))(*values)
