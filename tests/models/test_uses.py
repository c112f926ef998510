"""What a network asks of a layer beyond a call with a batch: the layer stays, and the plan says why."""

import json
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import narrow_resnet
from odd_modules import Chain, Part, Scripted
from timm.models.resnet import ResNet
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy_operator import ToyConfig

from kernelwarehouse import KWConfig, convert_, plan_conversion
from kernelwarehouse.models import ConversionPlan, dynamic_layers, sites

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three convolutions, of which one is used as a test says."""

    def __init__(self, use):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv, self.body = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.kept, self.forwards, self.layers = [self.conv.weight], [self.conv.forward], {"conv": self.conv}
        self.conv.gain = 1.0
        self.use = use

    def forward(self, x):
        return self.body(self.use(self, self.stem(x)))


def in_place(net, x):
    net.conv.weight.data.mul_(1)
    return net.conv(x)


def another_stride(net, x):
    net.conv.stride = (1, 1)
    return net.conv(x)


def class_checked(net, x):
    if type(net.conv) is not nn.Conv2d:
        raise TypeError("no convolution")
    return net.conv(x)


def only_in(training, net, x):
    return F.conv2d(x, net.conv.weight, padding=1) if net.training == training else net.conv(x)


def apart(net, x):
    return F.conv2d(x, net.conv.weight, padding=1)


USES = {
    "weight, and it is called": (lambda net, x: net.conv(x) + apart(net, x), "reads its weight"),
    "weight in training": (partial(only_in, True), "reads its weight"),
    "weight by name": (lambda net, x: net.conv(x) * net.get_parameter("conv.weight").mean(), "reads its weight"),
    "device of the weight": (lambda net, x: net.conv(x.to(net.conv.weight.device)), "reads its weight"),
    "bias": (lambda net, x: net.conv(x) * (1 if net.conv.bias is None else 2), "reads its bias"),
    "an attribute that somebody set": (lambda net, x: net.conv(x) * net.conv.gain, "reads its gain"),
    "its parameters": (lambda net, x: net.conv(x) + sum(p.sum() for p in net.conv.parameters()), "uses its weight out"),
    "its weight in a list": (lambda net, x: net.conv(F.conv2d(x, net.kept[0], padding=1)), "uses its weight outside"),
    "it in a dictionary": (lambda net, x: net.layers["conv"](x), "uses its weight outside"),
    "changed in place": (in_place, "reads its weight"),
    "another stride": (another_stride, "sets its stride"),
    "its class": (lambda net, x: net.conv(x) if isinstance(net.conv, nn.Conv2d) else x, "only because it is a Conv2d"),
    "its class, or an error": (class_checked, r"in place of the Conv2d \(no convolution\)"),
    "its state": (
        lambda net, x: net.conv(x) + net.conv.state_dict()["weight"].sum(),
        "does not run with another layer",
    ),
    "by a keyword": (lambda net, x: net.conv(input=x), "something else than one tensor"),
    "without a batch": (lambda net, x: torch.stack([net.conv(one) for one in x]), r"without a batch.* \(6, 8, 8\)"),
}


@pytest.mark.parametrize("use", USES)
def test_a_layer_that_is_used_otherwise_stays_and_is_refused_by_name(use):
    function, reason = USES[use]
    net = Net(function).eval()
    expected = net(X)
    plan = plan_conversion(net, KWConfig(), example_input=X)
    assert [layer.name for layer in plan.layers] == ["body"]
    assert [name for name, _ in plan.left] == ["conv"]
    assert "conv stays static: the network" in str(plan)
    with pytest.raises(ValueError, match=f"^conv cannot be converted: the network .*{reason}"):
        plan_conversion(net, KWConfig(warehouses={"conv|body": "all"}), example_input=X)
    convert_(net, plan)
    torch.testing.assert_close(net(X), expected, rtol=1e-4, atol=1e-5)
    net.train()(X).sum().backward()


UNUSED = {
    "only its weight": apart,
    "weight in evaluation": partial(only_in, False),
    "torch's own method": lambda net, x: net.conv._conv_forward(x, net.conv.weight, net.conv.bias),
    "named parameters": lambda net, x: F.conv2d(x, dict(net.named_parameters())["conv.weight"], padding=1),
    "its forward in a list": lambda net, x: net.forwards[0](x),
}


@pytest.mark.parametrize("use", UNUSED)
def test_a_layer_that_is_only_read_is_not_converted(use):
    net = Net(UNUSED[use]).eval()
    expected = net(X)
    with pytest.raises(ValueError, match=r"^conv cannot be converted: the network"):
        plan_conversion(net, KWConfig(warehouses={"conv": "conv"}), example_input=X)
    convert_(net, KWConfig(), example_input=X)
    assert list(dynamic_layers(net)) == ["body"]
    torch.testing.assert_close(net(X), expected, rtol=1e-4, atol=1e-5)


ORDINARY = {
    "its arguments": lambda net, x: (
        net.conv(x) * net.conv.stride[0] * len(net.conv.kernel_size) / net.conv.out_channels
    ),
    "type of its parameters": lambda net, x: net.conv(x.to(next(net.conv.parameters()).dtype)),
    "twice": lambda net, x: net.conv(net.conv(x)),
    "checkpointed": lambda net, x: checkpoint(net.conv, x, use_reentrant=False),
    "compiled": lambda net, x: torch.compile(net.conv, backend="eager")(x),
    "its mode": lambda net, x: net.conv.train(net.training)(x) if not net.conv.training else net.conv(x),
}


@pytest.mark.parametrize("use", ORDINARY)
@pytest.mark.parametrize("config", [KWConfig(), ToyConfig()], ids=lambda config: config.operator)
def test_what_a_converted_layer_has_too_is_no_obstacle(use, config):
    net = Net(ORDINARY[use]).eval()
    expected = net(X)
    convert_(net, config, example_input=X)
    assert list(dynamic_layers(net)) == ["conv", "body"]
    torch.testing.assert_close(net(X), expected, rtol=1e-4, atol=1e-5)


PARTLY = {
    "samples one by one": lambda net, x: torch.cat([net.conv(one[None]) for one in x]),
    "then the first sample": lambda net, x: net.conv(x) + net.conv(x[:1]),
    "nothing": lambda net, x: x + net.conv(x[:0]).sum(),
}


@pytest.mark.parametrize("use", PARTLY)
def test_every_call_must_be_with_the_batch(use):
    with pytest.raises(ValueError, match="conv reads an input whose first dimension is not the batch"):
        plan_conversion(Net(PARTLY[use]), KWConfig(), example_input=X)


class Pool(nn.Module):
    """CLIP's attention: torch's function with the weights of four linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Linear(8, 8), nn.Linear(8, 8)
        self.q, self.k, self.v, self.c = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = self.body(self.stem(x)).transpose(0, 1)
        weights = {f"{name}_proj_weight": getattr(self, name).weight for name in "qkv"}
        biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        arguments = None, biases, None, None, False, 0.0, self.c.weight, self.c.bias
        return F.multi_head_attention_forward(x, x, x, 8, 2, *arguments, use_separate_proj_weight=True, **weights)[0]


class Attention(nn.Module):
    """All of torch's that has a fast path in evaluation, or none."""

    def __init__(self):
        super().__init__()
        self.stem, kinds = nn.Linear(8, 8), {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**kinds), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**kinds), 1)
        self.single = nn.TransformerEncoderLayer(**kinds)
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.encoder(self.stem(x))
        x = self.single(self.decoder(x, x))
        return self.heads(x, x, x)[0]


@pytest.mark.parametrize(("cls", "count"), [(Pool, 1), (Attention, 8)])
@torch.no_grad()
def test_attention_that_reads_weights(cls, count):
    net, x = cls().eval(), torch.randn(2, 5, 8)
    expected = net(x)
    convert_(net, KWConfig(), example_input=x)
    assert len(dynamic_layers(net)) == count
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


# Some of timm's, with the layers that they read, or that are of classes of timm's.
TIMM = {
    "edgenext_xx_small": (48, ["stages.1.blocks.1.pos_embd.token_projection"]),
    "convit_tiny": (58, [f"blocks.{i}.attn.qk" for i in range(10)]),
    "coat_lite_tiny": (51, []),
    "tf_efficientnet_b0": (44, [f"blocks.{i}.0.conv_dw" for i in (1, 2, 3, 5)]),
}


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_networks_of_timm_run_after_what_the_plan_says(name):
    with torch.device("meta"):
        net = timm.create_model(name, in_chans=1)
    count, left = TIMM[name]
    plan = plan_conversion(net, KWConfig())
    assert len(plan.layers) == count
    assert [layer for layer, _ in plan.left] == left
    convert_(net, plan, keep_weights=False)
    for training in (True, False):
        assert net.train(training)(torch.empty(2, 1, 224, 224, device="meta")).shape == (2, 1000)


def test_a_network_of_other_layers_alone_is_refused_with_the_reason():
    with torch.device("meta"):
        net = timm.create_model("nfnet_l0", in_chans=1)
    assert sites.find_sites(net).untraced is None
    with pytest.raises(ValueError, match=r"nothing to convert in NormFreeNet; stem\.conv2: it is a ScaledStdConv2d"):
        plan_conversion(net, KWConfig())


class TestTables:
    def test_a_network_of_a_table_is_not_run(self, monkeypatch):
        monkeypatch.setattr(sites, "trace_layers", None)
        for name in ("resnet18", "convnext_atto", "deit_tiny_patch16_224", "mobilenetv2_050"):
            with torch.device("meta"):
                net = timm.create_model(name)
            assert plan_conversion(net, KWConfig()).layers

    def test_one_that_was_changed_is(self):
        class Changed(ResNet):
            def forward(self, x):
                return super().forward(x) + self.layer1[0].conv2.weight.mean()

        net = narrow_resnet()
        net.__class__ = Changed
        plan = plan_conversion(net, KWConfig())
        assert plan.left == (("layer1.0.conv2", "the network reads its weight"),)
        convert_(net, plan)(torch.randn(2, 3, 32, 32))

    def test_a_forward_on_an_instance_is_looked_at(self):
        net = narrow_resnet()
        block, old = net.layer2[0], net.layer2[0].forward
        block.forward = lambda x: old(x) + block.conv1.weight.mean()
        plan = plan_conversion(net, KWConfig())
        assert plan.left == (("layer2.0.conv1", "the network reads its weight"),)
        convert_(net, plan)(torch.randn(2, 3, 32, 32))


def test_a_plan_says_when_the_network_was_not_run():
    plan = plan_conversion(Chain(Part(), Scripted()), KWConfig(warehouses={r"parts\.0\.conv": "a"}), example_input=X)
    assert "how the layers are used was not seen: it cannot be copied to be run" in str(plan)
    assert ConversionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(ValueError, match=r"cannot be copied to be run .*the RecursiveScriptModule parts\.1\.inner"):
        plan_conversion(Chain(Part(), Scripted()), KWConfig(), example_input=X)


@pytest.mark.parametrize("example", [(X,), torch.empty(0, 3, 8, 8), torch.ones(()), 7])
def test_an_example_that_is_none(example):
    with pytest.raises(ValueError, match="example_input must be a tensor with a sample or more, found"):
        plan_conversion(Chain(Part()), KWConfig(), example_input=example)


def test_channels_are_guessed_from_any_convolution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body, self.stem = nn.Linear(6, 2), nn.Conv2d(4, 6, 3), nn.Conv2d(5, 4, 3)

        def forward(self, x):
            return self.head(self.body(self.stem(x)).mean((2, 3)))

    assert [layer.name for layer in plan_conversion(Backwards(), KWConfig()).layers] == ["body"]
