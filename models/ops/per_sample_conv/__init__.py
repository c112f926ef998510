"""Convolution with a kernel of its own for every sample: y[b] = conv(x[b], W[b]), in 1-D, 2-D and 3-D."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..context import exporting
from ..cpu import unavailable
from ..geometry import Geometry, Padding, check_operands
from ..images import add_bias
from . import triton_conv
from .batched import grouped_conv, taps_conv, unfold_conv
from .depthwise import depthwise_conv, is_depthwise
from .im2col import windows
from .reference import CONV, reference

__all__ = [
    "CONV",
    "IMPLEMENTATIONS",
    "grouped_conv",
    "no_depthwise",
    "per_sample_conv",
    "per_sample_conv_from_geometry",
    "reference",
    "static_conv",
    "triton_conv",
    "windows",
]

IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Geometry], Tensor]] = {
    "reference": reference,
    "grouped": grouped_conv,
    "taps": taps_conv,
    "unfold": unfold_conv,
    "depthwise": depthwise_conv,
}


def per_sample_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    *,
    implementation: str = "auto",
) -> Tensor:
    """Convolve every sample with its own kernel.

    Args:
        x: Input, (B, Cin, *spatial) with one to three spatial dimensions.
        weight: Kernels, (B, Cout, Cin/groups, *kernel).
        bias: (Cout,) shared by the samples, or (B, Cout).
        stride: Step of the window; one number or one per spatial dimension.
        padding: Numbers, "same" (stride 1 only) or "valid".
        dilation: Distance of the kernel's taps.
        groups: Independent groups of channels.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        implementation: "auto" or a name in `IMPLEMENTATIONS`.

    Returns:
        (B, Cout, *output spatial), of the type of the product of x and weight.

    Raises:
        ValueError: Arguments out of range, shapes that do not fit, an empty batch, or an implementation that cannot
            compute the case.
    """
    geometry = Geometry.of(weight.shape[3:], stride, padding, dilation, groups, padding_mode)
    check_operands(x, weight, geometry)
    return add_bias(per_sample_conv_from_geometry(x, weight, geometry, implementation), bias)


def per_sample_conv_from_geometry(
    x: Tensor, weight: Tensor, geometry: Geometry, implementation: str = "auto"
) -> Tensor:
    """`per_sample_conv` for arguments that were normalised and checked before."""
    if implementation == "auto":
        implementation = _choose(x, weight, geometry)
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be auto, {', '.join(IMPLEMENTATIONS)}; found {implementation!r}")
    elif implementation == "depthwise" and (reason := no_depthwise(x, weight, geometry)):
        raise ValueError(f"implementation 'depthwise' cannot compute this: {reason}; 'auto' takes another")
    return IMPLEMENTATIONS[implementation](x, weight, geometry)


def static_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """conv(x, W) with one kernel (Cout, Cin/groups, *kernel) for all samples, as torch does it."""
    x, padding = geometry.split_padding(x)
    return CONV[len(geometry.stride)](x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups)


def _choose(x: Tensor, weight: Tensor, geometry: Geometry) -> str:
    """A grouped convolution needs its number of groups, and so the batch, to be known when a graph is made."""
    if torch.compiler.is_exporting():
        return "unfold"  # its graph does not grow with the kernel, but TorchScript's exporter refuses Tensor.unfold
    if exporting() or weight.shape[3:].numel() == 1:
        return "taps"
    return "grouped" if no_depthwise(x, weight, geometry) else "depthwise"


def no_depthwise(x: Tensor, weight: Tensor, geometry: Geometry) -> str | None:
    """Why the depthwise convolution in C++ cannot compute a case; None if it can."""
    if not is_depthwise(weight, geometry):
        return "a channel is not a group by itself"
    return unavailable(x.device.type, torch.float64 if x.dtype == torch.float64 else torch.float32)
