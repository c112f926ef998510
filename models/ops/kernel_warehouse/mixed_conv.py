"""The convolution with mixed kernels, by any of its implementations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..dynamic_conv import Geometry, dynamic_conv_from_geometry
from .cost import cheapest
from .fused import fused_conv
from .inputs import inputs_conv
from .mixing import mix
from .naive import naive_mix
from .partition import Partition
from .streamed import streamed_conv


def naive_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """Loops over samples, mixtures and cells: the truth, for tests."""
    return dynamic_conv_from_geometry(x, naive_mix(alpha, cells, partition), None, geometry, "naive")


def grouped_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """Upstream's formulation: mix all kernels, then one convolution with a group for every sample."""
    return dynamic_conv_from_geometry(x, mix(alpha, cells, partition), None, geometry, "grouped")


def kernels_conv(alpha: Tensor, cells: Tensor, x: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
    """Mix all kernels, then convolve each sample with its own by the best form for the shape."""
    return dynamic_conv_from_geometry(x, mix(alpha, cells, partition), None, geometry)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Partition, Geometry], Tensor]] = {
    "naive": naive_conv,
    "grouped": grouped_conv,
    "kernels": kernels_conv,
    "streamed": streamed_conv,
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
) -> Tensor:
    """y[b] = conv(x[b], W[b]) with W[b] mixed from the cells by α[b].

    Args:
        alpha: α, (B, m, n).
        cells: The warehouse, (n, *cell).
        x: (B, Cin, *spatial).
        partition: How the kernel is cut.
        geometry: The convolution's arguments.
        implementation: "auto" or a name in `IMPLEMENTATIONS`. One that cannot do what is asked for (see `supports`)
            gives way to "kernels".

    Returns:
        (B, Cout, *output spatial).
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        alpha, x = alpha.to(dtype), x.to(dtype)
    if implementation == "auto":
        implementation = choose(partition, geometry, len(cells), x)
    elif not supports(implementation, partition, geometry):
        implementation = "kernels"
    run = IMPLEMENTATIONS[implementation]
    if implementation in ("kernels", "inputs") and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Kernels and mixed inputs grow with the batch; they are cheaper to mix again than to keep.
        return checkpoint(run, alpha, cells, x, partition, geometry, use_reentrant=False, preserve_rng_state=False)
    return run(alpha, cells, x, partition, geometry)


def choose(partition: Partition, geometry: Geometry, num_cells: int, x: Tensor) -> str:
    """What "auto" takes for images x (B, Cin, *spatial): the cheapest implementation, or "kernels" if that cannot."""
    name = cheapest(partition, geometry, num_cells, x)
    return name if supports(name, partition, geometry) else "kernels"


def supports(implementation: str, partition: Partition, geometry: Geometry) -> bool:
    """Whether an implementation can compute a convolution.

    In a grouped convolution the output channels of one cell may read different inputs, and a graph for export must not
    depend on the size that it happens to be made with: both need whole kernels. Streaming, fused or not, needs cells
    that span one position of the kernel.
    """
    if implementation not in ("streamed", "fused", "inputs"):
        return True
    if geometry.groups > 1 or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    return implementation == "inputs" or all(size == 1 for size in partition.cell[2:])
