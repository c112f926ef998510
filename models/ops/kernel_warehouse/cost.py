"""Which implementation costs least, by counts of what it computes and moves.

Costs are in multiply-adds of a large matrix product. The factors are measured, on a CPU, over the layers of ResNet18,
ResNet50, MobileNetV2 and ConvNeXt-T at batches of 1 to 64 (`scripts/benchmark.py --layers`).

On a GPU none of them is measured. They are reasoned: a convolution with a group for every sample is slow there (by 10
or more, as upstream's users report), and an A100 or an H100 makes about 100 multiply-adds of a product in bf16 while it
moves one byte, so that writing and reading one value costs 400, and putting it in order as much again. The fused
convolution has not run on a GPU yet and is taken only by name.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dynamic_conv import Geometry
from .partition import Partition


@dataclass(frozen=True)
class Factors:
    """What an operation costs on a device.

    Attributes:
        grouped: A multiply-add of a convolution with a group for every sample.
        thin: A multiply-add of a thin product: of mixing kernels, and of a tile with its columns.
        tile: Handling one value of a tile.
        column: Copying one value into the columns of streaming.
        kernel: Ordering one value of a kernel for the grouped convolution, while the batch's kernels fit in the cache.
        far_kernel: The same when they do not.
        mixed_input: Writing and reading one value of a mixed input.
        cache: Bytes of kernels that fit in the cache.
        read: Reading one value from memory.
    """

    grouped: float
    thin: float = 1.4
    tile: float = 20
    column: float = 30
    kernel: float = 10
    far_kernel: float = 100
    mixed_input: float = 25
    cache: int = 16 << 20
    read: float = 30


FACTORS = {
    "cpu": Factors(grouped=1.0),
    "cuda": Factors(grouped=10.0, tile=400, column=400, kernel=800, far_kernel=800, mixed_input=400),
}


def cheapest(partition: Partition, geometry: Geometry, num_cells: int, x: Tensor) -> str:
    """The implementation with the least `costs`; where graphs are made for any size, "kernels"."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "kernels"
    factors = FACTORS.get(x.device.type, FACTORS["cuda"])
    positions = math.prod(geometry.output_size(x.shape[2:], partition.kernel[2:]))
    estimates = costs(partition, num_cells, len(x), positions, x.element_size(), factors)
    return min(estimates, key=estimates.__getitem__)


def costs(
    partition: Partition, num_cells: int, batch: int, positions: int, itemsize: int, factors: Factors
) -> dict[str, float]:
    """Cost of one sample by each implementation.

    Args:
        partition: How the kernel is cut.
        num_cells: n.
        batch: Samples.
        positions: P, output positions of a sample.
        itemsize: Bytes of a value.
        factors: Of the device.

    Returns:
        Multiply-adds of a large product, by name.
    """
    *_, blocks_out, _ = partition.grid
    cout = partition.cell[0]
    kernel = math.prod(partition.kernel)
    taps = math.prod(partition.kernel[2:])
    columns = math.prod(partition.kernel[1:]) * positions
    mixed_inputs = blocks_out * num_cells * math.prod(partition.cell[1:]) * positions
    fits = batch * kernel * itemsize <= factors.cache
    per_value = factors.kernel if fits else factors.far_kernel
    per_product = factors.thin if taps == 1 else factors.grouped
    return {
        "kernels": kernel * (factors.thin * num_cells + per_value + per_product * positions),
        "streamed": kernel * (factors.thin * (num_cells + positions) + factors.tile)
        + (factors.column * columns if taps > 1 else 0),
        "inputs": mixed_inputs * (partition.mixtures // blocks_out + cout + factors.mixed_input),
    }


def folding_saves(
    partition: Partition, hidden: int, num_cells: int, batch: int, positions: int, itemsize: int, factors: Factors
) -> float:
    """What a sample of a batch costs less when attention and cells are folded (`folded`); negative where it is more.

    Both orders read something for the whole batch, the cells or the products, which counts when the batch is small.

    Args:
        partition: How the kernel is cut.
        hidden: r, the width of the attention's hidden vector.
        num_cells: n.
        batch: Samples.
        positions: P, output positions of a sample.
        itemsize: Bytes of a value.
        factors: Of the device.
    """
    kernel = math.prod(partition.kernel)
    now = min(costs(partition, num_cells, batch, positions, itemsize, factors).values())
    folded = costs(partition, hidden + 1, batch, positions, itemsize, factors)["streamed"]
    read_now, read_folded = num_cells * math.prod(partition.cell), (hidden + 1) * kernel
    return now - folded + factors.read * (read_now - read_folded) / batch
