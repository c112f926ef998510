"""Pooling of regions of interest: RoIAlign by torchvision, and RoIPool as mmcv defines it."""

from typing import Any

import torch
import torchvision  # noqa: F401 (registers torch.ops.torchvision)
from torch import Tensor

from .missing import MissingOperatorError
from .precision import widen

MAX, AVERAGE = range(2)


def roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    _argmax_y: Tensor,
    _argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average bilinear samples over the bins of each region (He et al., ICCV 2017).

    Args:
        features: (B, C, H, W).
        rois: (R, 5): index of the image, and corners in its pixels.
        output: (R, C, aligned_height, aligned_width), overwritten.
        _argmax_y: Of the maximum, which this does not compute; untouched.
        _argmax_x: Likewise.
        aligned_height: Bins along y.
        aligned_width: Bins along x.
        spatial_scale: Pixels of the features in one of the image.
        sampling_ratio: Samples along each side of a bin; 0 takes as many as the bin has pixels.
        pool_mode: 1 for the average.
        aligned: Whether pixel centres lie at half integers.

    Raises:
        MissingOperatorError: `pool_mode` 0, the maximum.
    """
    _require_average(pool_mode)
    sizes = spatial_scale, aligned_height, aligned_width
    output.copy_(torch.ops.torchvision.roi_align(*widen(features, rois), *sizes, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    _argmax_y: Tensor,
    _argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of `roi_align_forward`: (R, C, aligned_height, aligned_width) into `grad_input` (B, C, H, W)."""
    _require_average(pool_mode)
    sizes = spatial_scale, aligned_height, aligned_width, *grad_input.shape
    grad, rois = widen(grad_output, rois)
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(grad, rois, *sizes, sampling_ratio, aligned))


def _require_average(pool_mode: int) -> None:
    if pool_mode != AVERAGE:
        raise MissingOperatorError("RoIAlign with pool_mode='max' (torchvision has 'avg')")


def roi_pool_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Take the maximum over the bins of each region (Girshick, ICCV 2015).

    mmcv does not round a region to whole pixels before it is divided, which torchvision's operator does.

    Args:
        features: (B, C, H, W).
        rois: (R, 5): index of the image, and corners in its pixels, the last included.
        output: (R, C, pooled_height, pooled_width), overwritten; 0 in a bin without pixels.
        argmax: Likewise, overwritten by the place y · W + x of the maximum; −1 in a bin without pixels.
        pooled_height: Bins along y.
        pooled_width: Bins along x.
        spatial_scale: Pixels of the features in one of the image.
    """
    height, width = features.shape[2:]
    (rois,) = widen(rois)
    start, end = rois[:, 1:3] * spatial_scale, (rois[:, 3:] + 1) * spatial_scale
    hollow = (end <= start).any(dim=1)
    columns, no_columns = _bins(start[:, 0], end[:, 0], pooled_width, width)
    rows, no_rows = _bins(start[:, 1], end[:, 1], pooled_height, height)
    for i, image in enumerate(rois[:, 0].long().tolist()):
        places = rows[i][:, None, :, None] * width + columns[i][None, :, None, :]
        places = places.flatten(2)
        values, first = features[image].flatten(1)[:, places].max(dim=-1)
        empty = no_rows[i][:, None] | no_columns[i] | hollow[i]
        output[i] = values.masked_fill(empty, 0)
        argmax[i] = places.expand(len(values), -1, -1, -1).gather(-1, first[..., None])[..., 0].masked_fill(empty, -1)


def _bins(start: Tensor, end: Tensor, bins: int, size: int) -> tuple[list[Tensor], Tensor]:
    """Pixels of the bins along one axis.

    Args:
        start: (R,), where each region begins.
        end: (R,), where it ends.
        bins: Number of its bins.
        size: Number of pixels.

    Returns:
        For each region its pixels (bins, the most in one of its bins), smaller bins repeating their last; and whether
        a bin has none, (R, bins).
    """
    edges = torch.arange(bins + 1, device=start.device)
    edges = edges * ((end - start) / bins)[:, None] + start[:, None]
    first = edges[:, :-1].floor().clamp(0, size).long()
    last = edges[:, 1:].ceil().clamp(0, size).long() - 1
    most = (last - first + 1).amax(dim=1).clamp(min=1).tolist() if len(start) else []
    pixels = [
        torch.minimum(f[:, None] + torch.arange(n, device=start.device), e[:, None]).clamp(0, size - 1)
        for f, e, n in zip(first, last, most, strict=True)
    ]
    return pixels, last < first


def roi_pool_backward(grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor, **_sizes: Any) -> None:
    """Gradient of `roi_pool_forward`: (R, C, pooled_height, pooled_width) into `grad_input` (B, C, H, W)."""
    images, channels, height, width = grad_input.shape
    image = rois[:, 0].long()[:, None]
    plane = image * channels + torch.arange(channels, device=rois.device)
    places = (plane[:, :, None, None] * (height * width) + argmax).flatten()
    (grad,) = widen(grad_output)
    found = (argmax >= 0).flatten()
    total = grad.new_zeros(grad_input.numel()).index_add_(0, places[found], grad.flatten()[found])
    grad_input.copy_(total.view(images, channels, height, width))
