"""Derivatives of every kind by every implementation: right, or refused with what computes them; and nothing is left."""

import gc

import pytest
import torch
from layers import make
from torch import Tensor
from torch.autograd import forward_ad

from kernelwarehouse.models.ops.kernel_warehouse import NAMES

FAST = ["auto", *(name for name in NAMES if name not in ("reference", "grouped", "triton"))]
CASES = ["conv2d", "depthwise", "linear-tokens"]
REFUSED = r"set_implementation\(net, 'reference'\)"


def prepared(case, implementation):
    layer, x = make(case)
    if implementation != "auto" and (reason := layer.unsupported(implementation)):
        pytest.skip(reason)
    layer.implementation = implementation
    layer.temperature.fill(0.3)
    return layer.eval(), x


def hessian_vector_product(layer, x):
    """Of Σ y³ by x, with a gradient penalty's gradients by the parameters."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    return torch.autograd.grad((first * direction).sum(), [x, *layer.parameters()], allow_unused=True)


def penalty(layer, x):
    """Gradients of ‖∂Σ y² / ∂(x, cells)‖² by everything, through backward."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    found = torch.autograd.grad(layer(x).square().sum(), [x, layer.warehouse.weight], create_graph=True)
    sum(g.square().sum() for g in found).backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("derivative", [hessian_vector_product, penalty])
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_those_of_the_definition(case, implementation, derivative):
    layer, x = prepared(case, implementation)
    found = derivative(layer, x)
    layer.implementation = "reference"
    for ours, expected in zip(found, derivative(layer, x), strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_a_hessian_vector_product_is_that_of_finite_differences(case):
    layer, x = prepared(case, "auto")
    direction, step = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x), 1e-5

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(layer(x).pow(3).sum(), x)[0]

    expected = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    found = hessian_vector_product(layer, x)[0]
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("implementation", FAST)
def test_training_mode_and_accumulated_graphs(implementation):
    """Statistics of the batch, and second derivatives after first ones with retain_graph."""
    results = []
    for name in (implementation, "reference"):
        layer, x = prepared("conv2d", implementation)
        layer.train().implementation = name
        x.requires_grad_()
        y = layer(x).pow(3).sum()
        torch.autograd.grad(y, x, retain_graph=True)
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()], allow_unused=True))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def functional(layer, x):
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    return loss, parameters


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("case", CASES)
def test_functional_gradients(case, implementation):
    layer, x = prepared(case, implementation)
    loss, parameters = functional(layer, x)
    found = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    inputs = [*parameters.values(), x.requires_grad_()]
    expected = torch.autograd.grad(loss(parameters, x), inputs)
    torch.testing.assert_close([*found[0].values(), found[1]], list(expected))
    y, pull = torch.func.vjp(lambda x: layer(x), x.detach())
    (received,) = pull(y)
    torch.testing.assert_close(2 * received, expected[-1])
    twice = torch.func.grad(lambda x: torch.func.grad(loss, argnums=1)(parameters, x).square().sum())(x.detach())
    (first,) = torch.autograd.grad(loss(parameters, x), x, create_graph=True)
    torch.testing.assert_close(twice, torch.autograd.grad(first.square().sum(), x)[0])


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("case", CASES)
def test_forward_mode(case, implementation, recording):
    layer, x = prepared(case, implementation)
    direction = torch.randn_like(x)

    def by_dual():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent

    def by_transform():
        return torch.func.jvp(lambda x: layer(x), (x,), (direction,))[1]

    with torch.set_grad_enabled(recording):
        if implementation == "reference":
            step = 1e-6
            expected = (layer(x + step * direction) - layer(x - step * direction)) / (2 * step)
            for tangent in (by_dual(), by_transform()):
                assert (tangent - expected).norm() <= 1e-6 * expected.norm()
            return
        for run in (by_dual, by_transform):
            with pytest.raises(RuntimeError, match=REFUSED):
                run()


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_vmap(implementation, recording):
    layer, x = prepared("conv2d", implementation)
    images = torch.stack([x, 2 * x])
    with torch.set_grad_enabled(recording):
        if implementation == "reference":
            torch.testing.assert_close(torch.vmap(layer)(images), torch.stack([layer(i) for i in images]))
            return
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.vmap(layer)(images)


def test_the_definition_passes_all_of_torchs_checks():
    layer, x = make("conv2d-layer-norm")
    layer.implementation = "reference"
    layer.temperature.fill(0.3)
    x = x[:, :, :2, :2].contiguous()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [t.detach().requires_grad_() for t in (x, *parameters)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_per_sample_gradients_by_vmap_of_grad():
    layer, x = prepared("conv2d", "reference")
    loss, parameters = functional(layer, x)
    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    for i in range(len(x)):
        expected = torch.func.grad(loss)(parameters, x[i : i + 1])
        torch.testing.assert_close({name: grads[i] for name, grads in found.items()}, expected)


@pytest.mark.parametrize("implementation", FAST)
def test_gradients_by_the_input_alone_leave_no_tensor_behind(implementation):
    layer, x = prepared("conv2d", implementation)
    x.requires_grad_()
    loss = layer(x).square().sum()

    def tensors():
        gc.collect()
        return [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.numel() >= layer.cells.numel()]

    torch.autograd.grad(loss, x, retain_graph=True)
    before = {id(o): o for o in tensors()}
    for _ in range(4):
        torch.autograd.grad(loss, x, retain_graph=True)
    assert all(id(o) in before for o in tensors())
    assert layer.warehouse.weight.grad is None
