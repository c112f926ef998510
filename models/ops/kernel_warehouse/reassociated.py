"""The matrix chain in its other order: attention and cells are multiplied first.

The logits are linear in the hidden vector h of the attention, z = F [h; 1], so a mixture is

    w_i = (1 − τ) s_i Σ_k [h; 1]_k G_ik + τ Σ_j β_ij e_j    with    G_ik = Σ_j F_ijk e_j

and s_i = 1 / (Σ_j |z_ij| + 1e-3). G and the assigned kernel behind τ are r + 2 kernels that depend on no input: a bank
for each part (see `mixture_conv`), with which a sample costs (r + 2) · |W| instead of n · |W|, whatever the budget. In
training they are made for each batch, which may pay for large batches on a GPU; a trained layer is merged once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mixture_conv import IMPLEMENTATIONS, MixtureConv, Partition, Signature, mix
from ..selection import select
from .attention import Attention
from .coefficients import EPSILON, total

NAME = "reassociated"


class Reassociated(MixtureConv):
    """What computes a layer with the factors of `reassociate`; called as any other, it chooses how for itself."""

    name = NAME

    def supports(self, signature: Signature) -> str | None:
        """As the base class."""
        if not signature.shared:
            return "it is merged"
        return None if signature.hidden else "its logits are not linear in a hidden vector, or a part of it is watched"

    def cost(self, signature: Signature) -> float:
        """As the base class."""
        if signature.device == "cpu":
            return math.inf  # where the C++ mixes as fast
        once = (signature.hidden + 2) * signature.terms * math.prod(signature.partition.kernel) / signature.images[0]
        return once + least_cost(_reassociated(signature))

    def workspace(self, signature: Signature) -> int:
        """As the base class."""
        kernels = signature.images[0] + signature.hidden + 2
        return kernels * math.prod(signature.partition.kernel) * signature.dtype.itemsize

    def choose(self, signature: Signature) -> MixtureConv:
        """What convolves with the bank of a case."""
        return select(_reassociated(signature), IMPLEMENTATIONS)


def merged(signature: Signature) -> Signature:
    """The case of a layer after it was merged."""
    return _with_own_banks(signature, signature.hidden + 1)


def _reassociated(signature: Signature) -> Signature:
    return _with_own_banks(signature, signature.hidden + 2)


def _with_own_banks(s: Signature, terms: int) -> Signature:
    """The case of `mixture_conv` with a bank for each part; written out, as torch 2.8 compiles no `_replace`."""
    rest = s.images, s.channels_last, s.dtype, s.device, s.gradients, s.of_images, s.exporting
    return Signature("mixture_conv", s.partition, s.geometry, False, terms, 0, *rest)


def least_cost(signature: Signature) -> float:
    """Of the implementations of `mixture_conv` that can compute a case."""
    return min(i.cost(signature) for i in IMPLEMENTATIONS.values() if i.supports(signature) is None)


def reassociate(
    attention: Attention, cells: Tensor, pooled: Tensor, temperature: Tensor, partition: Partition
) -> tuple[Tensor, Tensor]:
    """α (B, m, r + 2), and the bank (r + 2, *kernel) that it belongs to, for the means (B, C) of images."""
    alpha = (1 - temperature) * merged_coefficients(attention, pooled)
    alpha = F.pad(alpha, (0, 1)) + F.pad(temperature.to(alpha.dtype).expand(*alpha.shape[:2], 1), (alpha.shape[2], 0))
    rows = torch.cat([_rows(attention), attention.assignment[None].to(alpha.dtype)])
    return alpha, mix(rows, cells, partition)


def merge(attention: Attention, cells: Tensor, partition: Partition) -> Tensor:
    """G, the bank (r + 1, *kernel) of a layer at temperature 0."""
    return mix(_rows(attention), cells, partition)


def merged_coefficients(attention: Attention, pooled: Tensor) -> Tensor:
    """s [h; 1], (B, m, r + 1), for the means (B, C) of images."""
    hidden = attention.hidden(pooled)
    z = attention.logits(hidden)
    return F.pad(hidden, (0, 1), value=1.0).unsqueeze(1) / (total(z) + EPSILON)


def _rows(attention: Attention) -> Tensor:
    """F, with the logits' offset as its last row: (r + 1, m, n)."""
    weight = attention.fc1.weight
    unit = torch.eye(attention.fc1.out_features, dtype=weight.dtype, device=weight.device)
    rows = torch.cat([attention.logits(unit, offset=False), attention.logits(torch.zeros_like(unit[:1]))])
    return rows[..., :-1]
