"""The backbone: its feature maps, what it leaves out, which weights it takes, and what it freezes."""

import pytest
import torch
from mmdet.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.detection import DynamicBackbone, SimpleFeaturePyramid
from kernelwarehouse.models import CheckpointError, build_model, sharing, temperatures, to_upstream

# Small networks of each family, with arguments of the backbone.
FAMILIES = {
    "resnet18": ({"layers": [1, 1, 2, 1], "channels": [8, 16, 16, 32]}, {}),
    "mobilenetv2_050": ({}, {"final_features": True}),
    "convnext_tiny": ({"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}, {"out_norm": True}),
    "deit_tiny": ({"depth": 4, "embed_dim": 24}, {"out_indices": (-1,)}),
}
CASES = [(prefix, family) for prefix in ("", "kw_") for family in FAMILIES]


def fields(model, **more):
    family = model.removeprefix("kw_")
    return {"model": model, "model_kwargs": FAMILIES[family][0], "nb_classes": 10, **more}


def backbone(model, **more):
    options = {**FAMILIES[model.removeprefix("kw_")][1], **more}
    return DynamicBackbone(fields(model), **options)


def classifier(model, **more):
    torch.manual_seed(0)
    net = build_model(fields(model, **more))
    for name, buffer in net.named_buffers():  # statistics that a loader could forget
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return net.eval()


def saved(content, path):
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(("prefix", "family"), CASES)
def test_maps_are_those_of_the_classifier(prefix, family, tmp_path):
    net = classifier(prefix + family)
    path = saved({"model": net.state_dict()}, tmp_path / "net.pth")
    body = backbone(prefix + family, checkpoint=path, out_norm=False)
    body.init_weights()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        maps = body.eval()(x)
        expected = list(net.forward_intermediates(x, indices=list(body.levels))[1])
        if body.final_features:
            expected[-1] = net.forward_features(x)
    assert len(maps) == len(expected)
    for found, wanted, channels, stride in zip(maps, expected, body.out_channels, body.out_strides, strict=True):
        torch.testing.assert_close(found, wanted)
        assert found.shape == (2, channels, 224 // stride, 224 // stride)


@pytest.mark.parametrize(("prefix", "family"), CASES)
def test_every_parameter_receives_a_gradient_at_any_size(prefix, family):
    body = backbone(prefix + family, with_cp=True).train()
    sum(m.sum() for m in body(torch.randn(2, 3, 64, 96))).backward()
    assert [n for n, p in body.named_parameters() if p.grad is None] == []


def test_levels_above_the_chosen_ones_are_removed_with_their_cells():
    whole, part = backbone("kw_resnet18"), backbone("kw_resnet18", out_indices=(1, 2))
    sum(m.sum() for m in part(torch.randn(2, 3, 64, 64))).backward()
    assert [n for n, p in part.named_parameters() if p.grad is None] == []
    assert set(sharing(part.net)) < set(sharing(whole.net))


@pytest.mark.parametrize(
    ("config", "options", "channels"),
    [
        ("resnet50/resnet50", {}, (256, 512, 1024, 2048)),
        ("mobilenetv2_100/mobilenetv2_100", {"final_features": True}, (24, 32, 96, 1280)),
        ("convnext/convnext_tiny", {}, (96, 192, 384, 768)),
    ],
)
def test_static_backbones_have_the_maps_of_mmdetections_own(config, options, channels):
    body = MODELS.build({"type": "DynamicBackbone", "config": config, **options}).eval()
    assert body.out_channels == channels
    assert body.out_strides == (4, 8, 16, 32)
    with torch.no_grad():
        assert [m.shape[1:] for m in body(torch.zeros(1, 3, 64, 64))] == [
            (c, 64 // s, 64 // s) for c, s in zip(channels, body.out_strides, strict=True)
        ]


def test_any_converted_backbone_of_timm_serves():
    body = DynamicBackbone({"model": "kw_regnetx_002", "input_size": 64}).eval()
    with torch.no_grad():
        assert [m.shape[-1] for m in body(torch.zeros(1, 3, 64, 64))] == [16, 8, 4, 2]


def test_the_temperature_is_zero_and_stochastic_depth_is_the_detectors_own():
    body = DynamicBackbone(fields("kw_resnet18", drop_path=0.5))
    assert temperatures(body.net) == {"kernel_warehouse": 0}
    assert not any(type(m).__name__ == "DropPath" for m in body.modules())
    assert any(type(m).__name__ == "DropPath" for m in backbone("kw_resnet18", drop_path=0.5).modules())


@pytest.mark.parametrize(("prefix", "family"), CASES)
def test_weights_of_every_kind_of_checkpoint(prefix, family, tmp_path):
    model = prefix + family
    net = classifier(model, nb_classes=7)
    reference = backbone(model, checkpoint=saved({"model": net.state_dict()}, tmp_path / "reference.pth"))
    reference.init_weights()
    norms = {k: torch.nn.init.uniform_(v) for k, v in reference.state_dict().items() if k.startswith("norm")}
    expected, upstream = reference.state_dict(), to_upstream(net)
    detectors = [{f"backbone.{k}": v for k, v in s.items()} for s in ({**upstream, **norms}, expected)]
    contents = [
        ({"model": {}, "model_ema": net.state_dict()}, {"model_key": "model_ema"}),
        ({"model": upstream, "epoch": 3}, {}),
        *(({"meta": {}, "state_dict": {**detector, "neck.weight": torch.ones(1)}}, {}) for detector in detectors),
    ]
    for i, (content, key) in enumerate(contents):
        loaded = backbone(model, checkpoint=saved(content, tmp_path / f"{i}.pth"), **key)
        loaded.init_weights()
        for name, value in loaded.state_dict().items():
            if i >= 2 or name not in norms:
                assert torch.equal(value, expected[name]), name


def test_a_detector_takes_upstreams_names_when_it_is_loaded_as_a_whole():
    net, body = classifier("kw_resnet18"), backbone("kw_resnet18")
    detector = torch.nn.ModuleDict({"backbone": body})
    detector.load_state_dict({f"backbone.{k}": v for k, v in to_upstream(net).items()})
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in body.net.state_dict().items())
    assert detector.load_state_dict(detector.state_dict()).missing_keys == []


def test_what_the_classifier_alone_needs_is_left_out_and_said(tmp_path, capfd):
    from mmengine.logging import MMLogger

    MMLogger.get_instance("left_out")
    path = saved({"model": classifier("resnet18").state_dict()}, tmp_path / "net.pth")
    backbone("resnet18", checkpoint=path).init_weights()
    out, err = capfd.readouterr()
    assert (out + err).count("net.pth: left out fc.weight, fc.bias") == 1


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("kw_resnet18", {"cell_num_ratio": 2}, r"net\.pth: .*do not fit.*shape: layer1\.0\.conv2"),
        ("resnet18", {}, r"net\.pth: .*do not fit.*missing: "),
        ("kw_deit_tiny", {}, r"net\.pth: .*do not fit.*missing: conv1\.weight"),
    ],
)
def test_a_checkpoint_of_another_plan_is_refused(model, more, message, tmp_path):
    path = saved({"model": classifier(model, **more).state_dict()}, tmp_path / "net.pth")
    body = backbone("kw_resnet18", checkpoint=path)
    before = {k: v.clone() for k, v in body.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        body.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())


def test_nothing_is_never_loaded_silently():
    """As mmengine does, which asks for no strictness."""
    detector = torch.nn.ModuleDict({"backbone": backbone("resnet18")})
    with pytest.raises(CheckpointError, match=r"missing: conv1\.weight"):
        detector.load_state_dict({f"model.{k}": v for k, v in detector.state_dict().items()}, strict=False)


def train_a_step(body):
    torch.manual_seed(0)
    body.train()
    optimizer = torch.optim.SGD([p for p in body.parameters() if p.requires_grad], lr=0.1)
    sum(m.square().mean() for m in body(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()


def test_frozen_stages_freeze_the_warehouses_that_only_they_use():
    body = backbone("kw_resnet18", frozen_stages=2, norm_eval=False)
    users = sharing(body.net)
    above = ("layer3.", "layer4.")
    alone = {cells for cells, layers in users.items() if not any(layer.startswith(above) for layer in layers)}
    shared = {
        cells for cells, layers in users.items() if cells not in alone and any(not n.startswith(above) for n in layers)
    }
    assert alone
    assert shared
    before = {k: v.clone() for k, v in body.net.state_dict().items()}
    train_a_step(body)
    after = body.net.state_dict()
    moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert not moved & alone
    assert shared <= moved
    assert not [k for k in moved - shared if k.startswith(("conv1", "bn1", "layer1", "layer2"))]
    assert [k for k in moved if k.startswith("layer3") and k.endswith("running_mean")]
    assert not body.net.layer2.training
    assert body.net.layer3.training


def test_levels_number_the_frozen_stages_as_in_upstream():
    """Its MobileNetV2 freezes, by 1, all that makes the map with 24 channels."""
    body = backbone("mobilenetv2_050", frozen_stages=1)
    frozen = {n.split(".bn")[0].split(".conv")[0] for n, p in body.net.named_parameters() if not p.requires_grad}
    assert frozen == {"conv_stem.weight", "bn1.weight", "bn1.bias", "blocks.0.0", "blocks.1.0", "blocks.1.1"}


@pytest.mark.parametrize("norm_eval", [True, False])
def test_norm_eval_keeps_the_statistics_of_attentions_too(norm_eval):
    body = backbone("kw_resnet18", norm_eval=norm_eval)
    norms = [m for m in body.train().modules() if isinstance(m, _BatchNorm)]
    assert any(isinstance(m, torch.nn.BatchNorm1d) for m in norms)
    assert {m.training for m in norms} == {not norm_eval}
    assert all(m.weight.requires_grad for m in norms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (0, 1, 7)}, r"'out_indices': ResNet has levels 0 to 4 .*found \(0, 1, 7\)"),
        ({"out_indices": (2, 1)}, "'out_indices': .*ascending order"),
        ({"final_features": True}, "'final_features': .*EfficientNet.*of ResNet"),
        ({"frozen_stages": 5}, "'frozen_stages': ResNet has levels 0 to 4, found 5"),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "x"}}, "'init_cfg': .*'checkpoint'"),
        ({"overrides": {"cell_num_ration": 2}}, "'cell_num_ration'.*'cell_num_ratio'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        DynamicBackbone(fields("kw_resnet18"), **options)


def test_the_pyramid_makes_the_strides_of_an_fpn_from_one_map():
    body, neck = backbone("kw_deit_tiny"), SimpleFeaturePyramid([24], out_channels=16, num_outs=5)
    maps = neck(body(torch.randn(1, 3, 64, 96)))
    assert [tuple(m.shape) for m in maps] == [(1, 16, 64 // s, 96 // s) for s in (4, 8, 16, 32)] + [(1, 16, 1, 2)]
    sum(m.sum() for m in maps).backward()
    assert [n for n, p in neck.named_parameters() if p.grad is None] == []
    with pytest.raises(ValueError, match="out_indices=\\(-1,\\)"):
        SimpleFeaturePyramid([24, 24])
