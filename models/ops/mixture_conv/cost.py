"""What each implementation should cost, by counts of what it computes and moves.

Costs are multiply-adds of a large matrix product, for one sample. The factors of a CPU are measured, over the layers of
ResNet18, ResNet50, MobileNetV2 and ConvNeXt-T (`scripts/benchmark.py --layers`, and `tune`). On a GPU none is: they are
reasoned. A convolution with a group for every sample is slow there, and writing and reading one value costs as much as
400 multiply-adds in bf16. Starting an operator is not counted there: others still run, or a graph was captured.
"""

import math
from dataclasses import dataclass

from .signature import Signature


@dataclass(frozen=True)
class Factors:
    """What an operation costs on a device.

    Attributes:
        grouped: A multiply-add of a convolution with a group for every sample.
        thin: A multiply-add of a thin product, such as mixing kernels.
        kernel: Ordering one value of a kernel, while the batch's kernels fit in the cache.
        far_kernel: The same when they do not.
        activation: Writing or ordering one value of an input or an output.
        mixed_input: Writing and reading one value of a mixed input.
        tile: Writing and reading one value of a kernel in the C++.
        operator: Starting an operator of torch.
        cache: Bytes of kernels that fit in the cache.
        read: Reading one value from memory.
    """

    grouped: float = 1.0
    thin: float = 1.2
    kernel: float = 14
    far_kernel: float = 60
    activation: float = 40
    mixed_input: float = 15
    tile: float = 12
    operator: float = 10e6
    cache: int = 16 << 20
    read: float = 30


CPU = Factors()
GPU = Factors(grouped=10, kernel=800, far_kernel=800, activation=400, mixed_input=400, operator=0)


def factors_of(s: Signature) -> Factors:
    """Those of its device."""
    return CPU if s.device == "cpu" else GPU


def materialize(s: Signature) -> float:
    """Mixing whole kernels, and convolving each sample with its own."""
    f, p = factors_of(s), s.partition
    kernel, taps = math.prod(p.kernel), math.prod(p.kernel[2:])
    fits = s.images[0] * kernel * s.dtype.itemsize <= f.cache
    product = f.thin if taps == 1 else f.grouped
    values = kernel * (f.thin * s.terms + (f.kernel if fits else f.far_kernel) + product * s.positions)
    if s.channels_last:  # a 1×1 kernel reads any layout
        values += f.activation * (p.kernel[0] + (s.images[1] if taps > 1 else 0)) * s.positions
    return values + 3 * f.operator / s.images[0]


def mix_inputs(s: Signature) -> float:
    """Mixing inputs, and one product with the bank."""
    f, p = factors_of(s), s.partition
    blocks_out = p.grid[-2]
    mixed = blocks_out * s.terms * math.prod(p.cell[1:]) * s.positions
    return mixed * (p.mixtures // blocks_out + p.cell[0] + f.mixed_input) + 4 * f.operator / s.images[0]


def cpp(s: Signature) -> float:
    """Mixing and convolving tile by tile in C++."""
    f, p = factors_of(s), s.partition
    arranging = 0 if s.channels_last else f.activation * (s.images[1] + p.kernel[0]) * s.positions
    return math.prod(p.kernel) * (s.terms + s.positions + f.tile) + arranging


def merge_saves(s: Signature, now: float, merged: float, hidden: int) -> float:
    """What a sample costs less when attention and bank are multiplied beforehand; negative where it is more.

    Args:
        s: The case as it is computed now, with a shared bank.
        now: What it costs now.
        merged: What it costs with hidden + 1 terms of its own for each part.
        hidden: r, the width of the attention's hidden vector.
    """
    read_now, read_merged = s.terms * math.prod(s.partition.cell), (hidden + 1) * math.prod(s.partition.kernel)
    return now - merged + factors_of(s).read * (read_now - read_merged) / s.images[0]
