"""Images in either memory layout."""

from collections.abc import Sequence

from torch import Tensor


def empty_images(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """An uninitialised (B, channels, *size) in the memory layout of x (B, C, *spatial): channels last or first."""
    shape = (x.shape[0], channels, *size)
    if x.stride(1) != 1:
        return x.new_empty(shape)
    strides, step = [], channels
    for length in reversed(size):
        strides.insert(0, step)
        step *= length
    # No view of other memory: autograd adds to a gradient in place only if it is none.
    return x.new_empty_strided(shape, (step, 1, *strides))


def of_channels(values: Tensor, images: Tensor) -> Tensor:
    """Values (C,) or (B, C) in the type of images (B, C, *spatial), and in a shape that goes with theirs."""
    return values.to(images.dtype).reshape(-1, values.shape[-1], *(1,) * (images.ndim - 2))


def scaled(images: Tensor, scale: Tensor | None) -> Tensor:
    """Images (B, C, *spatial) times a scale (C,) or (B, C), if there is one."""
    return images if scale is None else images * of_channels(scale, images)


def add_bias(images: Tensor, bias: Tensor | None) -> Tensor:
    """Images (B, C, *spatial) with a bias (C,) or (B, C) added, if there is one."""
    return images if bias is None else images + of_channels(bias, images)
