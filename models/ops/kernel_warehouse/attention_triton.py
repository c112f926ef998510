"""The attention by Triton kernels, on a GPU: one launch from the hidden vector to α, where torch takes five.

Logits are computed twice, once for their sum and once for α, and never written; in backward they are so again, and
their gradients, which products with the hidden vector and the weights follow, are.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..per_sample_conv.triton_conv import precision
from .coefficients import EPSILON


def coefficients(hidden: Tensor, weight: Tensor, bias: Tensor, assignment: Tensor, temperature: Tensor) -> Tensor:
    """α of `Attention`.

    Args:
        hidden: h, (B, r), in single or double precision, as the others.
        weight: Of the logits, (m · (n + 1), r).
        bias: (m · (n + 1),).
        assignment: β, (m, n).
        temperature: τ, a scalar.

    Returns:
        (B, m, n).
    """
    alpha = hidden.new_empty(hidden.shape[0], *assignment.shape)
    _launch(find_coefficients, hidden, assignment.shape, (weight, bias, assignment, temperature, alpha))
    return alpha


def gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `hidden`, `weight` and `bias`, from that of α, (B, m, n)."""
    received = hidden.new_empty(hidden.shape[0], len(bias))
    _launch(find_gradients, hidden, grad.shape[1:], (weight, bias, grad, temperature, received))
    return received @ weight, received.mT @ hidden, received.sum(0)


def _launch(kernel: triton.JITFunction, hidden: Tensor, sizes: Sequence[int], tensors: tuple[Tensor, ...]) -> None:
    """Run a kernel for every mixture and some samples at a time."""
    (batch, width), (mixtures, cells) = hidden.shape, sizes
    block_b = 16 if batch <= 16 else 32
    with torch.cuda.device_of(hidden):
        kernel[(mixtures * triton.cdiv(batch, block_b),)](
            *(tensor.contiguous() for tensor in (hidden, *tensors)),
            batch,
            width,
            mixtures,
            cells,
            epsilon=EPSILON,
            precision=precision(),
            block_b=block_b,
            block_n=64,
            block_r=16 if width <= 16 else 32,
        )


@triton.jit
def find_logits(
    hidden, weight, bias, mixture, b, cell, batch, width, cells, precision: tl.constexpr, block_r: tl.constexpr
):
    """z (samples, cells), zero beyond the last sample and the zero cell."""
    row = mixture * (cells + 1) + cell
    z = tl.zeros((b.shape[0], cell.shape[0]), hidden.dtype.element_ty)
    for first in range(0, width, block_r):
        r = first + tl.arange(0, block_r)
        h = tl.load(
            hidden + b[:, None] * width + r[None, :], mask=(b < batch)[:, None] & (r < width)[None, :], other=0.0
        )
        w = tl.load(
            weight + row[None, :] * width + r[:, None], mask=(cell <= cells)[None, :] & (r < width)[:, None], other=0.0
        )
        z = tl.dot(h, w, z, input_precision=precision, out_dtype=z.dtype)
    z += tl.load(bias + row, mask=cell <= cells, other=0.0)[None, :]
    return tl.where((b < batch)[:, None], z, 0.0)


@triton.jit
def find_coefficients(
    hidden,  # (B, r)
    weight,  # (m, n + 1, r)
    bias,  # (m, n + 1)
    assignment,  # (m, n)
    temperature,
    alpha,  # (B, m, n)
    batch,
    width,
    mixtures,
    cells,
    epsilon: tl.constexpr,
    precision: tl.constexpr,
    block_b: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    """α = (1 − τ) · z / (Σ|z| + ε) + τ · β."""
    tiles = tl.cdiv(batch, block_b)
    mixture = tl.program_id(0) // tiles
    b = tl.program_id(0) % tiles * block_b + tl.arange(0, block_b)
    total = tl.zeros((block_b,), hidden.dtype.element_ty)
    for first in range(0, cells + 1, block_n):
        cell = first + tl.arange(0, block_n)
        z = find_logits(hidden, weight, bias, mixture, b, cell, batch, width, cells, precision, block_r)
        total += tl.sum(tl.abs(z), 1)
    tau = tl.load(temperature)
    scale = (1.0 - tau) / (total + epsilon)
    for first in range(0, cells, block_n):
        cell = first + tl.arange(0, block_n)
        z = find_logits(hidden, weight, bias, mixture, b, cell, batch, width, cells, precision, block_r)
        held = tl.load(assignment + mixture * cells + cell, mask=cell < cells, other=0.0)
        tl.store(
            alpha + ((b.to(tl.int64) * mixtures + mixture) * cells)[:, None] + cell[None, :],
            z * scale[:, None] + (tau * held)[None, :],
            mask=(b < batch)[:, None] & (cell < cells)[None, :],
        )


@triton.jit
def find_gradients(
    hidden,
    weight,
    bias,
    grad,  # (B, m, n)
    temperature,
    received,  # (B, m, n + 1)
    batch,
    width,
    mixtures,
    cells,
    epsilon: tl.constexpr,
    precision: tl.constexpr,
    block_b: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    """∂z_j = (1 − τ) · (∂α_j − sign z_j · Σ ∂α z / s) / s with s = Σ|z| + ε, and ∂α = 0 for the zero cell."""
    tiles = tl.cdiv(batch, block_b)
    mixture = tl.program_id(0) // tiles
    b = tl.program_id(0) % tiles * block_b + tl.arange(0, block_b)
    own = b.to(tl.int64) * mixtures + mixture
    total = tl.zeros((block_b,), hidden.dtype.element_ty) + epsilon
    common = tl.zeros((block_b,), hidden.dtype.element_ty)
    for first in range(0, cells + 1, block_n):
        cell = first + tl.arange(0, block_n)
        z = find_logits(hidden, weight, bias, mixture, b, cell, batch, width, cells, precision, block_r)
        seen = (b < batch)[:, None] & (cell < cells)[None, :]
        g = tl.load(grad + (own * cells)[:, None] + cell[None, :], mask=seen, other=0.0)
        total += tl.sum(tl.abs(z), 1)
        common += tl.sum(g * z, 1)
    common = common / total
    scale = (1.0 - tl.load(temperature)) / total
    for first in range(0, cells + 1, block_n):
        cell = first + tl.arange(0, block_n)
        z = find_logits(hidden, weight, bias, mixture, b, cell, batch, width, cells, precision, block_r)
        seen = (b < batch)[:, None] & (cell < cells)[None, :]
        g = tl.load(grad + (own * cells)[:, None] + cell[None, :], mask=seen, other=0.0)
        sign = tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0))
        tl.store(
            received + (own * (cells + 1))[:, None] + cell[None, :],
            scale[:, None] * (g - sign * common[:, None]),
            mask=(b < batch)[:, None] & (cell <= cells)[None, :],
        )
