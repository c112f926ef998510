"""The definition: loops over samples and experts, straight from the equations."""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..per_sample_conv import CONV
from .layers import CondConvNd, CondLinear


def reference_routing(layer: CondConvNd, x: Tensor) -> Tensor:
    """The routing of a layer by its own input, sample by sample and expert by expert."""
    routing, samples = layer.routing_fn, []
    for sample in x:
        tokens = isinstance(layer, CondLinear)
        positions = sample.reshape(-1, sample.shape[-1]).T if tokens else sample.reshape(len(sample), -1)
        mean = torch.stack([channel.sum() / len(channel) for channel in positions])
        logits = [(a * mean).sum() + b for a, b in zip(routing.weight, routing.bias, strict=True)]
        samples.append(torch.stack([1 / (1 + torch.exp(-z)) for z in logits]))
    return torch.stack(samples)


def reference_forward(layer: CondConvNd, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
    """`CondConvNd`; r (B, E) is needed where the layer's block gives it."""
    routing_weights = reference_routing(layer, x) if routing_weights is None else routing_weights
    geometry, outputs = layer.geometry, []
    for sample, weights in zip(x, routing_weights, strict=True):
        kernel = _sum(weights, layer.weight)
        bias = None if layer.bias is None else _sum(weights, layer.bias)
        if isinstance(layer, CondLinear):
            outputs.append(F.linear(sample, kernel.flatten(1), bias))
            continue
        padded = geometry.pad(layer.as_images(sample[None]))
        y = CONV[layer.dims](padded, kernel, bias, geometry.stride, 0, geometry.dilation, geometry.groups)
        outputs.append(y[0])
    return torch.stack(outputs)


def _sum(weights: Tensor, experts: Tensor) -> Tensor:
    return functools.reduce(operator.add, [r * e for r, e in zip(weights, experts, strict=True)])
