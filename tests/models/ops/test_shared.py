"""The gradient of cells that several layers share, beside the one that autograd adds up."""

import threading

import pytest
import torch
from processor import needs_compiler
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernelwarehouse.models.ops.kernel_warehouse import KWConv2d, Warehouses, native
from kernelwarehouse.models.ops.kernel_warehouse import layer as layers
from kernelwarehouse.models.ops.kernel_warehouse.shared import SharedCells

pytestmark = needs_compiler


class Network(nn.Module):
    """Three layers that share a warehouse, of which the last has two blocks of channels."""

    def __init__(self, depthwise=False, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        groups, cin = (6, 1) if depthwise else (1, 3)
        self.warehouses = Warehouses({"w": (12, 6 if depthwise else 2, cin, 1, 1)}, dtype=dtype)
        self.layers = nn.ModuleList(
            KWConv2d(
                6, 6, size, padding=size // 2, groups=groups, warehouses=self.warehouses, warehouse="w",
                own_cells=range(4 * i, 4 * i + 4),
            )
            for i, size in enumerate((3, 1, 3))
        )  # fmt: skip
        for p in self.parameters():
            nn.init.normal_(p)
        for layer in self.layers:
            layer.implementation = "native"

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def x():
    return torch.randn(3, 6, 5, 4, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def by_autograd(monkeypatch):
    """Compute what a function returns with every gradient added up by autograd."""

    def run(function, *operands):
        with monkeypatch.context() as patch:
            patch.setattr(layers, "trains_at_once", lambda *_: False)
            return function(*operands)

    return run


def gradients(network, *images):
    """Of all that a network depends on, and of the images, in one backward pass."""
    leaves = [*network.parameters(), *images]
    return torch.autograd.grad(sum(network(x).square().sum() for x in images), leaves)


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depthwise", [False, True])
def test_the_sum_of_all_layers(by_autograd, x, depthwise):
    network = Network(depthwise).eval()
    assert_same(gradients(network, x), by_autograd(gradients, network, x))


def test_the_first_layer_of_a_pass_writes_and_the_others_add(monkeypatch, network, x):
    calls = []
    for name in ("gradients_of_mixing", "add_gradients_of_mixing"):
        run = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *operands, name=name, run=run: calls.append(name) or run(*operands))
    for _ in range(2):
        gradients(network, x)
    assert calls == ["gradients_of_mixing", "add_gradients_of_mixing", "add_gradients_of_mixing"] * 2


def test_images_of_two_graphs_in_one_pass(by_autograd, network, x):
    network.eval()
    other = torch.randn_like(x).requires_grad_()
    assert_same(gradients(network, x, other), by_autograd(gradients, network, x, other))


def test_passes_add_to_the_gradient_that_there_is(network, x):
    network.eval()
    expected = gradients(network, x)
    for _ in range(2):
        network(x).square().sum().backward()
    assert_same([p.grad for p in network.parameters()], [2 * value for value in expected[:-1]])


def test_a_graph_that_is_kept(network, x):
    loss = network(x).square().sum()
    first = torch.autograd.grad(loss, [network.warehouses.w, x], retain_graph=True)
    assert_same(torch.autograd.grad(loss, [network.warehouses.w, x]), first)


def test_a_pass_that_does_not_want_the_cells_leaves_nothing_for_the_next(network, x):
    loss = network(x).square().sum()
    expected = torch.autograd.grad(loss, network.warehouses.w, retain_graph=True)
    torch.autograd.grad(loss, x, retain_graph=True)
    torch.autograd.grad(loss, network.layers[1].attention.fc2.weight, retain_graph=True)
    assert_same(torch.autograd.grad(loss, network.warehouses.w), expected)


def test_a_pass_that_fails_leaves_nothing_for_the_next(network, x):
    network.eval()
    expected = gradients(network, x)
    y = network.layers[0](x)
    handle = y.register_hook(lambda _: 1 / 0)
    loss = (x + y + network.layers[1](x + y)).sum()
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    handle.remove()
    assert_same(gradients(network, x), expected)


def test_a_part_of_the_graph(by_autograd, network, x):
    network.eval()

    def found():
        y = network.layers[0](x)
        network.layers[1](y)
        return torch.autograd.grad(y.square().sum(), [network.warehouses.w, x])

    assert_same(found(), by_autograd(found))


def test_layers_of_which_one_is_computed_otherwise(by_autograd, network, x):
    network.eval().layers[1].implementation = "streamed"
    assert_same(gradients(network, x), by_autograd(gradients, network, x))


def test_who_looks_at_the_gradient_sees_the_sum_once(network, x):
    network.eval()
    (expected,) = torch.autograd.grad(network(x).square().sum(), network.warehouses.w)
    seen = []
    network.warehouses.w.register_hook(seen.append)
    network.warehouses.w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    network(x).square().sum().backward()
    assert_same(seen, [expected, expected])


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(network, x, reentrant):
    network.eval()
    expected = gradients(network, x)

    def compute(value):
        return checkpoint(network.layers[1], value, use_reentrant=reentrant)

    y = x + network.layers[0](x)
    y = y + compute(y)
    y = y + network.layers[2](y)
    y.square().sum().backward()
    assert_same([p.grad for p in network.parameters()] + [x.grad], expected)


def test_two_threads_at_once(network):
    network.eval()
    images = [torch.randn(3, 6, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    expected = [gradients(network, x) for x in images]
    kept = network(images[0])  # a graph keeps the stand-in, so that both threads have the same
    found = [None, None]

    def run(i):
        for _ in range(20):
            found[i] = gradients(network, images[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del kept
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_cells_that_become_another_type_while_a_graph_remembers_them(x):
    network = Network(dtype=torch.float32).eval()
    kept = network(x.float())
    network.double()
    expected = gradients(Network().eval(), x)
    assert [value.dtype for value in gradients(network, x)] == [value.dtype for value in expected]
    del kept


def test_nothing_is_kept_when_the_graph_is_gone(network, x):
    loss = network(x).sum()
    assert SharedCells._known
    loss.backward()
    del loss
    assert not SharedCells._known


def test_frozen_cells(by_autograd, network, x):
    network.eval().warehouses.requires_grad_(False)
    leaves = [p for p in network.parameters() if p.requires_grad]

    def found():
        return torch.autograd.grad(network(x).square().sum(), leaves)

    assert_same(found(), by_autograd(found))
