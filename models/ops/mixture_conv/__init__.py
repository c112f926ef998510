"""Convolution with kernels that are mixed for each sample from a bank; README.md has the equation and the layouts."""

from torch import Tensor

from ..context import computing_type
from ..geometry import Geometry
from ..images import add_bias, scaled
from ..selection import select
from .implementations import IMPLEMENTATIONS, MixtureConv
from .mixing import cut, is_shared, mix
from .partition import Partition
from .signature import Signature, signature_of

__all__ = [
    "IMPLEMENTATIONS",
    "MixtureConv",
    "Partition",
    "Signature",
    "cut",
    "mix",
    "mixture_conv",
    "signature_of",
]


def mixture_conv(
    x: Tensor,
    alpha: Tensor,
    bank: Tensor,
    partition: Partition,
    geometry: Geometry,
    bias: Tensor | None = None,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """y[b] = out_scale[b] · conv(x[b] · in_scale[b], W[b]) + bias with W[b, part] = Σ_r α[b, part, r] · bank[…, r].

    The kernel (Cout, Cin/groups, *k) is cut into m equal cells, its parts (see `Partition`). Either all parts share one
    bank of cells, as in KernelWarehouse; or each part has a bank of its own, and all of them are n kernels: the
    experts of DY-Conv and CondConv, of one part, and of ODConv, one part for each position of the kernel.

    Args:
        x: Images, (B, Cin, *spatial) with one to three spatial dimensions.
        alpha: α, (B, m, n).
        bank: (n, *cell), shared by all parts, or (n, *kernel).
        partition: How the kernel is cut.
        geometry: Stride, padding, dilation and groups.
        bias: (Cout,) or (B, Cout).
        in_scale: (B, Cin), of the input's channels: as good as a scale of the kernels' input channels, and cheaper.
        out_scale: (B, Cout), of the output's channels, before the bias.
        implementation: "auto", or a name in `IMPLEMENTATIONS`.

    Returns:
        (B, Cout, *output spatial), of x's type or autocast's.

    Raises:
        ValueError: Shapes that do not fit, or an implementation that cannot compute the case; the message says why and
            what can.
    """
    shared = _check(x, alpha, bank, partition, geometry)
    signature = signature_of(x, len(bank), shared, partition, geometry, "mixture_conv")
    chosen = select(signature, IMPLEMENTATIONS, implementation)
    kind = computing_type(x)
    y = chosen(scaled(x, in_scale).to(kind), alpha.to(kind), bank, partition, geometry)
    return add_bias(scaled(y, out_scale), bias)


def _check(x: Tensor, alpha: Tensor, bank: Tensor, partition: Partition, geometry: Geometry) -> bool:
    shared = is_shared(bank, partition)
    channels = partition.kernel[1] * geometry.groups
    if x.ndim != len(partition.kernel) or x.shape[1] != channels:
        raise ValueError(
            f"kernels {partition.kernel} in {geometry.groups} groups need an input (B, {channels}, "
            f"{len(geometry.stride)} sizes), found {tuple(x.shape)}"
        )
    batch = x.shape[0]  # which `len` would make a constant in a graph
    if tuple(alpha.shape[1:]) != (partition.mixtures, len(bank)) or alpha.shape[0] != batch:
        raise ValueError(
            f"α must be (B = {batch}, parts = {partition.mixtures}, terms = {len(bank)}), found {tuple(alpha.shape)}"
        )
    return shared
