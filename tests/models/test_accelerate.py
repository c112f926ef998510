"""timm's own CondConv networks, computed by our primitive: results, gradients, state dicts and exports are the same."""

import copy
import io
import pickle

import onnxruntime
import pytest
import torch
from parity import assert_parity
from timm.layers.cond_conv2d import CondConv2d
from timm.models._efficientnet_blocks import CondConvResidual
from torch import nn

from kernelwarehouse import accelerate_, set_implementation, tune
from kernelwarehouse.models import dynamic_layers

# A layer of every kind: kernel, TensorFlow's padding at stride 2 on odd sizes, dilation, groups, biases
LAYERS = {
    "pointwise": (6, 8, 1, {}),
    "padding": (6, 8, 3, {"padding": 1, "bias": True}),
    "same-stride": (4, 6, 3, {"padding": "same", "stride": 2}),
    "same-even": (4, 6, 4, {"padding": "same", "bias": True}),
    "same-dilated": (4, 4, (3, 5), {"padding": "same", "stride": (2, 1), "dilation": (1, 2)}),
    "depthwise": (6, 6, 5, {"padding": "same", "stride": 2, "groups": 6, "bias": True}),
    "grouped": (6, 4, 3, {"padding": "valid", "groups": 2}),
}


class Network(nn.Module):
    """Two of timm's blocks, the first with TensorFlow's padding at stride 2."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        arguments = {"dw_kernel_size": 3, "exp_ratio": 2.0, "num_experts": 3}
        first = CondConvResidual(6, 8, stride=2, pad_type="same", **arguments)
        self.blocks = nn.Sequential(first, CondConvResidual(8, 8, **arguments))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture
def networks():
    """timm's, and a copy that is accelerated."""
    torch.manual_seed(0)
    net = Network().double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    net.eval()
    return net, accelerate_(copy.deepcopy(net))


def images(batch=2, dtype=torch.float64, sizes=(13, 10)):
    return torch.randn(batch, 3, *sizes, dtype=dtype, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_computes_what_timms_does(case):
    torch.manual_seed(0)
    cin, cout, size, arguments = LAYERS[case]
    theirs = nn.ModuleList([CondConv2d(cin, cout, size, num_experts=3, **arguments).double()])
    ours = accelerate_(copy.deepcopy(theirs))
    x = torch.randn(2, cin, 7, 10, dtype=torch.float64, requires_grad=True)
    r = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    ours[0].weight, ours[0].bias = theirs[0].weight, theirs[0].bias
    leaves = {"x": x, "r": r, **dict(theirs[0].named_parameters())}
    assert_parity(lambda: ours[0](x, r), lambda: theirs[0](x, r), leaves)
    for implementation in ("reference", "materialize", "grouped"):
        ours[0].implementation = implementation
        torch.testing.assert_close(ours[0](x, r), theirs[0](x, r))


@pytest.mark.parametrize("training", [False, True])
def test_a_network_computes_what_it_did(networks, training):
    theirs, ours = networks
    theirs.train(training), ours.train(training)
    y, expected = ours(images()), theirs(images())
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y.square().sum().backward(), expected.square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    assert all(m.training == training for m in ours.modules())


def test_the_state_dict_is_what_it_was(networks):
    theirs, ours = networks
    state = theirs.state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in state.items()}
    fresh = Network().double().eval()
    other = accelerate_(copy.deepcopy(fresh))
    fresh.load_state_dict(ours.state_dict())
    other.load_state_dict(state)
    for net in (fresh, other):
        torch.testing.assert_close(net(images()), theirs(images()), rtol=1e-10, atol=1e-10)


def test_an_optimizer_stays_valid(networks):
    theirs, _ = networks
    before = list(theirs.parameters())
    accelerate_(theirs)
    assert all(p is q for p, q in zip(before, theirs.parameters(), strict=True))
    assert len(dynamic_layers(theirs)) == 6


def test_copies_and_pickles(networks):
    theirs, ours = networks
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(twin(images()), theirs(images()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(networks, dtype):
    theirs, ours = (net.to(dtype) for net in networks)
    x = images(dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.05, atol=0.05 * theirs(x).abs().max().item())


def test_autocast(networks):
    theirs, ours = (net.float() for net in networks)
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), theirs(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_export_for_any_batch(networks):
    theirs, ours = (net.float() for net in networks)
    program = torch.export.export(ours, (images(3, torch.float32),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 2, 5):
        x = images(batch, torch.float32)
        torch.testing.assert_close(program.module()(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_for_any_batch(networks, dynamo):
    theirs, ours = (net.float() for net in networks)
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    if not dynamo:
        shapes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    file = io.BytesIO()
    torch.onnx.export(ours, (images(3, torch.float32),), file, dynamo=dynamo, **shapes)
    session = onnxruntime.InferenceSession(file.getvalue())
    for batch in (1, 2, 5):
        x = images(batch, torch.float32)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), theirs(x), rtol=1e-3, atol=1e-3)


def test_layers_can_be_told_how_to_compute_and_tuned(networks):
    theirs, ours = networks
    set_implementation(ours, "grouped")
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-10, atol=1e-10)
    set_implementation(ours, "auto")
    for training in (False, True):
        assert sum(layer.count for layer in tune(ours, images(), training=training, rounds=1)) == 6
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-10, atol=1e-10)


def test_a_layer_under_two_names_stays_one():
    layer = CondConv2d(4, 4, 3, padding=1)
    net = accelerate_(nn.ModuleDict({"a": layer, "b": nn.ModuleList([layer])}))
    assert net["a"] is net["b"][0]
    assert type(net["a"]) is not CondConv2d


def hooked(net):
    net.blocks[1].conv_dw.register_forward_hook(lambda *_: None)


def overridden(net):
    net.blocks[0].conv_pw.forward = lambda x, _: x


def parametrized(net):
    nn.utils.parametrize.register_parametrization(net.blocks[0].conv_pw, "weight", nn.Identity())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, r"blocks\.1\.conv_dw has forward hooks"),
        (overridden, r"blocks\.0\.conv_pw has a forward of its own"),
        (parametrized, r"blocks\.0\.conv_pw: it is parametrized"),
    ],
)
def test_what_would_be_lost_is_refused_and_nothing_changed(change, message):
    net = Network()
    change(net)
    before = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=message):
        accelerate_(net)
    assert [type(m) for m in net.modules()] == before


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="no layer to accelerate"):
        accelerate_(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match="put it into a module first"):
        accelerate_(CondConv2d(3, 4, 3))
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        accelerate_(nn.DataParallel(Network()))


def test_script_says_what_to_use_instead(networks):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace"):
        torch.jit.script(networks[1])
