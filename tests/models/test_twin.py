"""A network that is looked at is afterwards exactly what it was, whatever it holds and wherever it fails."""

import gc

import pytest
import timm
import torch
from odd_modules import PARTS, RUNNING, Caches, Chain, Closures, Fails, Part, TwoNames, description
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernelwarehouse import KWConfig, plan_conversion
from kernelwarehouse.models import trial
from kernelwarehouse.models.sites import find_sites
from kernelwarehouse.models.twin import copy_to_meta

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated", "ignore:.*torch.jit.trace.*deprecated")
X = torch.ones(2, 3, 6, 6)


def plan(net):
    """A plan, or the text of the refusal."""
    try:
        return plan_conversion(net, KWConfig(), example_input=X)
    except ValueError as e:
        return str(e)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_a_network_is_as_it_was(part, training):
    net = Chain(part(), Part()).train(training)
    before = description(net)
    found = plan(net)
    assert description(net) == before
    if part in RUNNING[:2]:
        assert [layer.name for layer in found.layers][:1] == ["parts.0.conv"]
    elif part not in RUNNING:
        assert "cannot be copied to be run" in found or "reaches tensors of the original network" in found
    assert net(X).device.type == "cpu"  # and works


@pytest.mark.parametrize("place", range(len(RUNNING) + 1))
def test_a_network_that_fails_at_any_layer_is_as_it_was(place):
    parts = [part() for part in RUNNING]
    parts.insert(place, Fails())
    net = Chain(*parts)
    before = description(net)
    assert "told to" in plan(net)
    assert description(net) == before


def test_an_interrupt_passes_and_leaves_the_network_as_it_was():
    net = Chain(*(part() for part in RUNNING), Fails(KeyboardInterrupt))
    before = description(net)
    with pytest.raises(KeyboardInterrupt):
        plan_conversion(net, KWConfig(), example_input=X)
    assert description(net) == before


@pytest.mark.parametrize("part", [Caches, TwoNames, Closures])
def test_looking_for_readers_leaves_no_traces_either(part):
    net = Chain(part())
    before = description(net)
    find_sites(net, X, readers=True)
    assert description(net) == before


def test_a_copy_keeps_ties_and_leaves_hooks_and_values_behind():
    net = Chain(TwoNames(), Caches())
    net.parts[0].norm.weight = net.parts[0].block[1].weight
    net.parts[0].held = [net.parts[0].conv.weight, {"scale": torch.ones(3)}]
    net.stem.register_forward_hook(lambda *_: None)
    copied, twins = copy_to_meta(net)
    first = copied.parts[0]
    assert first.norm is first.again
    assert first.other is first.block
    assert first.norm.weight is first.block[1].weight
    assert first.held[0] is first.conv.weight
    assert any(a is net.parts[0].conv.weight and b is first.conv.weight for a, b in twins)
    assert not copied.stem._forward_hooks
    assert net.stem._forward_hooks
    tensors = [*copied.parameters(), *copied.buffers(), first.held[1]["scale"], copied.parts[1].memory.mask]
    assert {t.device.type for t in tensors} == {"meta"}


def modules_alive():
    return sum(issubclass(type(o), nn.Module) for o in gc.get_objects())


def test_nothing_of_the_copies_stays():
    net = Chain(Part(), TwoNames())
    plan(net)
    gc.collect()
    known = modules_alive()
    plan(net)
    assert modules_alive() == known  # without waiting for the garbage collector


LAZY = {
    "LazyConv2d": lambda: nn.LazyConv2d(6, 1),
    "LazyBatchNorm2d": nn.LazyBatchNorm2d,
    "LazyLinear": lambda: nn.LazyLinear(6),
}


@pytest.mark.parametrize("name", LAZY)
def test_a_lazy_network_is_refused_by_name_until_it_has_shapes(name):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), LAZY[name]())
    config = KWConfig(warehouses={"0": "all"})
    with pytest.raises(ValueError, match=rf"1 is a {name} without a shape: call the network on an input"):
        plan_conversion(net, config, example_input=X)
    net(X)
    assert [layer.name for layer in plan_conversion(net, config, example_input=X).layers] == ["0"]


class Tokens(nn.Module):
    """A recurrence over the positions of an image: torch's, or one of its own."""

    def __init__(self, own):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.lstm, self.cell = nn.LSTM(6, 6, batch_first=True), nn.GRUCell(6, 6)
        self.own = own

    def forward(self, x):
        tokens = self.body(self.stem(x)).flatten(2).transpose(1, 2)
        if not self.own:
            return self.lstm(tokens)[0]
        state = tokens[:, 0]
        for t in range(tokens.shape[1]):
            state = self.cell(tokens[:, t], state).tanh()
        return state


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_recurrent_layers_need_no_run():
    calls = []
    for size in (4, 64):
        with Counter() as counter:
            found = plan_conversion(Tokens(False), KWConfig(), example_input=torch.ones(2, 3, size, size))
        assert [layer.name for layer in found.layers] == ["body"]
        calls.append(counter.calls)
    assert calls[0] == calls[1]


def test_a_recurrence_of_the_networks_own_ends_with_a_word(monkeypatch):
    monkeypatch.setattr(trial, "LONGEST", 100)
    assert plan_conversion(Tokens(True), KWConfig(), example_input=torch.ones(2, 3, 2, 2)).layers
    with pytest.raises(ValueError, match="calls more than 100 functions of torch for one input: try a smaller one"):
        plan_conversion(Tokens(True), KWConfig())


def held(net):
    """Which module holds which tensor under which name, and where that lies."""
    own = [(m, (*m._parameters.items(), *m._buffers.items())) for m in net.modules()]
    return [(id(m), key, id(t), t is not None and t.device) for m, tensors in own for key, t in tensors]


@pytest.mark.parametrize("name", ["coat_lite_tiny", "edgenext_xx_small", "xcit_nano_12_p8_224"])
def test_networks_of_timm_are_as_they_were(name):
    net = timm.create_model(name, num_classes=3)
    before, state = held(net), {key: value.clone() for key, value in net.state_dict().items()}
    plan_conversion(net, KWConfig())
    assert held(net) == before
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
