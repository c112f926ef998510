"""The time of every implementation for every distinct layer of a network: the measurement behind the cost model."""

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kernelwarehouse.models.tuning import Layer, measure, step

from .clock import HALF, arithmetic, autocast
from .results import table_head, table_row


def time_layer(layer: Layer, static: nn.Module, precision: str, rounds: int) -> None:
    """Fill in `seconds`: of whole layers with their attention, and of the static layer in its place."""
    module, device = layer.module, layer.x.device
    static = static.train(layer.training)
    steps = {"static": step(static, layer.x, layer.y, {"parameters": list(static.parameters())}, layer.training)}
    steps |= {name: layer.step(name) for name in layer.candidates if layer.can_try(name)}
    if not layer.training and (merged := _merged(module, HALF.get(precision))):
        steps["merged"] = step(merged, layer.x, layer.y, {}, training=False)
    with arithmetic(precision), autocast(precision, device):
        seconds = measure(steps, rounds, device)
    layer.seconds = {name: statistics.median(values) for name, values in seconds.items()}


def _merged(module: Any, dtype: torch.dtype | None) -> nn.Module | None:
    """A merged copy of a layer; None where there is nothing to merge."""
    if not hasattr(module, "merge"):
        return None
    merged = copy.deepcopy(module)
    merged.implementation = "auto"
    try:
        merged.merge(dtype)
    except ValueError:
        return None
    return merged


def _kernel(layer: Layer) -> tuple[int, ...]:
    """(Cout, Cin/groups, *k)."""
    plan = layer.module.plan
    assert plan is not None  # of a network that was converted
    return next(planned.kernel for planned in plan.layers if planned.name == layer.name)


def positions_of(layer: Layer) -> int:
    """Output positions of one sample."""
    return layer.y[0].numel() // _kernel(layer)[0]


def table(layers: Sequence[Layer]) -> str:
    """A row of milliseconds for each layer, what "auto" takes of them, and sums over the network."""
    names = dict.fromkeys(name for layer in layers for name in layer.candidates)
    forced = [name for name in names if any(name in layer.seconds for layer in layers)]
    timed = ("static", *forced, "merged")
    width = max(len("all layers"), *(len(layer.name) for layer in layers))
    sizes = {"count": 5, "batch": 5, "P": 6, "kernel": 16, "cell": 11, "n": 5}
    columns = {"layer": width, **sizes, **dict.fromkeys(timed, 9), "auto": 9, "auto / best": 11}
    rows = []
    for layer in layers:
        shapes = ("×".join(map(str, shape)) for shape in (_kernel(layer), layer.signature.partition.cell))
        sizes = (layer.count, len(layer.x), positions_of(layer), *shapes, layer.signature.terms)
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
    return layer.seconds.get(layer.estimated()), min(layer.seconds[n] for n in layer.candidates if n in layer.seconds)


def _total(layers: Sequence[Layer], seconds: Sequence[float | None]) -> float | None:
    """Sum over the network; None for what was not tried in every layer."""
    if None in seconds:
        return None
    return sum(layer.count * value for layer, value in zip(layers, seconds, strict=True))


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.2f}"


def record(layer: Layer) -> dict[str, Any]:
    """What is kept of a layer in JSON."""
    signature = layer.signature
    return {
        "layer": layer.name,
        "count": layer.count,
        "batch": len(layer.x),
        "positions": positions_of(layer),
        "kernel": _kernel(layer),
        "cell": signature.partition.cell,
        "cells": signature.terms,
        "groups": signature.geometry.groups,
        "stride": signature.geometry.stride,
        "auto": layer.estimated(),
        "seconds": layer.seconds,
    }
