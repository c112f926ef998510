"""torch's FlopCounterMode sees in the C++ what it sees in operators of torch that compute the same."""

import math

import pytest
import timm
import torch
from layers import make
from processor import needs_compiler
from torch.utils.flop_counter import FlopCounterMode

from kernelwarehouse import set_implementation


def count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops(), counter.get_flop_counts()["Global"]


@needs_compiler
@pytest.mark.parametrize("case", ["conv2d", "depthwise", "conv3d", "linear-tokens", "linear-vector"])
def test_inference_counts_what_torch_would_compute(case):
    layer, x = make(case)
    layer.eval()
    found = {}
    for name in ("cpp", "materialize", "grouped"):  # a depthwise kernel is materialized, and applied in C++
        if not layer.unsupported(name):
            layer.implementation = name
            with torch.no_grad():
                found[name], _ = count(lambda: layer(x))
    assert len(found) >= 2
    assert len(set(found.values())) == 1
    assert found["materialize"] > 0


@needs_compiler
def test_training_counts_every_product():
    layer, x = make("conv2d")
    x.requires_grad_()
    layer.implementation = "cpp"
    found, by_operator = count(lambda: layer(x).sum().backward())
    kernel, positions = math.prod(layer.partition.kernel), 7 * 5
    mixing, applying = kernel * len(layer.cells), kernel * positions
    squeeze, logits = layer.attention.fc1.weight.numel(), layer.attention.fc2.weight.numel()
    forward = mixing + applying + squeeze + logits
    # Kernels and logits are made again, and each product has two gradients.
    backward = mixing + 2 * mixing + 2 * applying + 2 * squeeze + logits + 2 * logits
    assert found == 2 * len(x) * (forward + backward)
    assert sum("kernelwarehouse" in str(name) for name in by_operator) == 5


@needs_compiler
def test_a_network_counts_more_than_the_static_one():
    x = torch.randn(1, 3, 64, 64)
    arguments = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
    static, net = (timm.create_model(name, **arguments).eval() for name in ("resnet18", "kw_resnet18"))
    set_implementation(net, "cpp", otherwise="auto")
    with torch.no_grad():
        counts = [count(lambda net=net: net(x))[0] for net in (static, net)]
    assert counts[0] < counts[1] < 2 * counts[0]
