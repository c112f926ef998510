import copy
import json

import pytest
import timm
import torch
from networks import narrow_resnet

from kernelwarehouse import ConversionPlan, KWConfig, plan_conversion


class TestPlan:
    def test_changes_nothing(self):
        net = timm.create_model("efficientnet_b0").train()
        state = copy.deepcopy(net.state_dict())
        modules = [(name, id(m), m.training, len(m._forward_pre_hooks)) for name, m in net.named_modules()]
        plan_conversion(net, KWConfig())
        assert modules == [(name, id(m), m.training, len(m._forward_pre_hooks)) for name, m in net.named_modules()]
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "efficientnet_b0"])
    def test_survives_json(self, name):
        plan = plan_conversion(timm.create_model(name), KWConfig(cell_num_ratio=2, nonlocal_basis_ratio=0.5))
        assert ConversionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan

    @pytest.mark.parametrize("change", [{"layers": 3}, {"colour": 1}, {"warehouses": []}])
    def test_refuses_what_is_no_plan(self, change):
        data = {**plan_conversion(narrow_resnet(), KWConfig()).to_dict(), **change}
        with pytest.raises(ValueError, match="not a conversion plan"):
            ConversionPlan.from_dict(data)

    def test_prints_a_table(self):
        text = str(plan_conversion(timm.create_model("resnet18"), KWConfig(cell_num_ratio=4)))
        assert "layer2.0.downsample.0  128×64×1×1   stage0_layer_conv  64×64×1×1    216-223    2" in text
        assert "stage3_layer_conv  108    512×512×1×1  3       28,311,552  61.7%" in text
        assert "parameters 11,689,512 → 45,862,085; mixing 1,539.6 M MACs an image" in text

    def test_mixing_macs_are_the_published_ones(self):
        for name, ratio, gmacs in (("resnet18", 1, 0.385), ("resnet50", 4, 8.14), ("mobilenetv2_100", 1, 0.157)):
            plan = plan_conversion(timm.create_model(name), KWConfig(cell_num_ratio=ratio))
            assert plan.mixing_macs / 1e9 == pytest.approx(gmacs, rel=5e-3)

    def test_layers_take_cells_in_the_order_of_modules(self):
        net = timm.create_model("resnet18")
        plan = plan_conversion(net, KWConfig())
        names = [name for name, _ in net.named_modules()]
        assert [names.index(layer.name) for layer in plan.layers] == sorted(names.index(la.name) for la in plan.layers)
        ends = dict.fromkeys((w.name for w in plan.warehouses), 0)
        for layer in plan.layers:
            assert layer.start == ends[layer.warehouse]
            ends[layer.warehouse] += layer.own_cells

    def test_include_exclude_and_named_warehouses(self):
        net = narrow_resnet()
        only = plan_conversion(net, KWConfig(include=(r"layer[34]\..*",), exclude=(r".*downsample.*",)))
        assert {layer.name[:6] for layer in only.layers} == {"layer3", "layer4"}
        assert not any("downsample" in layer.name for layer in only.layers)
        with_head = plan_conversion(net, KWConfig(include=(r"layer.*", "fc")))
        assert with_head.warehouse("head").shape == (1, 5, 16, 1)
        named = plan_conversion(net, KWConfig(warehouses={r"layer1\..*conv2": "early", r"layer[234]\..*conv2": "late"}))
        assert [w.name for w in named.warehouses] == ["early", "late"]
        assert len(named.layers) == 8

    def test_a_list_of_ratios_follows_the_order_of_warehouses(self):
        plan = plan_conversion(timm.create_model("resnet18"), KWConfig(cell_num_ratio=(1, 2, 0.5, 4)))
        assert [w.cells for w in plan.warehouses] == [56, 94, 23, 108]

    @pytest.mark.parametrize("sharing", ["layer_conv", ("layer", "conv"), ["layer", "conv"]])
    def test_sharing_range_as_upstream_writes_it(self, sharing):
        assert KWConfig(sharing_range=sharing) == KWConfig(sharing_range=("layer", "conv"))
        plan = plan_conversion(timm.create_model("resnet18"), KWConfig(sharing_range=sharing))
        assert [w.cells for w in plan.warehouses] == [56, 47, 47, 27]

    def test_no_sharing_gives_every_layer_its_own(self):
        plan = plan_conversion(timm.create_model("resnet18"), KWConfig(sharing_range=()))
        assert len(plan.warehouses) == len(plan.layers) == 19
        # A downsample is constructed, and so numbered, before its block.
        assert plan.warehouses[4].name == "stage0_layer2_conv0"
