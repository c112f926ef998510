"""Images with channels last, as the operators read and write them, from and to either layout; and their means."""

import torch
from torch import Tensor

from .library import call


def pixels(images: Tensor) -> Tensor:
    """(B, C, *spatial) → (B, *spatial, C), contiguous: the same memory if channels are last in it."""
    view = images.movedim(1, -1)
    if view.is_contiguous() or not images.is_contiguous():
        return view.contiguous()
    return _reorder(images.flatten(2), room_for_pixels(images))


def room_for_pixels(images: Tensor) -> Tensor:
    """The view of images with channels last, or uninitialised memory of its shape."""
    view = images.movedim(1, -1)
    return view if view.is_contiguous() else torch.empty_like(view, memory_format=torch.contiguous_format)


def from_pixels(values: Tensor, images: Tensor) -> Tensor:
    """Fill images, of `empty_images`, with their pixels, which may be a view of them."""
    if values.data_ptr() == images.data_ptr():
        return images
    return _reorder(values.flatten(1, -2), images)


@torch.library.custom_op("kernelwarehouse::mean", mutates_args=())
def mean(images: Tensor) -> Tensor:
    """The means of images (B, C, *spatial) of bfloat16 over space, (B, C), summed in single precision."""
    means = _empty_means(images)
    channels_last = images.movedim(1, -1).is_contiguous()
    values = images.movedim(1, -1).flatten(1, -2) if channels_last else images.contiguous().flatten(2)
    call("mean_of_rows" if channels_last else "mean_of_columns", *values.shape, values, means)
    return means


@mean.register_fake
def _empty_means(images: Tensor) -> Tensor:
    return images.new_empty(images.shape[:2], dtype=torch.float32)


def _reorder(matrices: Tensor, out: Tensor) -> Tensor:
    """Write the transposes of (B, rows, columns) into the memory of out."""
    call("reorder", *matrices.shape, matrices, out)
    return out
