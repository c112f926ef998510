"""A layer in training as one function of autograd, beside the attention and the convolution as two."""

import copy

import pytest
import torch
from layers import LAYERS, make, naive_forward
from parity import assert_parity
from processor import needs_compiler
from torch.utils.checkpoint import checkpoint

from kernelwarehouse.models.ops.kernel_warehouse import layer as layers

pytestmark = needs_compiler
LEFT = {"conv2d-nonlocal", "conv1d-circular", "whole-kernel-cells"}  # to two functions


@pytest.fixture
def taken(monkeypatch):
    """How often a layer was computed at once."""
    calls, run = [], layers.native_training
    monkeypatch.setattr(layers, "native_training", lambda *operands: calls.append(1) or run(*operands))
    return calls


def native(kind, dtype=torch.float64, tau=0.3, train=True):
    layer, warehouses, x = make(kind, dtype)
    layer.implementation = "native"
    warehouses.temperature.fill_(tau)
    return layer.train(train), warehouses, x.requires_grad_()


def gradients(layer, warehouses, x, output=None):
    """The output, and its gradients of everything that it depends on."""
    y = layer(x) if output is None else output()
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    leaves = [value for value in (x, warehouses.w, *layer.parameters()) if value.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, upstream)]


def assert_same(found, expected, tolerance=1e-12):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-300


def in_two(monkeypatch, *operands):
    with monkeypatch.context() as patch:
        patch.setattr(layers, "trains_at_once", lambda *_: False)
        return gradients(*operands)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_parity_with_naive(taken, kind, last, tau):
    layer, warehouses, x = native(kind, tau=tau, train=False)
    if last and "linear" not in kind:
        x = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    leaves = {"x": x, "cells": warehouses.w, **dict(layer.named_parameters())}
    assert_parity(lambda: layer(x), lambda: naive_forward(layer, x, tau), leaves, tolerance=1e-10)
    assert len(taken) == (0 if kind in LEFT else 1)


@pytest.mark.parametrize("kind", sorted(LAYERS.keys() - LEFT))
def test_statistics_of_the_batch(taken, monkeypatch, kind):
    layer, warehouses, x = native(kind)
    other = copy.deepcopy(layer)
    other._owner = (warehouses,)
    assert_same(gradients(layer, warehouses, x), in_two(monkeypatch, other, warehouses, x))
    assert len(taken) == 1
    for ours, theirs in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", ["conv2d", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(monkeypatch, kind, dtype):
    """No further from the result in double precision than two functions are."""
    errors = {"at once": [], "in two": []}
    for seed in range(4):
        found = {}
        for name, run in (("at once", gradients), ("in two", lambda *operands: in_two(monkeypatch, *operands))):
            for kept in (torch.float64, torch.float32):
                layer, warehouses, x = native(kind, kept)
                torch.manual_seed(seed)
                drawn = torch.randn(x.shape).bfloat16().to(kept)
                with torch.no_grad():
                    x.copy_(drawn)
                low = dtype if kept == torch.float32 else torch.float64
                x = x.detach().to(low).requires_grad_()
                with torch.autocast("cpu", torch.bfloat16, enabled=low == torch.bfloat16):
                    found[kept] = run(layer, warehouses, x)
            pairs = zip(found[torch.float32], found[torch.float64], strict=True)
            errors[name].append([((ours - truth).norm() / truth.norm()).item() for ours, truth in pairs])
    means = {name: torch.tensor(values).mean(0) for name, values in errors.items()}
    assert (means["at once"] <= 1.1 * means["in two"] + 1e-6).all(), means


@pytest.mark.parametrize("frozen", ["fc1", "norm", "fc2", "attention", "cells"])
def test_frozen_parts(taken, monkeypatch, frozen):
    layer, warehouses, x = native("conv2d")
    part = {"attention": layer.attention, "cells": warehouses}.get(frozen) or getattr(layer.attention, frozen)
    part.requires_grad_(False)
    assert_same(gradients(layer, warehouses, x), in_two(monkeypatch, layer, warehouses, x))
    assert len(taken) == 1


def test_the_input_is_read_elsewhere_too(monkeypatch):
    layer, warehouses, x = native("linear-map")

    def output():
        return layer(x).sum(-1, keepdim=True) * x.exp()

    found = gradients(layer, warehouses, x, output)
    assert_same(found, in_two(monkeypatch, layer, warehouses, x, output))


def test_backward_twice():
    layer, warehouses, x = native("conv2d")
    y = layer(x)
    leaves = [x, warehouses.w, *layer.parameters()]
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y.sum(), leaves)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), leaves)


def test_second_derivatives_are_refused():
    layer, _, x = native("conv2d")
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_temperature_may_change_before_backward():
    results = []
    for changed in (False, True):
        layer, warehouses, x = native("conv2d")
        y = layer(x)
        if changed:
            warehouses.temperature.fill_(0.0)
        results.append(torch.autograd.grad(y.sum(), [x, warehouses.w, layer.attention.fc2.weight]))
    assert_same(*results)


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_weights_may_not_change_before_backward(part):
    layer, _, x = native("conv2d")
    y = layer(x)
    with torch.no_grad():
        getattr(layer.attention, part).weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_under_checkpointing(taken):
    layer, warehouses, x = native("conv2d")
    found = gradients(layer, warehouses, x, lambda: checkpoint(layer, x, use_reentrant=False))
    assert len(taken) == 2
    assert layer.attention.norm.num_batches_tracked == 2
    assert_same(found, gradients(layer, warehouses, x))


def test_the_gradient_of_the_mean_is_not_added_by_itself(taken):
    layer, _, x = native("conv2d", train=False)
    layer.bias = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x).sum().backward()
    assert taken
    assert not {"aten::add", "aten::add_", "_PoolBackward"} & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("look", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("name", ["", "fc1", "norm", "fc2"])
def test_who_looks_at_the_attention_sees_it(taken, name, look):
    layer, _, x = native("conv2d")
    seen = []
    part = layer.attention.get_submodule(name)
    getattr(part, f"register_{look}_hook")(lambda *_: seen.append(1))
    layer(x).sum().backward()
    assert seen
    assert not taken


def test_where_it_is_not_taken(taken):
    layer, _, x = native("conv2d")
    layer(x.detach())
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer.float()(x.float())  # is rounded first, in a function of its own
    layer.double().implementation = "streamed"
    layer(x)
    assert not taken


def test_input_smaller_than_the_kernel():
    layer, _, _ = native("conv3d")
    with pytest.raises(ValueError, match="too small"):
        layer(torch.randn(2, 2, 1, 1, 1, dtype=torch.float64, requires_grad=True))
