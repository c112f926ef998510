"""One layer of every kind that mixes experts, on odd sizes, and what it computes by the definition."""

import functools

import torch

from kernelwarehouse.models.ops.dyconv import DYConv1d, DYConv2d, DYConv3d
from kernelwarehouse.models.ops.dyconv.reference import reference as dyconv
from kernelwarehouse.models.ops.odconv import ODConv1d, ODConv2d, ODConv3d
from kernelwarehouse.models.ops.odconv.reference import reference as odconv

# name: (definition, class, input shape, module arguments)
EXPERTS = {
    "dyconv": (dyconv, DYConv2d, (3, 6, 7, 5), (6, 4, 3), {"padding": 1}),
    "dyconv-pointwise": (dyconv, DYConv2d, (2, 6, 5, 4), (6, 4, 1), {"stride": 2, "bias": False}),
    "dyconv-groups": (dyconv, DYConv2d, (2, 6, 5, 4), (6, 4, (3, 2)), {"groups": 2, "kernel_num": 3}),
    "dyconv-depthwise": (dyconv, DYConv2d, (2, 6, 6, 5), (6, 6, 3), {"groups": 6, "padding": "same"}),
    "dyconv-one": (dyconv, DYConv2d, (2, 3, 6, 5), (3, 4, 3), {"kernel_num": 1}),
    "dyconv-1d": (dyconv, DYConv1d, (3, 4, 9), (4, 6, 5), {"padding": 2, "padding_mode": "circular"}),
    "dyconv-3d": (dyconv, DYConv3d, (2, 2, 4, 5, 3), (2, 4, 2), {"dilation": 2}),
    "odconv": (odconv, ODConv2d, (3, 6, 7, 5), (6, 4, 3), {"padding": 1}),
    "odconv-one": (odconv, ODConv2d, (3, 6, 7, 5), (6, 4, 3), {"padding": 1, "kernel_num": 1, "bias": False}),
    "odconv-pointwise": (odconv, ODConv2d, (3, 6, 5, 4), (6, 4, 1), {"stride": 2}),
    "odconv-static": (odconv, ODConv2d, (3, 6, 5, 4), (6, 4, 1), {"kernel_num": 1}),
    "odconv-groups": (odconv, ODConv2d, (3, 6, 5, 4), (6, 4, (3, 2)), {"groups": 2, "kernel_num": 3}),
    "odconv-depthwise": (odconv, ODConv2d, (3, 6, 6, 5), (6, 6, 3), {"groups": 6, "padding": "same"}),
    "odconv-1d": (odconv, ODConv1d, (3, 4, 9), (4, 6, 5), {"padding": 2, "padding_mode": "reflect"}),
    "odconv-3d": (odconv, ODConv3d, (3, 2, 4, 5, 3), (2, 4, 2), {"dilation": 2}),
}


def make(case):
    _, cls, shape, arguments, fields = EXPERTS[case]
    torch.manual_seed(1)
    layer = cls(*arguments, **fields, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    return layer, torch.randn(shape, dtype=torch.float64)


@functools.cache
def expected(case, training, temperature):
    """Output, upstream gradient, and the gradients of x and of every parameter of a case, computed once."""
    layer, x = make(case)
    layer.train(training)
    if layer.temperature is not None:
        layer.temperature.fill(temperature)
    x.requires_grad_()
    y = EXPERTS[case][0](layer, x)
    upstream = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], upstream, allow_unused=True)
    return y.detach(), upstream, gradients
