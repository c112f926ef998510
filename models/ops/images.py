"""Images in either memory layout."""

from collections.abc import Sequence

from torch import Tensor


def empty_images(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An uninitialised (B, channels, *size) in the memory layout of x (B, C, *spatial): channels last or first."""
    if x.stride(1) == 1:
        return x.new_empty(x.shape[0], *size, channels).movedim(-1, 1)
    return x.new_empty(x.shape[0], channels, *size)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Images y (B, C, *spatial) with a bias (C,) or (B, C) added, if there is one."""
    if bias is None:
        return y
    return y + bias.to(y.dtype).reshape(-1, bias.shape[-1], *(1,) * (y.ndim - 2))
