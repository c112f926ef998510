"""The convolution with mixed kernels, by any of its implementations."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..dynamic_conv import dynamic_conv_from_geometry
from ..exporting import exporting
from ..geometry import Geometry
from ..images import add_bias
from ..native import can_run
from .cost import cheapest
from .fused import fused_conv
from .inputs import inputs_conv
from .mixing import mix
from .naive import naive_mix
from .native import native_conv
from .partition import Partition
from .streamed import streamed_conv

CHAINED = "chained"  # what a layer can do besides, since it has the attention (`chained.py`)


def naive_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """Loops over samples, mixtures and cells: the truth, for tests."""
    return dynamic_conv_from_geometry(x, naive_mix(alpha, cells, partition), None, geometry, "naive")


def grouped_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """Upstream's formulation: mix all kernels, then one convolution with a group for every sample."""
    return dynamic_conv_from_geometry(x, mix(alpha, cells, partition), None, geometry, "grouped")


def kernels_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """Mix all kernels, then convolve each sample with its own by the best form for the shape."""
    y = dynamic_conv_from_geometry(x, mix(alpha, cells, partition), None, geometry)
    if x.stride(1) != 1 or exporting():
        return y
    # Most forms give channels first; the layers that follow should get what they would from a static one.
    return y.movedim(1, -1).contiguous().movedim(-1, 1)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Partition, Geometry], Tensor]] = {
    "naive": naive_conv,
    "grouped": grouped_conv,
    "kernels": kernels_conv,
    "streamed": streamed_conv,
    "native": native_conv,
    "fused": fused_conv,
    "inputs": inputs_conv,
}


def mixed_conv(
    alpha: Tensor,
    cells: Tensor,
    x: Tensor,
    partition: Partition,
    geometry: Geometry,
    implementation: str = "auto",
    bias: Tensor | None = None,
) -> Tensor:
    """y[b] = conv(x[b], W[b]) + bias with W[b] mixed from the cells by α[b].

    Args:
        alpha: α, (B, m, n).
        cells: The warehouse, (n, *cell).
        x: (B, Cin, *spatial).
        partition: How the kernel is cut.
        geometry: The convolution's arguments.
        implementation: "auto" or a name in `IMPLEMENTATIONS`. One that cannot do what is asked for (see `supports`)
            gives way to "kernels".
        bias: (Cout,), if any.

    Returns:
        (B, Cout, *output spatial).
    """
    dtype = computing_type(x)
    alpha, x = alpha.to(dtype), x.to(dtype)
    implementation = resolve(implementation, partition, geometry, cells.shape[0], x)
    if implementation == "native":
        return native_conv(alpha, cells, x, partition, geometry, bias)
    run = IMPLEMENTATIONS[implementation]
    large = implementation == "inputs"
    if implementation == "kernels":
        large = 4 * math.prod(partition.kernel) > x[0].numel()
    if large and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # They grow with the batch, and are cheaper to mix again than to keep.
        run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    return add_bias(run(alpha, cells, x, partition, geometry), bias)


def computing_type(x: Tensor) -> torch.dtype:
    """The type that products of x are computed in: its own, or autocast's."""
    device = x.device.type
    if x.dtype != torch.float64 and _knows_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


@torch.compiler.assume_constant_result  # which torch 2.8 could not compile otherwise
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def resolve(implementation: str, partition: Partition, geometry: Geometry, num_cells: int, x: Tensor) -> str:
    """The name of what runs for images x (B, Cin, *spatial) where `implementation` is asked for."""
    if implementation == "auto":
        return choose(partition, geometry, num_cells, x)
    if implementation == CHAINED:  # which an attention decides; of its coefficients alone
        implementation = "streamed"
    return implementation if supports(implementation, partition, geometry) else "kernels"


def choose(
    partition: Partition,
    geometry: Geometry,
    num_cells: int,
    x: Tensor,
    hidden: int = 0,
    kind: torch.dtype | None = None,
) -> str:
    """What "auto" takes for images x (B, Cin, *spatial): the cheapest of the implementations that can compute it.

    That may be "chained" if it is told r, the width of the attention's `hidden` vector. The type that is computed in is
    that of x, or another `kind`.
    """
    kind = kind or x.dtype
    native = can_run(x.device.type, kind, warn=x.device.type == "cpu" and kind == torch.float32)
    if exporting() or geometry.groups > 1:  # without a look at the batch, which has no number in a graph for export
        return "native" if native and supports("native", partition, geometry) else "kernels"
    names = ["kernels", "inputs"]
    if partition.by_positions:
        # In half precision "native" multiplies so fast that kernels first gain little at best.
        chains = hidden > 0 and not (native and kind.itemsize == 2)
        names += ["streamed"] + ["native"] * native + [CHAINED] * chains
    return cheapest(names, partition, geometry, num_cells, x, kind, hidden, native and not torch.is_grad_enabled())


def supports(implementation: str, partition: Partition, geometry: Geometry) -> bool:
    """Whether an implementation can compute a convolution.

    A graph for export must not depend on the size that it happens to be made with, and takes whole kernels. So does a
    grouped convolution, since the output channels of one cell may read different inputs; a depthwise one is native too.
    Tiles, by whatever means, need cells that span one position of the kernel.
    """
    if implementation not in ("streamed", "native", "fused", "inputs"):
        return True
    if exporting():
        return False
    if geometry.groups > 1:
        return implementation == "native" and partition.by_positions and partition.kernel[:2] == (geometry.groups, 1)
    return implementation == "inputs" or partition.by_positions
