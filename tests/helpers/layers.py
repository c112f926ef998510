"""One layer of every kind, on odd sizes, and what it computes by the definition."""

import functools

import torch
import torch.nn.functional as F

from kernelwarehouse.models.ops.kernel_warehouse import KWConv1d, KWConv2d, KWConv3d, KWLinear, Warehouse
from kernelwarehouse.models.ops.mixture_conv.reference import reference_mix
from kernelwarehouse.models.ops.per_sample_conv import per_sample_conv

# name: (class, input shape, module arguments, cells (n, *cell), own cells, attention arguments)
LAYERS = {
    "conv2d": (KWConv2d, (3, 6, 7, 5), (6, 4, 3), {"padding": 1}, (40, 2, 3, 1, 1), (4, 40), {}),
    "conv2d-half-budget": (KWConv2d, (3, 6, 7, 5), (6, 4, 3), {"stride": 2}, (20, 2, 3, 1, 1), (2, 20), {}),
    "conv2d-layer-norm": (KWConv2d, (2, 6, 5, 5), (6, 4, 1), {}, (5, 2, 3, 1, 1), (0, 4), {"norm": "layer"}),
    "conv2d-nonlocal": (
        KWConv2d,
        (3, 4, 5, 7),
        (4, 4, (3, 1)),
        {"padding": (1, 0), "bias": False},
        (30, 2, 2, 1, 1),
        (7, 19),
        {"nonlocal_basis_ratio": 0.25},
    ),
    "depthwise": (KWConv2d, (2, 6, 6, 5), (6, 6, 3), {"groups": 6, "padding": "same"}, (9, 6, 1, 1, 1), (0, 9), {}),
    "whole-kernel-cells": (KWConv2d, (2, 4, 6, 5), (4, 4, 3), {"padding": 1}, (6, 2, 2, 3, 3), (2, 6), {}),
    "conv1d-circular": (
        KWConv1d,
        (3, 4, 9),
        (4, 6, 5),
        {"padding": 2, "padding_mode": "circular"},
        (16, 3, 4, 1),
        (3, 13),
        {},
    ),
    "conv3d": (KWConv3d, (2, 2, 4, 5, 3), (2, 4, 2), {"dilation": 2}, (17, 2, 2, 1, 1, 1), (0, 16), {}),
    "linear-tokens": (KWLinear, (3, 7, 6), (6, 8), {}, (9, 4, 3, 1), (1, 5), {"norm": "layer"}),
    "linear-map": (KWLinear, (2, 3, 5, 6), (6, 4), {}, (8, 2, 3, 1, 1), (0, 8), {}),
    "linear-vector": (KWLinear, (4, 6), (6, 4), {}, (8, 2, 3, 1), (0, 8), {}),
}


def make(case, dtype=torch.float64):
    cls, shape, args, kwargs, cells, (start, stop), attention = LAYERS[case]
    torch.manual_seed(1)
    warehouse = Warehouse(cells, dtype=dtype)
    layer = cls(*args, **kwargs, warehouse=warehouse, own_cells=range(start, stop), **attention)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    return layer, torch.randn(shape, dtype=dtype)


def reference_attention(attention, x, temperature):
    """α of `Attention`, mixture by mixture, straight from the equations."""
    pooled = torch.stack([sample.flatten(1).sum(1) / sample[0].numel() for sample in x])
    hidden = attention.norm(pooled @ attention.fc1.weight.T + (0 if attention.fc1.bias is None else attention.fc1.bias))
    n, own = attention.num_cells, attention.own_cells
    rows = attention.fc2.weight.shape[0] // attention.mixtures
    samples = []
    for h in F.relu(hidden):
        alphas = []
        for i in range(attention.mixtures):
            z = attention.fc2.weight[i * rows : (i + 1) * rows] @ h
            if attention.num_basis:
                basis = z[len(own) : len(own) + attention.num_basis]
                others = iter(attention.fc3.weight @ basis)
                logits = [z[j - own.start] if j in own else next(others) for j in range(n)]
                z = torch.stack([*logits, z[-1]]) + attention.basis_bias[i * (n + 1) : (i + 1) * (n + 1)]
            else:
                z = z + attention.fc2.bias[i * rows : (i + 1) * rows]
            alpha = z / (sum(abs(value) for value in z) + 1e-3)
            alphas.append((1 - temperature) * alpha[:-1] + temperature * attention.assignment[i])
        samples.append(torch.stack(alphas))
    return torch.stack(samples)


def reference_forward(layer, x, temperature):
    features = x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2) if isinstance(layer, KWLinear) else x
    kernels = reference_mix(reference_attention(layer.attention, features, temperature), layer.cells, layer.partition)
    if isinstance(layer, KWLinear):
        return torch.stack([s @ k.flatten(1).T + layer.bias for s, k in zip(x, kernels, strict=True)])
    arguments = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    return per_sample_conv(x, kernels, layer.bias, *arguments, implementation="reference")


@functools.cache
def expected(case, training, temperature):
    """Output, upstream gradient, and the gradients of x and of every parameter of a case, computed once."""
    layer, x = make(case)
    layer.train(training)
    x.requires_grad_()
    y = reference_forward(layer, x, temperature)
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], upstream, allow_unused=True)
    return y.detach(), upstream, gradients
