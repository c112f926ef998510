"""Networks converted to CondConv: routed by layer or by block, copied, saved, compiled, exported, started warm."""

import copy
import io
import json
import pickle

import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
from networks import narrow_resnet
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from kernelwarehouse import CondConvConfig, convert_, merge_, plan_conversion, plans, sharing_groups, tune
from kernelwarehouse.detection.backbone import KWBackbone
from kernelwarehouse.models import (
    ConversionPlan,
    create_model,
    dynamic_layers,
    load_weights,
    set_implementation,
    to_upstream,
)
from kernelwarehouse.models.ops.condconv import BlockRouting, RoutedBlock

CONFIGS = {
    "layer": CondConvConfig(experts=3),
    "block": CondConvConfig(experts=3, routing="block", include=(r"layer[34].*", "fc")),
}


def images(batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def converted(config, **kwargs):
    """A narrow ResNet18 whose routings depend on the input."""
    net = convert_(narrow_resnet(**kwargs), config, keep_weights=False)
    for layer in dynamic_layers(net).values():
        nn.init.normal_(layer.routing_fn.weight)
    return net.eval()


@pytest.fixture
def net(config):
    return converted(config)


@pytest.fixture
def small():
    """One with a block in each stage; the last blocks route their layers, the classifier is routed by its own input."""
    return converted(CONFIGS["block"], layers=(1, 1, 1, 1))


def test_a_block_is_routed_once_from_its_input():
    net = convert_(narrow_resnet(), CONFIGS["block"], keep_weights=False)
    block = net.layer4[0]
    assert isinstance(block, RoutedBlock)
    assert isinstance(block, timm.models.resnet.BasicBlock)
    assert block.conv1.routing_fn is block.conv2.routing_fn is block.downsample[0].routing_fn is block.routing_fn
    assert not isinstance(net.layer2[0], RoutedBlock)
    assert not isinstance(net.fc.routing_fn, BlockRouting)
    seen = []
    block.conv2.register_forward_hook(lambda layer, *_: seen.append(layer.routing_fn.current))
    x = torch.randn(2, 16, 4, 4)
    block(x)
    torch.testing.assert_close(
        seen[0], torch.sigmoid(nn.functional.linear(x.mean((2, 3)), *block.routing_fn.parameters()))
    )
    assert block.routing_fn.current is None
    assert [name for name in net.state_dict() if "layer4.0" in name and "routing" in name] == [
        "layer4.0.routing_fn.weight",
        "layer4.0.routing_fn.bias",
    ]


def test_a_layer_whose_block_does_not_run_says_so():
    net = convert_(narrow_resnet(), CONFIGS["block"], keep_weights=False)
    with pytest.raises(RuntimeError, match="comes from its block, which is not running"):
        net.layer4[0].conv1(torch.randn(2, 16, 4, 4))
    with pytest.raises(ValueError, match=r"reads an input \(B, 16, …\).*routing='layer'"):
        net.layer4[0](torch.randn(2, 5, 4, 4))
    assert net.layer4[0].routing_fn.current is None


def test_the_plan_counts_what_there_is_and_is_plain(config, net):
    plan = plan_conversion(narrow_resnet(), config)
    assert sum(p.numel() for p in net.parameters()) == plan.parameters_after
    assert ConversionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan == plans(net)[0]
    assert ("layer4.1" if config.routing == "block" else "the layer") in str(plan)
    other = convert_(narrow_resnet(), ConversionPlan.from_dict(plan.to_dict()), keep_weights=False)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other.eval()(images()), net(images()))


@pytest.mark.parametrize("training", [False, True])
def test_a_static_network_is_kept_for_every_input_and_experts_part(config, training):
    static = narrow_resnet().train(training)
    net = convert_(copy.deepcopy(static), config)
    for batch in (1, 4):
        x = 10 * images(batch) if not training else images(batch + 1)
        expected = copy.deepcopy(static)(x)
        torch.testing.assert_close(copy.deepcopy(net)(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    differences = []
    for _ in range(2):
        optimizer.zero_grad()
        net(images(4)).square().sum().backward()
        gradient = net.layer4[1].conv2.weight.grad
        differences.append(((gradient - gradient.mean(0)).norm() / gradient.norm()).item())
        optimizer.step()
    assert differences[0] < 1e-5  # every r is ½
    assert differences[1] > 1e-4


def test_copies_pickles_and_files_compute_the_same(config, net, tmp_path):
    expected = net(images())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert plans(twin) == plans(net)
        torch.testing.assert_close(twin(images()), expected)
        assert len({id(p) for p in twin.parameters()}) == len({id(p) for p in net.parameters()})
    safetensors.torch.save_model(net, tmp_path / "net.safetensors")
    fresh = convert_(narrow_resnet(), config, keep_weights=False).eval()
    load_weights(fresh, safetensors.torch.load_file(tmp_path / "net.safetensors"))
    torch.testing.assert_close(fresh(images()), expected)


def test_training_is_as_with_the_definition(net):
    twin = copy.deepcopy(net).double().train()
    net.double().train()
    set_implementation(twin, "reference")
    x = images(2, torch.float64)
    y, expected = net(x), twin(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward(), expected.square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9, msg=name)


def test_channels_last_and_half(net):
    expected = net(images())
    torch.testing.assert_close(net.to(memory_format=torch.channels_last)(images()), expected, rtol=1e-4, atol=1e-4)
    half = net.bfloat16()(images().bfloat16()).float()
    torch.testing.assert_close(half, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_compiled_without_a_break(small):
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), small(images()))


def test_export_for_any_batch(small):
    program = torch.export.export(small, (images(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 5):
        torch.testing.assert_close(program.module()(images(batch)), small(images(batch)), rtol=1e-3, atol=1e-3)


def test_onnx_for_any_batch(small):
    file = io.BytesIO()
    shapes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(small, (images(3),), file, dynamo=False, **shapes)
    session = onnxruntime.InferenceSession(file.getvalue())
    for batch in (1, 5):
        (y,) = session.run(None, {"x": images(batch).numpy()})
        torch.testing.assert_close(torch.from_numpy(y), small(images(batch)), rtol=1e-3, atol=1e-3)


def test_tuned(net):
    expected = net(images())
    found = tune(net, images(), training=True, rounds=1)
    assert sum(layer.count for layer in found) == len(dynamic_layers(net))
    torch.testing.assert_close(net(images()), expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_merged(net):
    before = net.state_dict().keys()
    with pytest.raises(ValueError, match="condconv has nothing that could be merged"):
        merge_(net, images())
    assert net.state_dict().keys() == before


def test_what_shares_is_wrapped_and_frozen_together():
    net = convert_(narrow_resnet(), CONFIGS["block"], keep_weights=False)
    groups = {len(group) for group in sharing_groups(net)}
    assert groups == {1, 2, 3}  # the classifier; a block; one with a shortcut of its own
    static = narrow_resnet()
    static.layer4.requires_grad_(False)
    net = convert_(static, CONFIGS["block"])
    assert not any(p.requires_grad for p in net.layer4.parameters())
    assert net.layer3[0].routing_fn.weight.requires_grad


def test_a_detectors_backbone():
    """It drops the classifier; its frozen stages freeze the routings of their blocks."""
    fields = {"routing": "block", "include": [r"layer\d.*"], "experts": 2}
    config = {"model": "cond_resnet18", "model_kwargs": {"channels": [8, 8, 16, 16]}, **fields}
    backbone = KWBackbone(config=config, frozen_stages=1)
    x = torch.randn(2, 3, 64, 64)
    assert [tuple(y.shape[1:]) for y in backbone(x)] == [(8, 16, 16), (8, 8, 8), (16, 4, 4), (16, 2, 2)]
    frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    assert any("layer1.0.routing_fn" in name for name in frozen)
    assert not any("layer2" in name for name in frozen)


def test_timms_checkpoints_are_read_and_written():
    theirs = timm.create_model("tf_efficientnet_cc_b0_4e", num_classes=3).eval()
    ours = create_model("cond_tf_efficientnet_b0", experts=4, num_classes=3).eval()
    assert isinstance(theirs.blocks[5][0].conv_dw.dynamic_padding, bool)
    assert ours.blocks[5][0].conv_dw.pads_same
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)
    load_weights(ours, theirs.state_dict())
    x = torch.randn(2, 3, 45, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    written = to_upstream(ours)
    assert written.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(written[key], value)
    load_weights(ours, ours.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 0}, "experts.*at least 1"),
        ({"routing": "network"}, "routing"),
        ({"expert": 4}, "expert"),
        ({"include": ("layer9.*",)}, r"include: 'layer9\.\*' matches no layer"),
    ],
)
def test_bad_fields_are_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        plan_conversion(narrow_resnet(), CondConvConfig(**change))


def test_blocks_that_cannot_be_routed_are_refused_and_nothing_changed():
    net = narrow_resnet()
    net.layer4[0].forward = lambda x: x
    before = [type(m) for m in net.modules()]
    with pytest.raises(
        ValueError, match=r"the block layer4\.0, a BasicBlock, has a forward of its own.*routing='layer'"
    ):
        convert_(net, CONFIGS["block"])
    assert [type(m) for m in net.modules()] == before


def test_subclasses_stay_static_but_for_those_that_pad_as_tensorflow():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Conv2d(3, 4, 3), Conv2dSame(4, 4, 3, stride=2), Scaled(4, 4, 1), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 3, 9, 12)
    expected = net(x)
    plan = plan_conversion(net, CondConvConfig(experts=2))
    assert [name for name, _ in plan.left] == ["2"]
    torch.testing.assert_close(convert_(net, plan)(x), expected, rtol=1e-4, atol=1e-5)
    assert sorted(dynamic_layers(net)) == ["1", "3"]
