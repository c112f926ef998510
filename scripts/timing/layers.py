"""The time of every implementation for every distinct layer of a network: the measurement behind the cost model."""

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelwarehouse.models.ops.kernel_warehouse import NAMES, KWLinear
from kernelwarehouse.models.tuning import Layer, Results, measure, step

from .clock import HALF, arithmetic, autocast
from .results import table_head, table_row

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def time_layer(layer: Layer, precision: str, rounds: int) -> None:
    """Fill in `seconds`: of whole layers with their attention, and of a static layer of the same shape."""
    module, device = layer.module, layer.x.device
    steps = {"static": _static_step(layer)}
    steps |= {name: layer.step(name) for name in NAMES if layer.can_try(name)}
    if not layer.training and module.attention.is_linear():
        merged = copy.deepcopy(module)
        merged.implementation = "auto"
        merged.merge(HALF.get(precision))
        steps["merged"] = step(merged, layer.x, layer.y, {}, training=False)
    with arithmetic(precision), autocast(precision, device):
        seconds = measure(steps, rounds, device)
    layer.seconds = {name: statistics.median(values) for name, values in seconds.items()}


def _static_step(layer: Layer) -> Callable[[], Results]:
    kernel, geometry = layer.module.partition.kernel, layer.module.geometry
    like = {"device": layer.x.device, "requires_grad": layer.training}
    if isinstance(layer.module, KWLinear):
        weight = torch.randn(kernel[:2], **like)
        return step(lambda x: F.linear(x, weight), layer.x, layer.y, {"the kernel": [weight]}, layer.training)
    weight = torch.randn(kernel, **like)
    if len(kernel) == 4:
        weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_(layer.training)

    def forward(x: Tensor) -> Tensor:
        x, padding = geometry.split_padding(x)
        conv = _CONV[len(geometry.stride)]
        return conv(x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups)

    return step(forward, layer.x, layer.y, {"the kernel": [weight]}, layer.training)


def positions_of(layer: Layer) -> int:
    """Output positions of one sample."""
    return layer.y[0].numel() // layer.module.partition.kernel[0]


def table(layers: Sequence[Layer]) -> str:
    """A row of milliseconds for each layer, what "auto" takes of them, and sums over the network."""
    forced = [name for name in NAMES if any(name in layer.seconds for layer in layers)]
    timed = ("static", *forced, "merged")
    width = max(len("all layers"), *(len(layer.name) for layer in layers))
    sizes = {"count": 5, "batch": 5, "P": 6, "kernel": 16, "cell": 11, "n": 5}
    columns = {"layer": width, **sizes, **dict.fromkeys(timed, 9), "auto": 9, "auto / best": 11}
    rows = []
    for layer in layers:
        partition = layer.module.partition
        shapes = ("×".join(map(str, shape)) for shape in (partition.kernel, partition.cell))
        sizes = (layer.count, len(layer.x), positions_of(layer), *shapes, len(layer.module.cells))
        auto, best = _auto_and_best(layer)
        rows.append([layer.name, *map(str, sizes), *(_milliseconds(layer.seconds.get(name)) for name in timed)])
        rows[-1] += [layer.estimated(), "–" if auto is None else f"{auto / best:.2f}"]
    sums = [_milliseconds(_total(layers, [layer.seconds.get(name) for layer in layers])) for name in timed]
    auto, best = (_total(layers, times) for times in zip(*map(_auto_and_best, layers), strict=True))
    count = str(sum(layer.count for layer in layers))
    rows.append(["all layers", count, *[""] * 5, *sums])
    rows[-1] += [_milliseconds(auto), "–" if auto is None else f"{auto / best:.2f}"]
    return "\n".join([table_head(columns), *(table_row(row, list(columns.values())) for row in rows)])


def _auto_and_best(layer: Layer) -> tuple[float | None, float]:
    """Seconds of what "auto" takes, None if it was not tried, and of the fastest that it could take."""
    return layer.seconds.get(layer.estimated()), min(layer.seconds[n] for n in NAMES if n in layer.seconds)


def _total(layers: Sequence[Layer], seconds: Sequence[float | None]) -> float | None:
    """Sum over the network; None for what was not tried in every layer."""
    if None in seconds:
        return None
    return sum(layer.count * value for layer, value in zip(layers, seconds, strict=True))


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.2f}"


def record(layer: Layer) -> dict[str, Any]:
    """What is kept of a layer in JSON."""
    partition, geometry = layer.module.partition, layer.module.geometry
    return {
        "layer": layer.name,
        "count": layer.count,
        "batch": len(layer.x),
        "positions": positions_of(layer),
        "kernel": partition.kernel,
        "cell": partition.cell,
        "cells": len(layer.module.cells),
        "groups": geometry.groups,
        "stride": geometry.stride,
        "auto": layer.estimated(),
        "seconds": layer.seconds,
    }
