"""Measured implementations: the fastest right one runs, for what it was measured with, and the network stays itself."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

from kernelwarehouse import KWConfig
from kernelwarehouse.models import convert_, plan_conversion, set_implementation
from kernelwarehouse.models import tuning as module
from kernelwarehouse.models.ops.kernel_warehouse import KWLayer
from kernelwarehouse.models.ops.mixture_conv import IMPLEMENTATIONS
from kernelwarehouse.models.ops.selection import forget, remembered
from kernelwarehouse.models.tuning import recall, tune

pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=3)
    return convert_(net, plan_conversion(net, KWConfig(cell_num_ratio=2)))


@pytest.fixture
def x():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def clock(monkeypatch):
    """A clock by which one implementation takes half of the others' time; returns what sets it."""
    fast = []

    def measure(steps, rounds, *_, **__):
        return {name: [0.5 if name in fast else 1.0] * rounds for name in steps}

    monkeypatch.setattr(module, "measure", measure)
    return fast.append


@pytest.fixture
def ran(monkeypatch):
    """The implementations that were run, in order."""
    seen = []

    for name, implementation in IMPLEMENTATIONS.items():
        call = type(implementation).__call__

        def run(*args, _name=name, _call=call, _self=implementation):
            seen.append(_name)
            return _call(_self, *args)

        monkeypatch.setattr(type(implementation), "__call__", lambda _, *args, _run=run: _run(*args))
    return seen


@pytest.mark.parametrize("training", [False, True])
def test_the_fastest_is_taken_for_what_it_was_measured_with(network, x, clock, ran, training):
    clock("mix_inputs")
    network.train(training)
    layers = tune(network, x, training=training)
    assert {layer.taken for layer in layers} == {"mix_inputs"}
    assert sum(layer.count for layer in layers) == sum(isinstance(m, KWLayer) for m in network.modules())

    def runs(images, training=training, precision=None):
        ran.clear()
        with torch.set_grad_enabled(training), torch.autocast("cpu", precision, enabled=precision is not None):
            network(images)
        return ran

    total = sum(layer.count for layer in layers)
    assert runs(x) == ["mix_inputs"] * total
    others = [
        runs(x[:2]).copy(),
        runs(x.repeat(1, 1, 1, 2)).copy(),
        runs(x, not training).copy(),
        runs(x, precision=torch.bfloat16).copy(),
    ]
    forget()
    assert others == [
        runs(x[:2]).copy(),
        runs(x.repeat(1, 1, 1, 2)).copy(),
        runs(x, not training).copy(),
        runs(x, precision=torch.bfloat16).copy(),
    ]
    assert all(other.count("mix_inputs") < total for other in others)


def test_gradients_that_training_does_not_take_are_not_timed(network, x, clock, ran):
    clock("mix_inputs")
    first = network.layer1[0]
    for frozen in (network.conv1, network.bn1, first.conv1, first.bn1):  # all before the first converted layer
        frozen.requires_grad_(False)
    layers = tune(network, x, training=True)
    assert [layer.name for layer in layers if not layer.x.requires_grad] == ["layer1.0.conv2"]
    ran.clear()
    network(x)
    assert set(ran) == {"mix_inputs"}


def test_a_forced_implementation_stays(network, x, clock, ran):
    clock("mix_inputs")
    tune(network, x, training=False)
    set_implementation(network, "materialize")
    ran.clear()
    with torch.no_grad():
        network(x)
    assert set(ran) == {"materialize"}


def test_a_compiled_network_is_not_tuned(network, x, clock):
    clock("reference")
    tune(network.eval(), x, training=False)
    with torch.no_grad():
        expected = network(x)
        graphs = []
        compiled = torch.compile(network, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("training", [False, True])
def test_measuring_leaves_the_network_and_the_generators_as_they_were(network, x, training):
    network.layer1.eval()
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    tune(network, x, training=training, rounds=1)
    assert torch.equal(torch.rand(3), drawn)
    assert [m.training for m in network.modules()] == modes
    assert all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks for m in network.modules())
    assert {m.implementation for m in network.modules() if isinstance(m, KWLayer)} == {"auto"}
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_network_that_fails_stays_as_it_was_too(network, x):
    network.layer4.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune(network, x, training=True)
    assert all(m.training for m in network.modules())
    assert not any(m._forward_hooks for m in network.modules())


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_every_implementation_is_timed_and_the_results_stay(network, x, training, precision):
    network.eval()
    with warnings.catch_warnings(), torch.autocast("cpu", precision, enabled=precision is not None):
        warnings.simplefilter("error")  # none is left out
        with torch.no_grad():
            before = network(x)
        layers = tune(network, x, training=training, rounds=1)
        with torch.no_grad():
            after = network(x)
    bound = 1e-4 if precision is None else 0.1
    assert (after - before).norm() <= bound * before.norm()
    for layer in layers:
        tried = {"grouped", "materialize", "mix_inputs", "reassociated", "cpp"} - {layer.estimated()}
        assert {*layer.seconds} == {"auto", *(name for name in tried if layer.can_try(name))}
        assert layer.taken == "auto" or layer.seconds[layer.taken] < layer.seconds["auto"]


@pytest.mark.parametrize("training", [False, True])
def test_a_wrong_implementation_is_left_out_with_a_warning(network, x, clock, monkeypatch, training):
    """Here its output is right, and the gradient of the cells is not."""
    clock("grouped")
    right = type(IMPLEMENTATIONS["grouped"]).__call__

    def wrong(self, x, alpha, bank, *args):
        return right(self, x, alpha, bank + 0.5 * (bank - bank.detach()), *args)

    monkeypatch.setattr(type(IMPLEMENTATIONS["grouped"]), "__call__", wrong)
    if not training:
        assert {layer.taken for layer in tune(network, x, training=False)} == {"grouped"}
        return
    with pytest.warns(UserWarning, match=r"layer\d.*: implementation 'grouped' is left out: its gradients of"):
        layers = tune(network, x, training=True)
    assert {layer.taken for layer in layers} == {"auto"}


def test_one_that_fails_is_left_out_with_a_warning(network, x, clock, monkeypatch):
    clock("mix_inputs")

    def fail(*_):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(type(IMPLEMENTATIONS["mix_inputs"]), "__call__", fail)
    with pytest.warns(UserWarning, match="'mix_inputs' is left out: RuntimeError: no kernel image is available$"):
        layers = tune(network, x, training=False)
    assert {layer.taken for layer in layers} == {"auto"}


def test_what_would_write_too_much_is_not_tried(network, x, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 0)
    for layer in tune(network, x, training=False, rounds=1):
        assert not {"grouped", "materialize", "mix_inputs", "reassociated"} & {*layer.seconds}


def test_what_is_known_is_not_timed_again(network, x, clock):
    clock("mix_inputs")
    assert all(layer.seconds for layer in tune(network, x, training=False))
    known = remembered()
    again = tune(network, x, training=False)
    assert not any(layer.seconds for layer in again)
    assert {layer.taken for layer in again} == {"mix_inputs"}
    forget()
    recall({**known, "a case of another version": "an implementation of another version"})
    assert {layer.taken for layer in tune(network, x, training=False)} == {"mix_inputs"}


def test_a_merged_network_is_tuned_too(network, x, clock):
    clock("materialize")
    for layer in network.eval().modules():
        if isinstance(layer, KWLayer):
            layer.merge()
    assert {layer.taken for layer in tune(network, x, training=False)} == {"materialize"}


def test_there_must_be_something_to_tune(x):
    with pytest.raises(ValueError, match="no converted layer"):
        tune(nn.Conv2d(3, 3, 1), x, training=False)
