"""The matrix chain in its other order, for large batches: attention and cells multiplied once for all samples.

The logits are linear in the attention's hidden vector h of r values, z = F [h; 1], so a mixture is

    w_i = (1 − τ) s_i Σ_k [h; 1]_k G_ik + τ Σ_j β_ij e_j    with    G_ik = Σ_j F_ijk e_j

and s_i = 1 / (Σ_j |z_ij| + 1e-3). G and the assigned kernel behind τ cost (r + 2) · n · |W|, whatever the batch, and a
sample then (r + 2) · |W| instead of n · |W|. They are made in every forward pass and again in the backward pass, from
the parameters as they are: nothing is kept that could go stale, or that takes memory in between.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry
from ..images import add_bias
from ..native import can_run, sum_type
from .attention import EPSILON, Attention, pool
from .attention_operator import has_hooks
from .contraction import Chained, products_of
from .fused import fused_chain, fuses
from .mixed_conv import computing_type, supports
from .mixing import by_output_blocks
from .native import native_folded_conv
from .partition import Partition
from .streamed import stream


def chains(attention: Attention, partition: Partition, geometry: Geometry) -> bool:
    """Whether `chained_conv` can compute a layer, and nobody waits for the coefficients, which it does not find."""
    watched = has_hooks(attention) or any(has_hooks(module) for module in attention.children())
    return supports("streamed", partition, geometry) and attention.is_linear() and not watched


def chained_conv(
    attention: Attention,
    cells: Tensor,
    x: Tensor,
    temperature: Tensor,
    partition: Partition,
    geometry: Geometry,
    bias: Tensor | None = None,
    fused: bool = False,
) -> Tensor:
    """y[b] = conv(x[b], W[b]) + bias with W[b] mixed from the cells by the attention to x[b], kernels first.

    Args:
        attention: The layer's, one that `chains`.
        cells: The warehouse, (n, cout, cin, *ones).
        x: (B, Cin, *spatial).
        temperature: τ, a scalar tensor.
        partition: How the kernel is cut; it must be of an ungrouped convolution.
        geometry: The convolution's arguments.
        bias: (Cout,), if any.
        fused: Whether to convolve by `fused`, where it can; else by `streamed`.

    Returns:
        (B, Cout, *output spatial), channels last in memory if x is; its gradient is of first order only.
    """
    pooled, x = pool(x)
    kind = computing_type(x)
    alpha = (1 - temperature) * chain_coefficients(attention, pooled)
    alpha = torch.cat([alpha, temperature.to(alpha.dtype).expand(*alpha.shape[:2], 1)], dim=2)
    assigned = by_output_blocks(attention.assignment[None], partition).transpose(0, 1)
    weights = chain_weights(attention, partition)
    weights = torch.cat([weights, assigned.to(weights.dtype)], dim=1)
    x, alpha, weights = x.to(kind), alpha.to(kind), weights.to(kind)
    if not (fused or torch.is_grad_enabled()) and can_run(x.device.type, kind):  # as a folded layer's
        products = products_of(weights, cells).to(sum_type(kind)).contiguous()
        return native_folded_conv(alpha, products, x, partition, geometry, bias)
    factors = by_output_blocks(alpha, partition), weights, cells
    if fused and fuses(x, geometry):
        return add_bias(fused_chain(*factors, x, partition, geometry), bias)
    return add_bias(stream(Chained, x, partition, geometry, *factors), bias)


def chain_weights(attention: Attention, partition: Partition) -> Tensor:
    """F, with the logits' offset as its last row: (blocks of output channels, r + 1, parts, n)."""
    weight = attention.fc1.weight
    unit = torch.eye(attention.fc1.out_features, dtype=weight.dtype, device=weight.device)
    rows = torch.cat([attention.logits(unit, offset=False), attention.logits(torch.zeros_like(unit[:1]))])
    return by_output_blocks(rows[..., :-1], partition).transpose(0, 1)


def chain_coefficients(attention: Attention, pooled: Tensor) -> Tensor:
    """s [h; 1], (B, m, r + 1), for the means (B, Cin) of inputs."""
    hidden = attention.hidden(pooled)
    total = attention.total(attention.logits(hidden))
    return F.pad(hidden, (0, 1), value=1.0).unsqueeze(1) / (total + EPSILON)
