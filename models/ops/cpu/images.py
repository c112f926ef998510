"""Images with channels last, as the operators read and write them, from and to either layout."""

import torch
from torch import Tensor

from .library import call


def pixels(images: Tensor) -> Tensor:
    """(B, C, *spatial) → (B, *spatial, C), contiguous: the same memory if channels are last in it."""
    view = images.movedim(1, -1)
    if view.is_contiguous() or not images.is_contiguous():
        return view.contiguous()
    return _reorder(images.flatten(2), room_for_pixels(images))


def in_either_layout(images: Tensor) -> tuple[Tensor, bool]:
    """Images (B, C, *spatial) that fill their memory, and whether channels are last in it."""
    if images.movedim(1, -1).is_contiguous():
        return images, True
    return images.contiguous(), False


def room_for_pixels(images: Tensor) -> Tensor:
    """The view of images with channels last, or uninitialised memory of its shape."""
    view = images.movedim(1, -1)
    return view if view.is_contiguous() else torch.empty_like(view, memory_format=torch.contiguous_format)


def from_pixels(values: Tensor, images: Tensor) -> Tensor:
    """Fill images, of `empty_images`, with their pixels, which may be a view of them."""
    if values.data_ptr() == images.data_ptr():
        return images
    return _reorder(values.flatten(1, -2), images)


def _reorder(matrices: Tensor, out: Tensor) -> Tensor:
    """Write the transposes of (B, rows, columns) into the memory of out."""
    call("reorder", matrices.shape, (matrices, out))
    return out
