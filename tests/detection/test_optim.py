"""How fast each part of a detector learns, and what decays."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.detection import DynamicBackbone
from kernelwarehouse.models import sharing

CONVNEXT = {"model": "kw_convnext_tiny", "model_kwargs": {"depths": [1, 1, 3, 1], "dims": [8, 16, 24, 32]}}


def detector(config, **options):
    return nn.ModuleDict({"backbone": DynamicBackbone(config, **options), "neck": nn.Conv2d(8, 8, 1)})


def optimizer(model, **fields):
    config = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05},
        "constructor": "LayerDecayConstructor",
        "paramwise_cfg": fields,
    }
    return build_optim_wrapper(model, config).optimizer


def by_name(model, groups, key):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: group[key] for group in groups for p in group["params"]}


def test_each_block_learns_slower_than_the_one_above_and_the_heads_at_the_full_rate():
    model = detector(CONVNEXT, out_norm=True)
    rates = by_name(model, optimizer(model, layer_decay=0.5).param_groups, "lr")
    assert rates.keys() == dict(model.named_parameters()).keys()
    blocks = [
        "stages.0.blocks.0",
        "stages.1.blocks.0",
        *(f"stages.2.blocks.{i}" for i in range(3)),
        "stages.3.blocks.0",
    ]
    shared = sharing(model)
    for below, block in zip(range(6, 0, -1), blocks, strict=True):
        own = {name: rate for name, rate in rates.items() if name not in shared}
        of_block = {rate for name, rate in own.items() if name.startswith(f"backbone.net.{block}.")}
        assert of_block == {0.5**below}
    assert {rates["neck.weight"], rates["backbone.norm3.weight"]} == {1.0}
    assert {rate for name, rate in rates.items() if name.startswith("backbone.net.stem")} == {0.5**7}
    for cells, layers in shared.items():
        assert rates[cells] == max(rate for n, rate in rates.items() if n.startswith(tuple(f"{m}." for m in layers)))


def test_six_groups_of_convnext_tiny_are_upstreams():
    """Three blocks make one, a downsampling goes with the block after it."""
    model = detector({"model": "convnext_tiny", "model_kwargs": {"dims": [8, 8, 8, 8]}})
    rates = by_name(model, optimizer(model, layer_decay=0.5, num_layers=6).param_groups, "lr")
    expected = {"stem.": 7, "stages.0.": 6, "stages.1.": 5, "stages.3.": 1}
    expected |= {f"stages.2.blocks.{i}.": 4 - i // 3 for i in range(9)} | {"stages.2.downsample.": 4}
    for prefix, below in expected.items():
        assert {rate for name, rate in rates.items() if name.startswith(f"backbone.net.{prefix}")} == {0.5**below}
    assert rates["neck.weight"] == 1.0


@pytest.mark.parametrize("config", [CONVNEXT, {"model": "deit_tiny", "model_kwargs": {"depth": 2, "embed_dim": 24}}])
def test_only_matrices_and_kernels_decay(config):
    model = detector(config, out_indices=(-1,))
    decays = by_name(model, optimizer(model, layer_decay=0.9).param_groups, "weight_decay")
    tokens = ("cls_token", "pos_embed")
    for name, parameter in model.named_parameters():
        assert decays[name] == (0.05 if parameter.ndim > 1 and not name.endswith(tokens) else 0.0), name


def test_frozen_parameters_are_left_out():
    model = detector({"model": "resnet18", "model_kwargs": {"channels": [8, 8, 8, 8]}}, frozen_stages=2)
    learning = by_name(model, optimizer(model, layer_decay=0.9).param_groups, "lr")
    assert learning.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs a 'layer_decay'"),
        ({"layer_decay": 1.5}, r"paramwise_cfg\.layer_decay.*1\.5"),
        ({"layer_decay": 0.9, "num_layer": 6}, "'num_layer'.*'num_layers'"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ConfigError, match=message):
        optimizer(nn.ModuleDict({"neck": nn.Linear(2, 2)}), **fields)


def test_layers_need_a_backbone_to_be_counted_in():
    with pytest.raises(ConfigError, match="ModuleDict holds no DynamicBackbone"):
        optimizer(nn.ModuleDict({"neck": nn.Linear(2, 2)}), layer_decay=0.9)


def test_a_decayed_rate_reaches_the_update():
    model = detector(CONVNEXT)
    wrapper = build_optim_wrapper(
        model,
        {
            "type": "OptimWrapper",
            "optimizer": {"type": "SGD", "lr": 1.0},
            "constructor": "LayerDecayConstructor",
            "paramwise_cfg": {"layer_decay": 0.5},
        },
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    wrapper.step()
    rates = by_name(model, wrapper.optimizer.param_groups, "lr")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, rates[name]))
