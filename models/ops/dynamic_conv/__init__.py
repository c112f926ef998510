"""Convolution with a kernel of its own for every sample: y[b] = conv(x[b], W[b]), in 1-D, 2-D and 3-D."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..geometry import Geometry, Padding, check_operands
from ..images import add_bias
from ..native import can_run
from .batched import grouped_dynamic_conv, taps_dynamic_conv, unfold_dynamic_conv
from .columns import columns, columns_adjoint, even_part, parts_of, windows
from .depthwise import (
    convolve_depthwise,
    depthwise_dynamic_conv,
    depthwise_gradient_of_kernels,
    depthwise_gradient_of_x,
    is_depthwise,
)
from .naive import CONV, naive_dynamic_conv

__all__ = [
    "CONV",
    "IMPLEMENTATIONS",
    "columns",
    "columns_adjoint",
    "convolve_depthwise",
    "depthwise_gradient_of_kernels",
    "depthwise_gradient_of_x",
    "dynamic_conv",
    "dynamic_conv_from_geometry",
    "even_part",
    "parts_of",
    "windows",
]

IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Geometry], Tensor]] = {
    "naive": naive_dynamic_conv,
    "grouped": grouped_dynamic_conv,
    "taps": taps_dynamic_conv,
    "unfold": unfold_dynamic_conv,
    "depthwise": depthwise_dynamic_conv,
}


def dynamic_conv(
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
        implementation: "auto" or a name in `IMPLEMENTATIONS`. "auto" takes "depthwise" where that can run, whose
            gradient is of first order only.

    Returns:
        (B, Cout, *output spatial), of the type of the product of x and weight.

    Raises:
        ValueError: Arguments out of range, shapes that do not fit, or an empty batch.
    """
    geometry = Geometry.of(weight.shape[3:], stride, padding, dilation, groups, padding_mode)
    return dynamic_conv_from_geometry(x, weight, bias, geometry, implementation)


def dynamic_conv_from_geometry(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, implementation: str = "auto"
) -> Tensor:
    """`dynamic_conv` for arguments that were normalised before."""
    check_operands(x, weight, geometry)
    if implementation == "auto":
        implementation = _choose(x, weight, geometry)
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be auto, {', '.join(IMPLEMENTATIONS)}; found {implementation!r}")
    return add_bias(IMPLEMENTATIONS[implementation](x, weight, geometry), bias)


def _choose(x: Tensor, weight: Tensor, geometry: Geometry) -> str:
    """A grouped convolution needs its number of groups, and so the batch, to be known when a graph is made."""
    if torch.compiler.is_exporting():
        return "unfold"  # its graph does not grow with the kernel, but TorchScript's exporter refuses Tensor.unfold
    if torch.jit.is_tracing() or weight.shape[3:].numel() == 1:
        return "taps"
    return "depthwise" if is_depthwise(weight, geometry) and can_run(x.device.type, x.dtype) else "grouped"
