"""A layer in inference as one operator, in C++ for a CPU.

A small layer's arithmetic takes less time than what Python and torch's dispatcher do around it, which is done once
here for the attention and the convolution together.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Geometry
from ..images import add_bias, empty_images
from ..native import (
    attention_sizes,
    call,
    from_pixels,
    operator,
    output_size,
    pixels,
    problem,
    room_for_pixels,
    sum_type,
    window_of,
)
from .attention import EPSILON, Attention
from .attention_operator import check_fit, is_whole, laid_out, parameters_of
from .depthwise import channels_together
from .native import in_pairs, mixes_natively
from .partition import Partition


def infers_at_once(attention: Attention, x: Tensor, partition: Partition, geometry: Geometry) -> bool:
    """Whether `native_inference` can compute a layer that `attends_at_once` and whose convolution is to be "native"."""
    return is_whole(attention) and geometry.pads_evenly and (geometry.groups > 1 or in_pairs(x, partition))


def native_inference(
    attention: Attention,
    cells: Tensor,
    x: Tensor,
    temperature: Tensor,
    partition: Partition,
    geometry: Geometry,
    bias: Tensor | None = None,
) -> Tensor:
    """y[b] = conv(x[b], W[b]) + bias with W[b] mixed from the cells by the attention to x[b], without a gradient.

    Args:
        attention: One for which the layer `infers_at_once`.
        cells: The warehouse, (n, *cell).
        x: (B, Cin, *spatial), of the type to compute in.
        temperature: τ, a scalar tensor.
        partition: How the kernel is cut.
        geometry: The convolution's arguments.
        bias: (Cout,), if any.

    Returns:
        (B, Cout, *output spatial), channels last in memory if x is.

    Raises:
        ValueError: An input that is smaller than the kernel.
    """
    x, padding = geometry.split_padding(x)
    window, kind = window_of(partition.kernel[2:], geometry, padding), sum_type(x.dtype)
    parameters = parameters_of(attention, temperature), attention._modules["norm"].eps
    if geometry.groups > 1:
        return add_bias(_depthwise_layer(x, *parameters, channels_together(cells.to(kind)), window), bias)
    if not mixes_natively(cells.dtype, x.dtype, "cpu"):
        cells = cells.to(kind)
    return _layer(x, *parameters, cells.transpose(0, 1), None if bias is None else bias.to(kind), window)


class _Plan(NamedTuple):
    """What depends on sizes alone: those of the attention, of the convolution, and of its output."""

    attention: ctypes.Array[ctypes.c_int64]
    problem: ctypes.Array[ctypes.c_int64]
    output: tuple[int, ...]


@functools.lru_cache(1024)
def _plan(
    input_shape: tuple[int, ...],
    weights: tuple[tuple[int, ...], tuple[int, ...]],
    assignment: tuple[int, int],
    layer_norm: bool,
    cell: tuple[int, int] | None,
    window: tuple[int, ...],
) -> _Plan:
    """Of FC1's and FC2's weights, β, and cells (cout, cin) or, where every channel is a group, none."""
    batch, channels, *input_size = input_shape
    mixtures, cells = check_fit(*weights, assignment, channels)
    size = output_size(input_size, window)
    sizes = attention_sizes(input_shape, True, weights[0][0], mixtures, cells, layer_norm)
    if cell is None:
        counts = batch, 1, 1, 0, channels, channels
        return _Plan(sizes, problem(counts, input_size, size, window), (batch, channels, *size))
    blocks_in = channels // cell[1]
    blocks_out = mixtures // (math.prod(window[:3]) * blocks_in)
    counts = batch, blocks_out, blocks_in, cells, *cell
    return _Plan(sizes, problem(counts, input_size, size, window), (batch, blocks_out * cell[0], *size))


def _plan_of(
    x: Tensor, parameters: Sequence[Tensor | None], cell: tuple[int, int] | None, window: Sequence[int]
) -> _Plan:
    weight1, weight2, assignment = parameters[0], parameters[6], parameters[8]
    weights = weight1.shape, weight2.shape
    return _plan(x.shape, weights, assignment.shape, parameters[2] is None, cell, tuple(window))


def _output(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    _norm_eps: float,
    rows: Tensor,
    _bias: Tensor | None,
    window: Sequence[int],
) -> Tensor:
    mixtures = parameters[8].shape[0]
    blocks_out = mixtures * rows.shape[2] // (math.prod(window[:3]) * x.shape[1])
    return empty_images(x, rows.shape[0] * blocks_out, output_size(x.shape[2:], window))


@operator("layer", fake=_output)
def _layer(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    norm_eps: float,
    rows: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
) -> Tensor:
    """Of `parameters_of` an attention, cells by output channel (cout, n, cin, *ones), and a `window_of` the kernel."""
    plan = _plan_of(x, parameters, (rows.shape[0], rows.shape[2]), window)
    function = "layer_rounded" if rows.dtype == torch.bfloat16 else "layer"
    bias = None if bias is None else bias.contiguous()
    return _call(function, plan, x, parameters, norm_eps, rows.contiguous(), bias)


def _like_depthwise(
    x: Tensor, _parameters: Sequence[Tensor | None], _norm_eps: float, _cells: Tensor, window: Sequence[int]
) -> Tensor:
    return empty_images(x, x.shape[1], output_size(x.shape[2:], window))


@operator("depthwise_layer", fake=_like_depthwise)
def _depthwise_layer(
    x: Tensor, parameters: Sequence[Tensor | None], norm_eps: float, cells: Tensor, window: Sequence[int]
) -> Tensor:
    """The same of cells (cout, n) of which every channel is a group."""
    plan = _plan_of(x, parameters, None, window)
    return _call("depthwise_layer", plan, x, parameters, norm_eps, cells.contiguous())


def _call(
    function: str, plan: _Plan, x: Tensor, parameters: Sequence[Tensor | None], norm_eps: float, *others: Tensor | None
) -> Tensor:
    y = empty_images(x, plan.output[1], plan.output[2:])
    values = room_for_pixels(y)
    operands = pixels(x), *laid_out(parameters, sum_type(x.dtype)), *others, values
    call(function, (plan.attention, plan.problem, norm_eps, EPSILON), operands)
    return from_pixels(values, y)
