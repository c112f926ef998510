"""The gradients of the convolution whose kernels are mixed as a whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..derivatives import gradients_by_autograd
from ..geometry import Geometry
from ..images import of_channels, scaled
from ..per_sample_conv import per_sample_conv_gradients
from .mixing import mix
from .partition import Partition


def gradients(
    grad: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    alpha: Tensor,
    bank: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    partition: Partition,
    geometry: Geometry,
) -> tuple[Tensor | None, ...]:
    """Those of x, α, the bank and the scales, as needed, given that of y; padding must be equal zeros.

    With y = s_out · conv(s_in · x, W), the gradient G of the kernels s_out · W gives that of W, s_out · G, and that of
    s_out, the sums of G · W over each output channel's kernel: no output is needed for them.
    """
    of_x, of_alpha, of_bank, of_in, of_out = needs
    grad_images = grad_out = None

    def grad_kernels(kernels: Tensor) -> Tensor:
        nonlocal grad_images, grad_out
        rows = None if out_scale is None else of_channels(out_scale, kernels)
        whole = kernels if rows is None else kernels * rows
        wanted = of_x or of_in, of_alpha or of_bank or of_out
        grad_images, found = per_sample_conv_gradients(grad, wanted, scaled(x, in_scale), whole, geometry)
        if found is None or rows is None:
            return kernels if found is None else found
        if of_out:
            grad_out = _of_scale(found * kernels, out_scale)
        return found * rows

    def mixed(alpha: Tensor, bank: Tensor) -> Tensor:
        return mix(alpha, bank, partition)

    grad_alpha, grad_bank = gradients_by_autograd(mixed, (alpha, bank), (of_alpha, of_bank), grad_kernels)
    grad_in = _of_scale(grad_images * x, in_scale) if of_in and grad_images is not None else None
    grad_x = scaled(grad_images, in_scale) if of_x and grad_images is not None else None
    return grad_x, grad_alpha, grad_bank, grad_in, grad_out


def _of_scale(products: Tensor, scale: Tensor | None) -> Tensor | None:
    """Sums over all but the channels, and over the samples where they share a scale."""
    if scale is None:
        return None
    sums = products.flatten(2).sum(2, dtype=torch.promote_types(products.dtype, torch.float32))
    return (sums if scale.ndim == 2 else sums.sum(0)).to(scale.dtype)
