"""The time of every implementation for every distinct layer of a network: the measurement behind the cost model."""

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelwarehouse.models.ops.kernel_warehouse import KWLayer, KWLinear
from kernelwarehouse.models.ops.kernel_warehouse.layer import NAMES
from kernelwarehouse.models.ops.kernel_warehouse.mixed_conv import choose, computing_type, supports
from kernelwarehouse.models.ops.native import can_run

from .clock import HALF, arithmetic, autocast, measure
from .results import table_head, table_row

MOST_BYTES = 1 << 30  # kernels, mixed inputs or products of a folded layer beyond it are not tried
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def names(device: torch.device) -> tuple[str, ...]:
    """The implementations that are worth timing on a device."""
    return tuple(name for name in NAMES if name != "naive" and (name != "fused" or device.type == "cuda"))


@dataclass
class Layer:
    """Layers of one shape in a network.

    Attributes:
        name: Of the first of them.
        module: The first of them.
        x: Its input.
        y: Its output.
        dtype: What it computes in.
        count: How many there are.
        seconds: Median by implementation, and of the static layer under "static".
        train: Whether they are of forward and backward.
    """

    name: str
    module: KWLayer
    x: Tensor
    y: Tensor
    dtype: torch.dtype
    count: int
    seconds: dict[str, float]
    train: bool = True

    @property
    def images(self) -> Tensor:
        """The input as the convolution sees it, (B, Cin, *spatial)."""
        if not isinstance(self.module, KWLinear):
            return self.x
        dims = len(self.module.geometry.stride)
        return self.x.reshape(len(self.x), -1, self.module.in_features).mT.unflatten(2, (-1, *(1,) * (dims - 1)))

    @property
    def positions(self) -> int:
        """P, the output positions of one sample."""
        return self.y[0].numel() // self.module.partition.kernel[0]

    def chosen(self) -> str:
        """The implementation that "auto" takes."""
        module, images = self.module, self.images.to(self.dtype)
        hidden = module.attention.fc1.out_features
        with torch.set_grad_enabled(self.train):
            return choose(module.partition, module.geometry, len(module.cells), images, hidden)

    def can_try(self, name: str) -> bool:
        """Whether an implementation, or "folded", exists for the layer, and writes no more than `MOST_BYTES`."""
        if name == "native" and not can_run(self.x.device.type, self.dtype):
            return False
        partition, batch, n = self.module.partition, len(self.x), len(self.module.cells)
        kernel = math.prod(partition.kernel)
        written = {
            "streamed": 0,
            "native": 0,
            "chained": 2 * (self.module.attention.fc1.out_features + 2) * kernel,
            "folded": (self.module.attention.fc1.out_features + 1) * kernel,
            "inputs": batch * partition.grid[-2] * n * math.prod(partition.cell[1:]) * self.positions,
        }.get(name, batch * kernel)
        fits = written * self.x.element_size() <= MOST_BYTES
        return fits and supports("streamed" if name == "folded" else name, partition, self.module.geometry)


def distinct_layers(net: nn.Module, x: Tensor, precision: str) -> list[Layer]:
    """Run the network once and return its converted layers, those of equal shapes as one."""
    layers: dict[Any, Layer] = {}
    paths = {module: name for name, module in net.named_modules()}

    def note(module: KWLayer, args: tuple[Tensor, ...], y: Tensor) -> None:
        (seen,) = args
        key = (type(module), seen.shape, seen.dtype, module.partition, module.geometry, len(module.cells))
        layer = layers.setdefault(
            key, Layer(paths[module], module, seen.detach(), y.detach(), computing_type(seen), 0, {})
        )
        layer.count += 1

    handles = [m.register_forward_hook(note) for m in net.modules() if isinstance(m, KWLayer)]
    with torch.no_grad(), autocast(precision, x.device):
        net(x)
    for handle in handles:
        handle.remove()
    return list(layers.values())


def time_layer(layer: Layer, train: bool, precision: str, rounds: int) -> None:
    """Fill in `seconds`: of whole layers with their attention, and of a static layer of the same shape."""
    module, layer.train = layer.module, train
    steps = {"static": _static_step(layer, train, precision)}
    parameters = [*module.parameters(), module.cells]
    for name in filter(layer.can_try, names(layer.x.device)):

        def forward(x: Tensor, name: str = name) -> Tensor:
            module.implementation = name
            return module(x)

        steps[name] = _step(forward, layer, parameters, train, precision)
    if not train and layer.can_try("folded"):
        # A copy, but of the layer alone: the memo keeps deepcopy from the cells of the whole network.
        folded = copy.deepcopy(module, {id(module.warehouses): module.warehouses})
        folded.fold(HALF.get(precision))
        steps["folded"] = _step(folded, layer, parameters, train, precision)
    with arithmetic(precision):
        seconds = measure(steps, rounds, layer.x.device)
    layer.seconds = {name: statistics.median(values) for name, values in seconds.items()}


def _static_step(layer: Layer, train: bool, precision: str) -> Callable[[], None]:
    kernel, geometry = layer.module.partition.kernel, layer.module.geometry
    like = {"device": layer.x.device, "requires_grad": train}
    if isinstance(layer.module, KWLinear):
        weight = torch.randn(kernel[:2], **like)
        return _step(lambda x: F.linear(x, weight), layer, [weight], train, precision)
    weight = torch.randn(kernel, **like)
    if len(kernel) == 4:
        weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_(train)

    def forward(x: Tensor) -> Tensor:
        x, padding = geometry.split_padding(x)
        conv = _CONV[len(geometry.stride)]
        return conv(x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups)

    return _step(forward, layer, [weight], train, precision)


def _step(
    forward: Callable[[Tensor], Tensor], layer: Layer, parameters: Sequence[Tensor], train: bool, precision: str
) -> Callable[[], None]:
    """Inference, or forward and the gradients of the input and of the parameters."""
    device = layer.x.device
    received = torch.randn_like(layer.y)

    def infer() -> None:
        with torch.inference_mode(), autocast(precision, device):
            forward(layer.x)

    def forward_backward() -> None:
        x = layer.x.detach().requires_grad_()
        with autocast(precision, device):
            y = forward(x)
        torch.autograd.grad(y, [x, *parameters], received.to(y.dtype))

    return forward_backward if train else infer


def table(layers: Sequence[Layer]) -> str:
    """A row of milliseconds for each layer, what "auto" takes of them, and sums over the network."""
    forced = names(layers[0].x.device)
    timed = ("static", *forced, "folded")
    width = max(len("all layers"), *(len(layer.name) for layer in layers))
    sizes = {"count": 5, "batch": 5, "P": 6, "kernel": 16, "cell": 11, "n": 5}
    columns = {"layer": width, **sizes, **dict.fromkeys(timed, 9), "auto": 9, "auto / best": 11}
    rows = []
    for layer in layers:
        partition = layer.module.partition
        shapes = ("×".join(map(str, shape)) for shape in (partition.kernel, partition.cell))
        sizes = (layer.count, len(layer.x), layer.positions, *shapes, len(layer.module.cells))
        auto, best = _auto_and_best(layer)
        rows.append([layer.name, *map(str, sizes), *(_milliseconds(layer.seconds.get(name)) for name in timed)])
        rows[-1] += [layer.chosen(), "–" if auto is None else f"{auto / best:.2f}"]
    sums = [_milliseconds(_total(layers, [layer.seconds.get(name) for layer in layers])) for name in timed]
    auto, best = (_total(layers, times) for times in zip(*map(_auto_and_best, layers), strict=True))
    count = str(sum(layer.count for layer in layers))
    rows.append(["all layers", count, *[""] * 5, *sums])
    rows[-1] += [_milliseconds(auto), "–" if auto is None else f"{auto / best:.2f}"]
    return "\n".join([table_head(columns), *(table_row(row, list(columns.values())) for row in rows)])


def _auto_and_best(layer: Layer) -> tuple[float | None, float]:
    """Seconds of what "auto" takes, None if it was not tried, and of the fastest that it could take."""
    return layer.seconds.get(layer.chosen()), min(layer.seconds[n] for n in NAMES if n in layer.seconds)


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
        "positions": layer.positions,
        "kernel": partition.kernel,
        "cell": partition.cell,
        "cells": len(layer.module.cells),
        "groups": geometry.groups,
        "stride": geometry.stride,
        "auto": layer.chosen(),
        "seconds": layer.seconds,
    }
