"""Parameter groups: who decays, and how fast each layer learns."""

import pytest
import torch
from torch import nn

from kernelwarehouse.configs.schema import ConfigError, RunConfig
from kernelwarehouse.engine.optim import build_optimizer, parameter_groups, parameter_layers
from kernelwarehouse.engine.schedule import set_lr
from kernelwarehouse.models import build_model, sharing

FAMILIES = {
    "resnet18": {"channels": [8, 8, 8, 8]},
    "mobilenetv2_050": {},
    "convnext_tiny": {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]},
    "deit_tiny": {"depth": 3, "embed_dim": 24},
}


def by_name(model, groups, key):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: group[key] for group in groups for p in group["params"]}


@pytest.mark.parametrize("prefix", ["", "kw_"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_matrices_and_kernels_decay_and_each_parameter_is_in_one_group(family, prefix):
    model = build_model({"model": prefix + family, "model_kwargs": FAMILIES[family], "nb_classes": 10})
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=1.0)
    decay = by_name(model, groups, "weight_decay")
    parameters = dict(model.named_parameters())
    assert decay.keys() == parameters.keys()
    assert sum(len(g["params"]) for g in groups) == len(parameters)
    tokens = {"cls_token", "pos_embed", "dist_token"}
    expected = {n for n, p in parameters.items() if p.ndim > 1 and n not in tokens}
    assert {n for n, d in decay.items() if d == 0.05} == expected
    assert set(by_name(model, groups, "lr_scale").values()) == {1.0}


@pytest.mark.parametrize("prefix", ["", "kw_"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_decay_slows_each_layer_below_the_classifier(family, prefix):
    model = build_model({"model": prefix + family, "model_kwargs": FAMILIES[family], "nb_classes": 10})
    scales = by_name(model, parameter_groups(model, 0.05, layer_decay=0.5), "lr_scale")
    layers = parameter_layers(model)
    depth = max(layers.values())
    assert depth >= 3
    assert scales == {name: 0.5 ** (depth - layer) for name, layer in layers.items()}
    head = [n for n in scales if n.startswith(("fc.", "classifier.", "head."))]
    assert head
    assert {scales[n] for n in head} == {1.0}
    stem = next(n for n in scales if n.startswith(("conv1.", "conv_stem.", "stem.0.", "patch_embed.")))
    assert scales[stem] == min(scales.values()) < 0.5


def test_shared_cells_learn_at_the_rate_of_the_last_layer_that_uses_them():
    model = build_model({"model": "kw_resnet18", "model_kwargs": FAMILIES["resnet18"], "sharing_range": "layer_conv"})
    layers = parameter_layers(model)
    users = sharing(model)
    assert any(len(modules) > 1 for modules in users.values())
    for cells, modules in users.items():
        of_users = [{v for k, v in layers.items() if k.startswith(f"{m}.")} for m in modules]
        assert layers[cells] == max(map(max, of_users))


def test_a_decayed_rate_reaches_the_update():
    model = build_model({"model": "resnet18", "model_kwargs": FAMILIES["resnet18"], "nb_classes": 10})
    optimizer = build_optimizer(model, RunConfig(opt="momentum", layer_decay=0.5, weight_decay=0, momentum=0))
    set_lr(optimizer, 1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    layers = parameter_layers(model)
    depth = max(layers.values())
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p, torch.full_like(p, 0.5 ** (depth - layers[name])))


def test_layer_decay_needs_a_network_that_names_its_layers():
    with pytest.raises(ConfigError, match=r"layer_decay.*group_matcher"):
        build_optimizer(nn.Linear(2, 2), RunConfig(layer_decay=0.9))


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    (group,) = parameter_groups(model, 0.05, 1.0)
    assert group["params"] == [model.bias]


@pytest.mark.parametrize("opt", ["adamw", "sgd", "momentum", "lamb", "lion", "rmsprop", "lookahead_sgd"])
def test_optimizers_of_timm_take_the_default_fields(opt):
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    optimizer = build_optimizer(model, RunConfig(opt=opt))
    set_lr(optimizer, 0.1)
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.weight)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ConfigError, match=r"'opt'.*adamx"):
        build_optimizer(nn.Linear(2, 2), RunConfig(opt="adamx"))
