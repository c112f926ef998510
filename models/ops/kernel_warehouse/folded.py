"""The matrix chain in its other order, for inference: attention and cells multiplied once, whatever the input.

The logits are linear in the hidden vector h of the attention, z = F [h; 1], so a mixture is

    w_i = s_i Σ_j (Σ_k F_ijk [h; 1]_k) e_j = s_i Σ_k [h; 1]_k G_ik    with    G_ik = Σ_j F_ijk e_j

and s_i = 1 / (Σ_j |z_ij| + 1e-3). G does not depend on the input. With it a sample costs (r + 1) · |W| instead of
n · |W|, r being the width of h, whatever the budget. It takes (r + 1) · |W| values of memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dynamic_conv import columns, dynamic_conv_from_geometry
from ..exporting import exporting
from ..geometry import Geometry
from ..images import add_bias, empty_images
from .applied import Workspace, multiply
from .attention import EPSILON, Attention, pool
from .attention_operator import folded_at_once, folds_at_once
from .mixed_conv import computing_type
from .mixing import by_output_blocks, mix_rows
from .native import mixes_natively, native_folded_conv
from .partition import Partition
from .streamed import tiles


@torch.no_grad()
def fold_products(attention: Attention, cells: Tensor, partition: Partition) -> Tensor:
    """G as (blocks of output channels, cout, r + 1, taps · input blocks · cin); cells (n, cout, cin, *ones)."""
    unit = torch.eye(attention.fc1.out_features, dtype=cells.dtype, device=cells.device)
    constant = attention.logits(torch.zeros_like(unit[:1]))
    weights = torch.cat([attention.logits(unit) - constant, constant])[..., :-1]  # (r + 1, m, n)
    rows = mix_rows(weights.flatten(0, 1), cells)
    *_, blocks_out, blocks_in = partition.grid
    products = rows.reshape(len(rows), len(weights), -1, blocks_out, blocks_in, rows.shape[2])
    return products.permute(3, 0, 1, 2, 4, 5).flatten(3).contiguous()


def folded_conv(
    attention: Attention,
    products: Tensor,
    x: Tensor,
    partition: Partition,
    geometry: Geometry,
    bias: Tensor | None = None,
) -> Tensor:
    """y[b] = conv(x[b], W[b]) + bias at temperature 0, streamed as `streamed_conv`; the scales s go onto the columns.

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
    hidden, scales = (value.to(kind) for value in _hidden_and_scales(attention, pooled))
    scales = by_output_blocks(scales.unsqueeze(2), partition).squeeze(3)
    x = geometry.pad(x.to(kind))
    geometry = Geometry(geometry.stride, ((0, 0),) * len(geometry.stride), geometry.dilation, geometry.groups)
    kernel_size = partition.kernel[2:]
    cells = products.transpose(1, 2)  # (blocks, r + 1, cout, K): for each block, r + 1 cells that are whole kernels
    y = empty_images(x, partition.kernel[0], geometry.output_size(x.shape[2:], kernel_size))
    flat = y.flatten(2).unflatten(1, (len(products), -1))
    space = Workspace(x)
    for samples, rows in tiles(hidden[:, None, None], cells[0], flat.shape[3]):
        seen = torch.cat(columns(x[samples], kernel_size, geometry), 2).unflatten(2, (*scales.shape[2:], -1))
        for block in range(len(products)):
            scaled = (seen * scales[samples, None, block, :, None]).flatten(2)
            for channels in rows:
                part = cells[block, :, channels]
                out = space.take("kernels", part.shape[1], len(scaled), part.shape[2])
                kernels = mix_rows(hidden[samples], part, out).transpose(0, 1)
                multiply([scaled], kernels, flat[samples, block, channels], space)
    return add_bias(y, bias)


def folded_kernels(attention: Attention, products: Tensor, pooled: Tensor, partition: Partition) -> Tensor:
    """The kernels (B, Cout, Cin, *k) for the means (B, Cin) of inputs, assembled: plain, for export and comparison."""
    hidden, scales = _hidden_and_scales(attention, pooled)
    scales = by_output_blocks(scales.unsqueeze(2), partition).squeeze(3)
    mixed = torch.einsum("bk,oqkp->boqp", hidden, products.to(hidden.dtype))
    mixed = mixed.unflatten(3, (scales.shape[2], -1)) * scales[:, :, None, :, None]
    kernels = mixed.flatten(1, 2).reshape(
        pooled.shape[0], partition.kernel[0], *partition.kernel[2:], partition.kernel[1]
    )
    return kernels.movedim(-1, 2)


def _coefficients(attention: Attention, x: Tensor) -> Tensor:
    """s [h; 1], (B, m, r + 1)."""
    if folds_at_once(attention, x):
        return folded_at_once(attention, x)
    hidden, scales = _hidden_and_scales(attention, pool(x)[0])
    return scales.unsqueeze(2) * hidden.unsqueeze(1)


def _hidden_and_scales(attention: Attention, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """[h; 1] as (B, r + 1), and s as (B, m)."""
    hidden = attention.hidden(pooled)
    total = attention.total(attention.logits(hidden)).squeeze(2)
    return F.pad(hidden, (0, 1), value=1.0), 1 / (total + EPSILON)
