"""Layers whose kernel mixes whole kernels: the definition, every implementation and gradient, the warm start."""

import copy
import pickle

import pytest
import torch
from experts import EXPERTS, expected, make
from torch import nn

from kernelwarehouse.models.ops.dyconv import DYConv2d
from kernelwarehouse.models.ops.mixture_conv import IMPLEMENTATIONS
from kernelwarehouse.models.ops.odconv import ODConv2d

FAST = [name for name in IMPLEMENTATIONS if name not in ("reference", "triton")]
KINDS = {"dyconv": DYConv2d, "odconv": ODConv2d}


def prepared(case, implementation):
    """The layer and its input, or a skip where the implementation cannot compute it, as it says."""
    layer, x = make(case)
    layer.implementation = implementation
    if implementation != "auto" and (reason := layer.unsupported(implementation)):
        with pytest.raises(ValueError, match=f"'{implementation}' cannot compute this layer: .*; .*reference.* can"):
            layer(x)
        pytest.skip(reason)
    return layer, x


@pytest.mark.parametrize(("training", "temperature"), [(True, 1.0), (False, 3.0)])
@pytest.mark.parametrize("implementation", ["auto", "reference", *FAST])
@pytest.mark.parametrize("case", EXPERTS)
def test_every_gradient_by_the_definition(case, implementation, training, temperature):
    layer, x = prepared(case, implementation)
    layer.train(training)
    if layer.temperature is not None:
        layer.temperature.fill(temperature)
    y, upstream, gradients = expected(case, training, temperature)
    found = layer(x.requires_grad_())
    assert (found - y).norm() <= 1e-10 * y.norm()
    leaves = {"x": x, **dict(layer.named_parameters())}
    received = torch.autograd.grad(found, list(leaves.values()), upstream, allow_unused=True)
    for name, ours, truth in zip(leaves, received, gradients, strict=True):
        assert (ours is None) == (truth is None), name
        if truth is not None:
            assert (ours - truth).norm() <= 1e-10 * truth.norm() + 1e-13, name


@pytest.mark.parametrize("implementation", ["auto", *FAST])
@pytest.mark.parametrize("case", EXPERTS)
def test_inference_and_single_precision(case, implementation):
    layer, x = make(case)
    layer.eval().implementation = implementation
    y, _, _ = expected(case, False, 1.0)
    with torch.no_grad():
        if implementation != "auto" and (reason := layer.unsupported(implementation)):
            pytest.skip(reason)
        assert (layer(x) - y).norm() <= 1e-10 * y.norm()
        last = layer(x.movedim(1, -1).contiguous().movedim(-1, 1))
        assert (last - y).norm() <= 1e-10 * y.norm()
        error = (layer.float()(x.float()).double() - y).norm() / y.norm()
    assert 0 < error < 1e-5


@pytest.mark.parametrize("case", ["dyconv", "dyconv-depthwise", "odconv", "odconv-depthwise", "odconv-static"])
def test_types_and_copies(case):
    layer, x = make(case)
    layer.eval().reset_parameters()
    exact = EXPERTS[case][0](layer, x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
    layer.float().to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous()
    x = x.float()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        assert (y.double() - exact).norm() <= 0.03 * exact.norm()
        half = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert half.dtype == dtype
        assert (half.double() - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("case", ["dyconv", "odconv", "odconv-depthwise"])
def test_kernels_are_those_that_are_applied(case):
    layer, x = make(case)
    kernels = layer.eval().kernels(x)
    assert kernels.shape == (len(x), *layer.partition.kernel)
    twin = EXPERTS[case][1](*EXPERTS[case][3], **EXPERTS[case][4])
    conv = nn.Conv2d(*EXPERTS[case][3], padding=twin.padding, groups=twin.groups, bias=False).double()
    layer.bias = None
    for sample, kernel in zip(x, kernels, strict=True):
        with torch.no_grad():
            conv.weight.copy_(kernel)
        torch.testing.assert_close(layer(sample[None]), conv(sample[None]))


@pytest.mark.parametrize("case", ["dyconv", "odconv"])
def test_one_graph_for_every_temperature(case):
    layer, x = make(case)
    torch._dynamo.reset()
    compiled = torch.compile(layer.eval(), backend="aot_eager", fullgraph=True)
    counter = torch._dynamo.utils.counters["stats"]
    for count, temperature in enumerate((30.0, 17.5, 1.0)):
        layer.temperature.fill(temperature)
        torch.testing.assert_close(compiled(x), layer(x))
        if count == 0:
            graphs = counter["unique_graphs"]
    assert counter["unique_graphs"] == graphs > 0


def test_a_batch_of_one_is_trained():
    layer, x = make("odconv")
    layer.train()
    before = layer.attention.bn.running_mean.clone()
    layer(x[:1]).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert torch.equal(layer.attention.bn.running_mean, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 3, 4])
@pytest.mark.parametrize("arguments", [(8, 6, 3), (8, 6, 1), (8, 8, 3, 1, 1, 1, 8)], ids=["3x3", "1x1", "depthwise"])
def test_it_starts_as_the_static_layer(kind, number, arguments):
    torch.manual_seed(0)
    static = nn.Conv2d(*arguments)
    layer = KINDS[kind](*arguments, kernel_num=number)
    layer.load_static_weight(static.weight, static.bias)
    for temperature in (1.0, 7.3, 30.0):
        if layer.temperature is not None:
            layer.temperature.fill(temperature)
        for scale in (0.01, 1, 100):
            x = scale * torch.randn(3, 8, 6, 5)
            with torch.no_grad():
                y = static(x)
                assert (layer(x) - y).abs().max() <= 1e-5 * y.abs().max()
                assert (layer.eval()(x[:1]) - y[:1]).abs().max() <= 1e-5 * y.abs().max()
            layer.train()


@pytest.mark.parametrize("kind", KINDS)
def test_after_one_step_from_there_the_experts_part(kind):
    torch.manual_seed(0)
    static = nn.Conv2d(8, 6, 3)
    layer = KINDS[kind](8, 6, 3)
    layer.load_static_weight(static.weight, static.bias)
    x, target = torch.randn(4, 8, 6, 5), torch.randn(4, 6, 4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def gradients():
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        return layer.weight.grad.clone()

    first = gradients()
    assert all(torch.allclose(g, first[0], rtol=1e-4) for g in first)
    optimizer.step()
    second = gradients()
    for i in range(4):
        for j in range(i):
            assert (second[i] - second[j]).norm() > 1e-4 * second[i].norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "8 → 6 channels cannot be convolved in 3 groups"),
        ({"kernel_num": 0}, "at least one kernel to mix, found 0"),
        ({"kernel_size": (3,)}, "kernel_size must be 2 positive whole numbers"),
        ({"padding_mode": "wrap"}, "padding_mode must be one of"),
    ],
)
def test_what_cannot_be_is_named(kind, change, message):
    with pytest.raises(ValueError, match=message):
        KINDS[kind](**{"in_channels": 8, "out_channels": 6, "kernel_size": 3, **change})
    with pytest.raises(ValueError, match=r"expected an input \(B ≥ 1, 8, H, W\), found \(2, 7, 5, 5\)"):
        KINDS[kind](8, 6, 3)(torch.zeros(2, 7, 5, 5))
