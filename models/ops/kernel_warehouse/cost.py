"""Which implementation costs least, by counts of what it computes and moves.

Costs are in multiply-adds of a large matrix product. The factors are measured, on a CPU that keeps freed memory (see
`engine/memory.py`), over the layers of ResNet18, ResNet50, MobileNetV2 and ConvNeXt-T at batches of 1 to 32, and for
images of 32×32 and 64×64 at batches of 1 to 128 (`scripts/benchmark.py --layers`, and `tune`).

On a GPU none of them is measured. They are reasoned: a convolution with a group for every sample is slow there (by 10
or more, as upstream's users report), and an A100 or an H100 makes about 100 multiply-adds of a product in bf16 while it
moves one byte, so that writing and reading one value costs 400, and putting it in order as much again. Starting an
operator is not counted: others still run, or a graph was captured. The fused convolution has not run on a GPU yet and
is taken only by name; the native one cannot.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import Geometry
from .partition import Partition


@dataclass(frozen=True)
class Factors:
    """What an operation costs on a device.

    Attributes:
        grouped: A multiply-add of a convolution with a group for every sample.
        native: A multiply-add of the native convolution.
        value: Writing and reading one value of a kernel there.
        thin: A multiply-add of a thin product: of mixing kernels, and of a tile with its columns.
        tile: Handling one value of a tile.
        single: Mixing one value of a kernel, besides its multiply-adds, where each mixture is a product of its own.
        row: Mixing one row of a cell's input channels so, besides.
        column: Copying one value into the columns of streaming.
        kernel: Ordering one value of a kernel for the grouped convolution, while the batch's kernels fit in the cache.
        far_kernel: The same when they do not.
        activation: Writing or ordering one value of an input or an output.
        mixed_input: Writing and reading one value of a mixed input.
        product: Writing one value of the product of attention and cells, where it is applied natively.
        operator: Starting an operator of torch.
        cache: Bytes of kernels that fit in the cache.
        read: Reading one value from memory.
    """

    grouped: float
    native: float = 1.0
    value: float = 12
    thin: float = 1.2
    tile: float = 20
    single: float = 40
    row: float = 12_000
    column: float = 60
    kernel: float = 14
    far_kernel: float = 60
    activation: float = 40
    mixed_input: float = 15
    product: float = 125
    operator: float = 10e6
    cache: int = 16 << 20
    read: float = 30


FACTORS = {
    "cpu": Factors(grouped=1.0),
    "cuda": Factors(
        grouped=10.0,
        tile=400,
        single=100,
        row=0,
        column=400,
        kernel=800,
        far_kernel=800,
        activation=400,
        mixed_input=400,
        operator=0,
    ),
}

# Of the native convolution with products: what a position costs, bytes that caches cannot hold, and samples that a
# product is then read for.
_FOLDED, _FAR_PRODUCTS, _SAMPLES_OF_A_READ = 1.1, 64 << 20, 8

# Operators of torch in a call, beside the one that "native" is.
_OPERATORS = {"kernels": 3, "inputs": 4, "streamed": 6, "chained": 8}


def cheapest(
    names: Sequence[str],
    partition: Partition,
    geometry: Geometry,
    num_cells: int,
    x: Tensor,
    kind: torch.dtype,
    hidden: int = 0,
    natively: bool = False,
) -> str:
    """The one of these that has the least `costs` for images x (B, Cin, *spatial), computed in a type."""
    # A compiler looks through the cache, and would say so.
    find = _cheapest.__wrapped__ if torch.compiler.is_compiling() else _cheapest
    layout = kind.itemsize, x.stride(1) == 1, x.device.type
    return find(tuple(names), partition, geometry, num_cells, tuple(x.shape), hidden, natively, *layout)


@functools.lru_cache(1024)
def _cheapest(
    names: tuple[str, ...],
    partition: Partition,
    geometry: Geometry,
    num_cells: int,
    shape: tuple[int, ...],
    hidden: int,
    natively: bool,
    itemsize: int,
    channels_last: bool,
    device: str,
) -> str:
    factors = FACTORS.get(device, FACTORS["cuda"])
    positions = math.prod(geometry.output_size(shape[2:], partition.kernel[2:]))
    more = geometry.groups, channels_last, hidden, natively
    estimates = costs(partition, num_cells, shape[0], positions, itemsize, factors, *more)
    best = names[0]
    for name in names:  # by comparisons, which a compiler can guard where sizes are symbols
        if estimates[name] < estimates[best]:
            best = name
    return best


def costs(
    partition: Partition,
    num_cells: int,
    batch: int,
    positions: int,
    itemsize: int,
    factors: Factors,
    groups: int = 1,
    channels_last: bool = True,
    hidden: int = 0,
    natively: bool = False,
) -> dict[str, float]:
    """Cost of one sample by each implementation.

    Args:
        partition: How the kernel is cut.
        num_cells: n.
        batch: Samples.
        positions: P, output positions of a sample.
        itemsize: Bytes of a value.
        factors: Of the device.
        groups: Of the convolution.
        channels_last: Whether channels lie together in memory, as tiles read them, or positions, as whole kernels do.
        hidden: r, the width of the attention's hidden vector, if "chained" is to be among them.
        natively: Whether "native" applies what "chained" multiplies, as in inference on a CPU.

    Returns:
        Multiply-adds of a large product, by name.
    """
    *_, blocks_out, _ = partition.grid
    kernel, taps = math.prod(partition.kernel), math.prod(partition.kernel[2:])
    mixing = factors.thin * num_cells
    outputs = partition.kernel[0] * positions
    inputs = partition.kernel[1] * groups * positions
    columns = inputs * taps if taps > 1 else 0
    fits = batch * kernel * itemsize <= factors.cache
    ordering = factors.kernel if fits else factors.far_kernel
    whole = factors.thin if taps == 1 else factors.grouped
    read = inputs if taps > 1 else 0  # a 1×1 kernel reads any layout
    streaming = factors.thin * positions + factors.tile
    around = factors.column * columns + factors.activation * (0 if channels_last else read)
    arranging = factors.activation * (0 if channels_last else inputs + outputs)
    mixed_inputs = blocks_out * num_cells * math.prod(partition.cell[1:]) * positions
    estimates = {
        "kernels": kernel * (mixing + ordering + whole * positions)
        + factors.activation * (read + outputs if channels_last else 0),
        "streamed": kernel * (mixing + streaming) + around,
        "native": kernel * (factors.native * (num_cells + positions) + factors.value) + arranging,
        "inputs": mixed_inputs * (partition.mixtures // blocks_out + partition.cell[0] + factors.mixed_input),
    }
    rows = hidden + 2
    once = rows * num_cells / batch
    if hidden and natively:
        once += rows * factors.product / batch
        # Products that are too many for the caches are read again for every few samples.
        far = rows * kernel * itemsize > _FAR_PRODUCTS
        again = factors.read * rows / _SAMPLES_OF_A_READ if far else 0
        estimates["chained"] = kernel * (once + rows + factors.value + _FOLDED * positions + again) + arranging
    elif hidden:
        single = factors.single + factors.row / partition.cell[1]
        estimates["chained"] = kernel * (once + factors.thin * rows + single + streaming) + around
    return {name: cost + factors.operator * _OPERATORS.get(name, 0) / batch for name, cost in estimates.items()}


def folding_saves(
    partition: Partition,
    hidden: int,
    num_cells: int,
    batch: int,
    positions: int,
    itemsize: int,
    factors: Factors,
    native: bool = False,
    folded_native: bool = False,
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
        native: Whether "native" can run.
        folded_native: Whether it can with the products, whose type may be another.
    """
    now = costs(partition, num_cells, batch, positions, itemsize, factors)
    way = "native" if folded_native else "streamed"
    folded = costs(partition, hidden + 1, batch, positions, itemsize, factors)[way]
    best = min(cost for name, cost in now.items() if native or name != "native")
    read_now, read_folded = num_cells * math.prod(partition.cell), (hidden + 1) * math.prod(partition.kernel)
    return best - folded + factors.read * (read_now - read_folded) / batch
