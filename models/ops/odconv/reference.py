"""The definition of ODConv: sample by sample and kernel by kernel, with every attention multiplied into the kernel."""

import torch
from torch import Tensor, nn

from ..per_sample_conv import static_conv
from .layer import ODConvNd


def reference(layer: ODConvNd, x: Tensor) -> Tensor:
    """What a layer computes: (B, Cin, *spatial) → (B, Cout, *output spatial)."""
    a, tau = layer.attention, layer.tau
    pooled = torch.stack([sample.flatten(1).sum(1) / sample[0].numel() for sample in x])
    hidden = a.bn(pooled @ a.fc.weight.T).clamp_min(0)
    samples = []
    for sample, h in zip(x, hidden, strict=True):
        if a.kernel_fc is None:
            kernel = layer.weight[0]
        else:
            powers = torch.exp(_logits(a.kernel_fc, h, tau))
            shares = powers / powers.sum()
            kernel = torch.stack([p * w for p, w in zip(shares, layer.weight, strict=True)]).sum(0)
        if a.spatial_fc is not None:
            kernel = kernel * _sigmoid(a.spatial_fc, h, tau).reshape(layer.kernel_size)
        if a.filter_fc is not None:
            kernel = kernel * _sigmoid(a.filter_fc, h, tau).reshape(-1, *(1,) * (layer.dims + 1))
        scaled = sample * _sigmoid(a.channel_fc, h, tau).reshape(-1, *(1,) * layer.dims)
        y = static_conv(scaled[None], kernel, layer.geometry)[0]
        samples.append(y if layer.bias is None else y + layer.bias.reshape(-1, *(1,) * layer.dims))
    return torch.stack(samples)


def _logits(head: nn.Linear, h: Tensor, tau: Tensor) -> Tensor:
    return (head.weight @ h + head.bias) / tau


def _sigmoid(head: nn.Linear, h: Tensor, tau: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-_logits(head, h, tau)))
