"""Multi-scale deformable attention (Zhu et al., ICLR 2021) on accelerators, where mmcv asks for its own kernel."""

from typing import Any

import torch
from torch import Tensor

from .precision import widen


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, _level_start: Tensor, locations: Tensor, weights: Tensor, **_step: Any
) -> Tensor:
    """Sum the values at sampled places of all levels; computed by what mmcv runs on a CPU.

    Args:
        value: (B, keys of all levels, heads, channels of a head).
        shapes: (levels, 2), height and width.
        _level_start: (levels,), the first key of each; follows from `shapes`.
        locations: (B, queries, heads, levels, points, 2), x and y in [0, 1].
        weights: (B, queries, heads, levels, points).

    Returns:
        (B, queries, heads × channels of a head).
    """
    return _attend(shapes, *widen(value, locations, weights)).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    _level_start: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    **_step: Any,
) -> None:
    """Gradients of `ms_deform_attn_forward`, into the tensors of those names."""
    grad_output, *inputs = widen(grad_output, value, locations, weights)
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        output = _attend(shapes, *inputs)
    for target, grad in zip(
        (grad_value, grad_locations, grad_weights), torch.autograd.grad(output, inputs, grad_output), strict=True
    ):
        target.copy_(grad)


def _attend(shapes: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # which needs this package

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
