"""Deformable convolution, first version (Dai et al., ICCV 2017) and modulated (Zhu et al., CVPR 2019).

Shapes, for a kernel of kh × kw, G groups of offsets and a result of H' × W': x (B, C, H, W); weight (O, C / groups,
kh, kw); offset (B, 2 · G · kh · kw, H', W'), y before x; mask (B, G · kh · kw, H', W'); output (B, O, H', W').
mmcv passes buffers (`columns`, `ones`) and a step for kernels of its own, which torchvision's do not need.
"""

from typing import Any

import torch
import torchvision  # noqa: F401 (registers torch.ops.torchvision)
from torch import Tensor

from .precision import widen


def _v1(sizes: dict[str, Any]) -> tuple[int | bool, ...]:
    """mmcv's arguments of the first version → the last ones of torchvision's operators."""
    names = ("dH", "dW", "padH", "padW", "dilationH", "dilationW", "group", "deformable_group")
    return *(sizes[name] for name in names), False


def _v2(sizes: dict[str, Any]) -> tuple[int | bool, ...]:
    """The same for the modulated version."""
    names = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "group", "deformable_group")
    return *(sizes[name] for name in names), True


def _no_mask_and_bias(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_zeros(len(x), 1), x.new_zeros(len(weight))


def _backward(grad_output: Tensor, tensors: tuple[Tensor, ...], sizes: tuple[int | bool, ...]) -> list[Tensor]:
    """Gradients of x, weight, offset, mask and bias."""
    return torch.ops.torchvision._deform_conv2d_backward(*widen(grad_output, *tensors), *sizes)


def deform_conv_forward(
    x: Tensor, weight: Tensor, offset: Tensor, output: Tensor, _columns: Tensor, _ones: Tensor, **sizes: Any
) -> None:
    """Convolve `x` at offset places, into `output`."""
    tensors = widen(x, weight, offset, *_no_mask_and_bias(x, weight))
    output.copy_(torch.ops.torchvision.deform_conv2d(*tensors, *_v1(sizes)))


def deform_conv_backward_input(
    x: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_x: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    _columns: Tensor,
    **sizes: Any,
) -> None:
    """Gradients of `deform_conv_forward` by x and offset, into `grad_x` and `grad_offset`."""
    grads = _backward(grad_output, (x, weight, offset, *_no_mask_and_bias(x, weight)), _v1(sizes))
    grad_x.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    x: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    _columns: Tensor,
    _ones: Tensor,
    *,
    scale: float,
    **sizes: Any,
) -> None:
    """`scale` times the gradient of `deform_conv_forward` by weight, into `grad_weight`."""
    weight = torch.zeros_like(grad_weight)  # the result is linear in it
    grads = _backward(grad_output, (x, weight, offset, *_no_mask_and_bias(x, weight)), _v1(sizes))
    grad_weight.copy_(grads[1] * scale)


def modulated_deform_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    _ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    _columns: Tensor,
    *,
    with_bias: bool,
    **sizes: Any,
) -> None:
    """Convolve `x` at offset places, each sample times its mask, into `output`."""
    bias = bias if with_bias else x.new_zeros(len(weight))
    tensors = widen(x, weight, offset, mask, bias)
    output.copy_(torch.ops.torchvision.deform_conv2d(*tensors, *_v2(sizes)))


def modulated_deform_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    _ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    _columns: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **sizes: Any,
) -> None:
    """Gradients of `modulated_deform_conv_forward`, into the tensors of those names."""
    bias = bias if with_bias else x.new_zeros(len(weight))
    grads = _backward(grad_output, (x, weight, offset, mask, bias), _v2(sizes))
    targets = (grad_x, grad_weight, grad_offset, grad_mask) + ((grad_bias,) if with_bias else ())
    for target, grad in zip(targets, grads, strict=False):
        target.copy_(grad)
