"""Images in either memory layout."""

from collections.abc import Sequence

from torch import Tensor


def empty_images(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An uninitialised (B, channels, *size) in the memory layout of x (B, C, *spatial): channels last or first."""
    if x.stride(1) == 1:
        return x.new_empty(x.shape[0], *size, channels).movedim(-1, 1)
    return x.new_empty(x.shape[0], channels, *size)
