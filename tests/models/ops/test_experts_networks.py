"""Networks whose convolutions mix experts: the warm start, placement, export, checkpoints, a detector's backbone."""

import onnxruntime
import pytest
import timm
import torch
from networks import narrow_resnet
from torch import nn

from kernelwarehouse import (
    CheckpointError,
    ConversionPlan,
    KWConfig,
    build_model,
    convert_,
    load_checkpoint,
    merge_,
    plan_conversion,
    plans,
    set_implementation,
    set_temperature,
)
from kernelwarehouse.configs.schema import ConfigError, find_config
from kernelwarehouse.detection.backbone import KWBackbone
from kernelwarehouse.models import anneals, dynamic_layers, load_weights, read_config, temperatures, to_upstream
from kernelwarehouse.models.ops.dyconv import DYConfig
from kernelwarehouse.models.ops.odconv import ODConfig

CONFIGS = {"dyconv": DYConfig, "odconv": ODConfig}
OPERATORS = pytest.mark.parametrize("operator", CONFIGS)


def images(count, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def scattered(net):
    """The network with attentions that depend on their inputs."""
    torch.manual_seed(0)
    for layer in dynamic_layers(net).values():
        for p in layer.attention.parameters():
            nn.init.normal_(p, std=0.3)
    return net.eval()


@OPERATORS
@pytest.mark.parametrize("number", [1, 4])
def test_a_converted_network_is_the_static_one_at_every_temperature(operator, number):
    net = narrow_resnet()
    before = net(images(3))
    convert_(net, CONFIGS[operator](kernel_num=number))
    for value in (1.0, 12.0, 30.0):
        set_temperature(net, value)
        for x, y in ((images(3), before), (10 * images(2), narrow_resnet()(10 * images(2)))):
            assert (net(x) - y).abs().max() <= 1e-5 * y.abs().max()
    assert temperatures(net) == ({} if (operator, number) == ("dyconv", 1) else {operator: 30.0})


@OPERATORS
def test_plans(operator):
    plan = plan_conversion(narrow_resnet(), CONFIGS[operator]())
    names = {layer.name for layer in plan.layers}
    assert {"layer1.0.conv1", "layer4.1.conv2"} <= names
    assert ("layer2.0.downsample.0" in names) == (operator == "dyconv")
    assert not {"conv1", "fc"} & names
    assert ConversionPlan.from_dict(plan.to_dict()) == plan
    assert sum(p.numel() for p in convert_(narrow_resnet(), plan).parameters()) == plan.parameters_after
    chosen = CONFIGS[operator](include=("conv1", r"layer1\..*"), exclude=(r".*conv2", r".*downsample.*"))
    assert [la.name for la in plan_conversion(narrow_resnet(), chosen).layers] == [
        "conv1",
        "layer1.0.conv1",
        "layer1.1.conv1",
    ]
    with pytest.raises(ValueError, match="include names fc, a Linear: there is a form for Conv1d, Conv2d, Conv3d only"):
        plan_conversion(narrow_resnet(), CONFIGS[operator](include=("fc",)))


def test_temperatures_fall_as_the_papers_say():
    net = convert_(narrow_resnet(), DYConfig(anneal="authors", include=(r"layer1\..*",)))
    convert_(net, ODConfig(include=(r"layer4\..*",)))
    authors, paper = anneals(net)["dyconv"], anneals(net)["odconv"]
    assert [authors.value(0.5, epoch) for epoch in (0, 1, 10, 11, 50)] == [34, 31, 4, 1, 1]
    assert [paper.value(share, 0) for share in (0, 0.5, 1)] == [30, 15.5, 1]
    assert paper.epochs == 10
    with pytest.raises(ValueError, match="temperature must be between"):
        set_temperature(net, 0.0)


@OPERATORS
def test_onnx_for_any_batch(operator, tmp_path):
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 3)
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    net = scattered(convert_(net, CONFIGS[operator](kernel_num=3), example_input=images(2)))
    assert list(dynamic_layers(net)) == ["1", "2", "3"]
    path = tmp_path / "net.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(net, (images(3),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 2, 5):
        y = session.run(None, {session.get_inputs()[0].name: images(count).numpy()})[0]
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), net(images(count)), rtol=1e-4, atol=1e-5)


@OPERATORS
def test_checkpoints(operator, tmp_path):
    net = scattered(convert_(narrow_resnet(), CONFIGS[operator]()))
    set_temperature(net, 3.0)
    torch.save(net.state_dict(), tmp_path / "ours.pth")
    torch.save(to_upstream(net), tmp_path / "theirs.pth")
    twin = convert_(narrow_resnet(), CONFIGS[operator]()).eval()
    load_checkpoint(twin, tmp_path / "ours.pth")
    assert torch.equal(twin(images(2)), net(images(2)))
    load_checkpoint(twin, tmp_path / "theirs.pth")
    assert temperatures(twin) == {operator: 1.0}
    set_temperature(net, 1.0)
    assert torch.equal(twin(images(2)), net(images(2)))
    others = [CONFIGS["odconv" if operator == "dyconv" else "dyconv"](), KWConfig()]
    for config in others:
        other, before = convert_(narrow_resnet(), config).state_dict(), twin.state_dict()
        kept = {name: value.clone() for name, value in before.items()}
        with pytest.raises(CheckpointError, match=r"the weights do not fit this ResNet:\n.*missing: layer1\.0\.conv1"):
            load_weights(twin, other)
        assert all(torch.equal(value, kept[name]) for name, value in twin.state_dict().items())


@OPERATORS
def test_merging_is_refused_and_implementations_agree(operator):
    net = scattered(convert_(narrow_resnet(), CONFIGS[operator]()))
    with pytest.raises(ValueError, match=f"^{operator} has nothing that could be merged"):
        merge_(net, images(2))
    y = net(images(2))
    for name in ("reference", "grouped", "materialize"):
        set_implementation(net, name)
        torch.testing.assert_close(net(images(2)), y, rtol=1e-4, atol=1e-4)


@OPERATORS
def test_a_detectors_backbone(operator):
    model = {"dyconv": "dy_resnet18", "odconv": "od_resnet18"}[operator]
    config = {"model": model, "model_kwargs": {"channels": [8, 8, 16, 16]}}
    backbone = KWBackbone(config=config, frozen_stages=1)
    assert [tuple(y.shape[1:]) for y in backbone(images(2, 64))] == [(8, 16, 16), (8, 8, 8), (16, 4, 4), (16, 2, 2)]
    frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    assert any("layer1.0.conv1.attention" in name for name in frozen)
    assert not any("layer2" in name for name in frozen)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_num": 0}, "kernel_num.*1"),
        ({"kernel_num": 2.5}, "kernel_num"),
        ({"reduction": 0}, "reduction"),
        ({"kernels": 4}, "unknown field 'kernels'; did you mean 'kernel_num'"),
        ({"exclude": ["stage9.*"]}, "matches no layer"),
    ],
)
@pytest.mark.parametrize("model", ["dy_resnet18", "od_resnet18"])
def test_what_a_configuration_cannot_say_is_one_line(model, fields, message):
    with pytest.raises((ConfigError, ValueError), match=message) as error:
        build_model({"model": model, **fields})
    assert "\n" not in str(error.value)


def test_shipped_files():
    root = find_config("resnet18/resnet18").parent.parent
    files = sorted(path for path in root.glob("*/*.json") if path.stem.startswith(("dy", "od")))
    assert len(files) == 14
    for path in files:
        config = read_config(path)
        assert path.stem == f"{config.model.model[:2]}{config.model.operator_fields['kernel_num']}x_{path.parent.name}"
        assert config.run.opt == "sgd"
        assert config.model.operator_fields.get("anneal", "paper") == "paper"


def test_names_that_timm_knows():
    net = timm.create_model("od_resnet18", kernel_num=1, channels=(8, 8, 8, 8), num_classes=3)
    assert plans(net)[0].config == ODConfig(kernel_num=1)
    assert len(timm.list_models("dy_*")) == 4
    assert len(timm.list_models("od_*")) == 5
