"""The matrix chain in its other order, for inference: attention and cells multiplied once, whatever the input.

The logits are linear in the hidden vector h of the attention, z = F [h; 1], so a mixture is

    w_i = s_i Σ_j (Σ_k F_ijk [h; 1]_k) e_j = s_i Σ_k [h; 1]_k G_ik    with    G_ik = Σ_j F_ijk e_j

and s_i = 1 / (Σ_j |z_ij| + 1e-3). G does not depend on the input. With it a sample costs (r + 1) · |W| instead of
n · |W|, r being the width of h, whatever the budget. It takes (r + 1) · |W| values of memory.
"""

import torch
from torch import Tensor

from ..dynamic_conv import dynamic_conv_from_geometry
from ..exporting import exporting
from ..geometry import Geometry
from ..images import add_bias
from .attention import Attention, pool
from .attention_operator import folded_at_once, folds_at_once
from .chained import chain_coefficients, chain_weights
from .contraction import KernelsFirst, products_of
from .mixed_conv import computing_type
from .mixing import by_output_blocks
from .native import mixes_natively, native_folded_conv
from .partition import Partition
from .streamed import stream


@torch.no_grad()
def fold_products(attention: Attention, cells: Tensor, partition: Partition) -> Tensor:
    """G as (blocks of output channels, cout, r + 1, taps · input blocks · cin); cells (n, cout, cin, *ones)."""
    return products_of(chain_weights(attention, partition), cells).contiguous()


def folded_conv(
    attention: Attention,
    products: Tensor,
    x: Tensor,
    partition: Partition,
    geometry: Geometry,
    bias: Tensor | None = None,
) -> Tensor:
    """y[b] = conv(x[b], W[b]) + bias at temperature 0, in C++ or streamed.

    Args:
        attention: The layer's.
        products: G of `fold_products`, of any floating type.
        x: (B, Cin, *spatial).
        partition: How the kernel is cut; it must be of an ungrouped convolution.
        geometry: The convolution's arguments.
        bias: (Cout,), if any.

    Returns:
        (B, Cout, *output spatial), channels last in memory if x is.
    """
    kind = computing_type(x)
    if not (torch.is_grad_enabled() or exporting()) and mixes_natively(products.dtype, kind, x.device.type):
        alpha = _coefficients(attention, x).to(kind)
        return native_folded_conv(alpha, products, x.to(kind), partition, geometry, bias)
    pooled, x = pool(x)
    if exporting():
        return dynamic_conv_from_geometry(x, folded_kernels(attention, products, pooled, partition), bias, geometry)
    alpha = by_output_blocks(chain_coefficients(attention, pooled).to(kind), partition)
    return add_bias(stream(KernelsFirst, x.to(kind), partition, geometry, alpha, products), bias)


def folded_kernels(attention: Attention, products: Tensor, pooled: Tensor, partition: Partition) -> Tensor:
    """The kernels (B, Cout, Cin, *k) for the means (B, Cin) of inputs, assembled: plain, for export and comparison."""
    alpha = by_output_blocks(chain_coefficients(attention, pooled), partition)
    mixed = torch.einsum("bqpk,qokpc->bqopc", alpha, products.unflatten(3, (alpha.shape[2], -1)).to(alpha.dtype))
    size = pooled.shape[0], partition.kernel[0], *partition.kernel[2:], partition.kernel[1]
    return mixed.reshape(size).movedim(-1, 2)


def _coefficients(attention: Attention, x: Tensor) -> Tensor:
    """s [h; 1], (B, m, r + 1)."""
    if folds_at_once(attention, x):
        return folded_at_once(attention, x)
    return chain_coefficients(attention, pool(x)[0])
