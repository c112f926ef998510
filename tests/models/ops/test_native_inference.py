"""A layer in inference as one operator, beside the attention and the convolution as two."""

import pytest
import torch
from layers import LAYERS, make, naive_forward
from processor import needs_bfloat16, needs_compiler

from kernelwarehouse.models.ops.kernel_warehouse import KWConv2d, Warehouses, native_inference
from kernelwarehouse.models.ops.kernel_warehouse import layer as layers
from kernelwarehouse.models.ops.kernel_warehouse.attention_operator import parameters_of

pytestmark = needs_compiler
LEFT = {"conv2d-nonlocal", "conv1d-circular", "whole-kernel-cells"}  # to two operators


@pytest.fixture
def taken(monkeypatch):
    """How often a layer was computed at once."""
    calls, run = [], layers.native_inference
    monkeypatch.setattr(layers, "native_inference", lambda *operands: calls.append(1) or run(*operands))
    return calls


@torch.no_grad()
def in_two(monkeypatch, layer, x):
    with monkeypatch.context() as patch:
        patch.setattr(layers, "infers_at_once", lambda *_: False)
        return layer(x)


def native(kind, tau=0.3):
    layer, warehouses, x = make(kind)
    layer.implementation = "native"
    warehouses.temperature.fill_(tau)
    return layer.eval(), warehouses, x


def blocks(groups=1):
    """A layer of several blocks in both directions, an odd number of cells, and channels in pairs."""
    torch.manual_seed(0)
    warehouses = Warehouses({"w": (21, 4, 1 if groups > 1 else 4, 1, 1)})
    arguments = {"padding": 1, "groups": groups, "warehouses": warehouses, "warehouse": "w", "own_cells": range(21)}
    layer = KWConv2d(12 if groups > 1 else 8, 12, 3, **arguments)
    with torch.no_grad():
        for parameter in [*layer.parameters(), *warehouses.parameters()]:
            parameter.normal_()
    layer.implementation = "native"
    return layer.eval(), warehouses, torch.randn(3, 9, 6, layer.in_channels).movedim(-1, 1)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_parity_with_naive(taken, kind, last, tau):
    layer, _, x = native(kind, tau)
    if last and "linear" not in kind:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    y = layer(x)
    torch.testing.assert_close(y, naive_forward(layer, x, tau), rtol=1e-10, atol=1e-12)
    assert len(taken) == (0 if kind in LEFT else 1)
    if "conv2d" in kind and kind not in LEFT:
        assert y.movedim(1, -1).is_contiguous() == last


@pytest.mark.parametrize("groups", [1, 12], ids=["dense", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@pytest.mark.parametrize("cells", [torch.float32, torch.bfloat16])
def test_the_digits_are_those_of_two_operators(taken, monkeypatch, groups, dtype, cells):
    layer, warehouses, x = blocks(groups)
    warehouses.to(cells)
    x = x.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, expected = layer(x), in_two(monkeypatch, layer, x)
        if groups > 1 and dtype == torch.bfloat16:  # two operators round the coefficients between them
            exact = in_two(monkeypatch, layer.double(), x.double())
            assert (found - exact).norm() <= 1.2 * (expected - exact).norm()
        else:
            assert torch.equal(found, expected)
    assert found.dtype == dtype
    assert len(taken) == 1


@torch.no_grad()
def test_what_changes_is_seen_at_once(taken, monkeypatch):
    """Sizes are kept from one call to the next, and nothing else."""
    layer, warehouses, x = blocks()
    found = [layer(x)]
    for change in (
        lambda: warehouses.w.mul_(2),
        lambda: layer.attention.fc2.weight.neg_(),
        lambda: layer.attention.norm.running_mean.add_(1),
        lambda: layer.bias.add_(1),
        lambda: warehouses.temperature.fill_(0.7),
        lambda: setattr(layer.attention.norm, "eps", 1.0),
        lambda: layer.attention.fc1.register_parameter("weight", torch.nn.Parameter(layer.attention.fc1.weight * 3)),
    ):
        change()
        found.append(layer(x))
        assert not torch.equal(found[-1], found[-2])
        assert torch.equal(found[-1], in_two(monkeypatch, layer, x))
    assert layer(x[:, :, :5]).shape == (3, 12, 5, 6)
    assert layer(x[:1]).shape == (1, 12, 9, 6)
    assert len(taken) == len(found) + 2


@torch.no_grad()
def test_who_looks_or_differs_is_served_by_two(taken):
    layer, _, x = blocks()
    handle = layer.attention.fc2.register_forward_hook(lambda *_: None)
    layer(x)
    handle.remove()
    layer.attention.norm.train()  # statistics of the batch
    layer(x)
    layer.attention.norm.eval()
    with torch.autocast("cpu", torch.bfloat16):  # which computes in another type than that of x
        layer(x)
    layer.implementation = "streamed"
    layer(x)
    assert not taken
    layer.implementation = "native"
    layer(x)
    assert len(taken) == 1


@torch.no_grad()
def test_sizes_that_do_not_fit_are_named():
    layer, _, x = blocks()
    layer.geometry = type(layer.geometry).of((3, 3), padding=0)
    with pytest.raises(ValueError, match=r"\(2, 6\) is too small for a kernel of \(3, 3\)"):
        layer(x[:, :, :2])
    layer.attention.fc2 = torch.nn.Linear(16, 7)
    with pytest.raises(ValueError, match=r"weights \(7, 16\) do not give 54 mixtures logits for 21 cells"):
        layer(x)


@pytest.mark.parametrize("groups", [1, 12], ids=["dense", "depthwise"])
@torch.no_grad()
def test_it_is_one_operator(groups):
    layer, _, x = blocks(groups)
    layer.bias = None
    layer(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    ours = [event.name for event in profile.events() if event.name.startswith("kernelwarehouse::")]
    assert ours == ["kernelwarehouse::layer" if groups == 1 else "kernelwarehouse::depthwise_layer"]


@pytest.mark.parametrize("groups", [1, 12], ids=["dense", "depthwise"])
def test_operators_are_well_formed(groups):
    layer, warehouses, x = blocks(groups)
    attention, window = layer.attention, [1, 3, 3, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    parameters = [value if value is None else value.detach() for value in parameters_of(attention, torch.tensor(0.3))]
    cells = warehouses.w.detach()
    if groups == 1:
        operands = cells.transpose(0, 1), layer.bias.detach(), window
        torch.library.opcheck(native_inference._layer, (x, parameters, attention.norm.eps, *operands))
    else:
        operands = cells.flatten(1).transpose(0, 1), window
        torch.library.opcheck(native_inference._depthwise_layer, (x, parameters, attention.norm.eps, *operands))
