"""Kernels of a few samples applied to their inputs, and the adjoints, as matrix products: `Columns`.

Kernels come as (B, blocks of output channels, rows, K) with K = taps · C/groups in the order (tap, channel), as mixing
leaves them, and outputs go to (B, blocks, rows, P), P being the output positions. Whatever is used again for the next
kernels lies in a `Workspace`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dynamic_conv import columns, columns_adjoint, parts_of
from ..geometry import Geometry

_LONGEST_SUM = 1024  # a product over more is faster in parts, which stay in the cache
_NARROW = 128  # blocks of no more rows are put together: a copy of their kernels costs less than thin products


class Workspace:
    """Memory that is taken once and used again: on a CPU, fresh pages cost as much as the product that fills them."""

    def __init__(self, like: Tensor):
        self._like = like
        self._memory: dict[str, Tensor] = {}

    def take(self, purpose: str, *shape: int) -> Tensor | None:
        """An uninitialised tensor of the type of `like`; it lies where the last one for the same purpose did.

        None, as torch's argument `out` takes it, while gradients are recorded: they need what was there before.
        """
        if torch.is_grad_enabled():
            return None
        size = math.prod(shape)
        memory = self._memory.get(purpose)
        if memory is None or memory.numel() < size:
            memory = self._memory[purpose] = self._like.new_empty(size)
        return memory[:size].view(shape)


class Columns:
    """Matrix products with what each output position reads.

    Args:
        x: (B, C, *spatial).
        kernel_size: One entry per spatial dimension.
        geometry: The convolution's arguments; ungrouped.
        space: Where products are kept until they are in order.
    """

    def __init__(self, x: Tensor, kernel_size: Sequence[int], geometry: Geometry, space: Workspace):
        self._x = x
        self._arguments = tuple(kernel_size), geometry
        self._space = space
        self._taps = max(_LONGEST_SUM // x.shape[1], 1)
        self._seen: list[Tensor] = []
        self._received: list[Tensor] = []

    def _columns(self) -> list[Tensor]:
        if not self._seen:
            self._seen = columns(self._x, *self._arguments, self._taps)
        return self._seen

    def apply(self, kernels: Tensor, out: Tensor) -> None:
        """Write the outputs of kernels (B, blocks, rows, K) into out (B, blocks, rows, P)."""
        for blocks in _together(out):
            multiply(self._columns(), kernels[:, blocks].flatten(1, 2), out[:, blocks].flatten(1, 2), self._space)

    def backward(self, grad: Tensor, kernels: Tensor | None, grad_kernels: Tensor | None) -> None:
        """Take in the gradient of an output.

        Args:
            grad: The gradient (B, blocks, rows, P).
            kernels: Those of the output, where the gradient of x is wanted.
            grad_kernels: Where to write the gradient of the kernels, if it is wanted.
        """
        widths = [taps * self._x.shape[1] for taps in parts_of(math.prod(self._arguments[0]), self._taps)]
        for blocks in _together(grad):
            received = grad[:, blocks].flatten(1, 2)
            if kernels is not None:
                for part, kernel in enumerate(kernels[:, blocks].flatten(1, 2).split(widths, 2)):
                    if part < len(self._received):
                        self._received[part].baddbmm_(received.mT, kernel)
                    else:
                        self._received.append(torch.bmm(received.mT, kernel))
            if grad_kernels is not None:
                for seen, out in zip(self._columns(), grad_kernels[:, blocks].split(widths, 3), strict=True):
                    product = self._space.take("product", *received.shape[:2], seen.shape[2])
                    torch.bmm(received, seen, out=product)
                    out.copy_(product.view(out.shape))

    def grad_x(self) -> Tensor:
        """The gradient of x, (B, C, *spatial)."""
        return columns_adjoint(self._received, self._x.shape[2:], *self._arguments)


def multiply(seen: Sequence[Tensor], kernels: Tensor, out: Tensor, space: Workspace) -> None:
    """Write into out (B, rows, P) the products of kernels (B, rows, K) and columns, in parts (B, P, part of K)."""
    rows_last = out.stride(1) == 1  # NHWC
    target = out.mT if rows_last else out
    at_once = target.is_contiguous() and not torch.is_grad_enabled()
    # A view of the values in order: with the strides of `mT` of a single position, torch 2.8 writes nothing in bf16.
    memory = target.flatten().view(target.shape) if at_once else space.take("product", *target.shape)
    total = None
    for part, kernel in zip(seen, kernels.split([part.shape[2] for part in seen], 2), strict=True):
        left, right = (part, kernel.mT) if rows_last else (kernel, part.mT)
        total = torch.bmm(left, right, out=memory) if total is None else torch.baddbmm(total, left, right, out=memory)
    if not at_once:
        target.copy_(total)


def _together(out: Tensor) -> list[slice]:
    """Which blocks of outputs (B, blocks, rows, P) are computed together."""
    count, rows = out.shape[1:3]
    if rows <= _NARROW and out.stride(1) == rows * out.stride(2):
        return [slice(0, count)]
    return [slice(block, block + 1) for block in range(count)]
