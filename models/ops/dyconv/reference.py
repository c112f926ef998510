"""The definition of DY-Conv: sample by sample and kernel by kernel, straight from the equations."""

import torch
from torch import Tensor

from ..per_sample_conv import static_conv
from .layer import DYConvNd


def attention(layer: DYConvNd, sample: Tensor) -> Tensor:
    """π (K,) of one sample (Cin, *spatial)."""
    fc1, fc2 = layer.attention.fc1, layer.attention.fc2
    pooled = sample.flatten(1).sum(1) / sample[0].numel()
    z = fc2.weight @ (fc1.weight @ pooled).clamp_min(0) + fc2.bias
    powers = torch.exp(z if layer.temperature is None else z / layer.tau)
    return powers / powers.sum()


def reference(layer: DYConvNd, x: Tensor) -> Tensor:
    """What a layer computes: (B, Cin, *spatial) → (B, Cout, *output spatial)."""
    samples = []
    for sample in x:
        pi = attention(layer, sample)
        kernel = torch.stack([p * w for p, w in zip(pi, layer.weight, strict=True)]).sum(0)
        y = static_conv(sample[None], kernel, layer.geometry)[0]
        if layer.bias is not None:
            bias = torch.stack([p * b for p, b in zip(pi, layer.bias, strict=True)]).sum(0)
            y = y + bias.reshape(-1, *(1,) * layer.dims)
        samples.append(y)
    return torch.stack(samples)
