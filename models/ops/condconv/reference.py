"""The definition: loops over samples and experts, straight from the equations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import CondConvLayer
from .routing import Routing

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def reference_routing(routing: Routing, x: Tensor) -> Tensor:
    """`Routing` sample by sample and expert by expert."""
    samples = []
    for sample in x:
        positions = sample.reshape(-1, sample.shape[-1]).T if routing.tokens else sample.reshape(len(sample), -1)
        mean = torch.stack([channel.sum() / len(channel) for channel in positions])
        logits = [(a * mean).sum() + b for a, b in zip(routing.weight, routing.bias, strict=True)]
        samples.append(torch.stack([1 / (1 + torch.exp(-z)) for z in logits]))
    return torch.stack(samples)


def reference_forward(layer: CondConvLayer, x: Tensor, routing_weights: Tensor | None = None) -> Tensor:
    """`CondConvLayer`; r (B, E) is needed where the layer's block gives it."""
    if routing_weights is None:
        routing_weights = reference_routing(layer.routing_fn, x)
    geometry, outputs = layer.geometry, []
    for sample, weights in zip(x, routing_weights, strict=True):
        kernel = sum(r * w for r, w in zip(weights, layer.weight, strict=True))
        bias = None if layer.bias is None else sum(r * b for r, b in zip(weights, layer.bias, strict=True))
        if layer.tokens:
            outputs.append(F.linear(sample, kernel.flatten(1), bias))
            continue
        padded = geometry.pad(layer.as_images(sample[None]))
        conv = _CONV[len(geometry.stride)]
        outputs.append(conv(padded, kernel, bias, geometry.stride, 0, geometry.dilation, geometry.groups)[0])
    return torch.stack(outputs)
