"""The means of images over space, which attentions read, as an operator in C++ on a CPU."""

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .cpu import call, in_either_layout, operator, unavailable
from .derivatives import Function


class _Mean(Function):
    """The means of images (B, C, *spatial) over space, (B, C), in C++."""

    name = "cpp"
    fast = True

    def compute(self, _arguments: Any, x: Tensor) -> Tensor:
        return x.flatten(2).mean(dim=2)

    def forward(self, _arguments: Any, x: Tensor) -> Tensor:
        return mean_operator(x)

    def gradients(self, _arguments: Any, grad: Tensor, _needs: Sequence[bool], x: Tensor) -> tuple[Tensor]:
        each = (grad / x.shape[2:].numel()).reshape(*x.shape[:2], *(1,) * (x.ndim - 2))
        return (each.expand(x.shape),)


_MEAN = _Mean()


def mean(x: Tensor) -> Tensor:
    """The means of images (B, C, *spatial) over space, (B, C), with C++ where that can run."""
    return x.flatten(2).mean(dim=2) if unavailable(x.device.type, x.dtype) else _MEAN.apply(None, x)


def _empty_means(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2])


@operator("mean", fake=_empty_means)
def mean_operator(x: Tensor) -> Tensor:
    """(B, C, *spatial) → (B, C)."""
    means = _empty_means(x)
    x, channels_last = in_either_layout(x)
    call("mean", [attention_sizes(tuple(x.shape), channels_last)], (x, means))
    return means


@functools.lru_cache(1024)
def attention_sizes(
    shape: tuple[int, ...], channels_last: bool, width: int = 0, mixtures: int = 0, cells: int = 0
) -> ctypes.Array[ctypes.c_int64]:
    """`Attention` of attention.cpp, for images (B, C, *spatial)."""
    values = shape[0], math.prod(shape[2:]), shape[1], int(channels_last), width, mixtures, cells
    return (ctypes.c_int64 * len(values))(*values)
