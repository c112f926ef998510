"""What timm promises of a registered name: for one of each family and operator, and with --all for every name."""

import copy

import pytest
import timm
import torch
from registered import CASES, FAMILY
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models import FeatureInfo

import kernelwarehouse  # noqa: F401
from kernelwarehouse.models import dynamic_layers, sharing
from kernelwarehouse.models.build import registered_models

every_case = pytest.mark.parametrize("case", CASES)


def make(case, **kwargs):
    torch.manual_seed(0)
    name, small, size = case
    return timm.create_model(name, **{**small, **kwargs}).eval(), torch.randn(2, 3, size, size)


def static(case, **kwargs):
    name, small, _ = case
    return timm.create_model(FAMILY[name], **{**small, **kwargs})


class TestNetwork:
    @every_case
    def test_forward_backward_and_the_configuration(self, case):
        net, x = make(case)
        state, cfg = net.state_dict(), net.default_cfg
        assert cfg["architecture"] == case[0]
        assert cfg is net.pretrained_cfg
        for key in ("first_conv", "classifier"):
            names = cfg[key] if isinstance(cfg[key], tuple) else (cfg[key],)
            assert all(f"{name}.weight" in state for name in names)
            assert cfg[key] or static(case).default_cfg[key] in dynamic_layers(net)
            assert timm.get_pretrained_cfg_value(case[0], key) == cfg[key]
        assert net(x).shape == (2, 1000)
        net.train()
        y = net(x)
        assert y.isfinite().all()
        y.mean().backward()
        assert not [name for name, p in net.named_parameters() if p.grad is None]

    @every_case
    def test_features_pooling_and_classifier(self, case):
        net, x = make(case, num_classes=7)
        reference = static(case, num_classes=7).eval()
        features = net.forward_features(x)
        assert features.shape == reference.forward_features(x).shape
        torch.testing.assert_close(net.forward_head(features), net(x))
        assert net.forward_head(features, pre_logits=True).shape == (2, net.head_hidden_size)
        classifier = net.get_classifier()
        assert classifier is net.get_submodule(static(case).default_cfg["classifier"])
        net.reset_classifier(4)
        assert net(x).shape == (2, 4)
        net.reset_classifier(0)
        assert net(x).shape == (2, net.head_hidden_size)
        net.reset_classifier(0, "")
        reference.reset_classifier(0, "")
        assert net(x).shape == reference(x).shape
        assert make(case, num_classes=0)[0](x).shape == (2, net.head_hidden_size)
        assert make(case, global_pool="avg")[0](x).shape == (2, 1000)

    @every_case
    def test_channels_sizes_and_checkpointing(self, case):
        net, x = make(case, in_chans=1)
        assert net(x[:, :1]).shape == (2, 1000)
        net, x = make(case)
        if hasattr(net, "set_input_size"):
            net.set_input_size(img_size=48)
            x = x[:, :, :48, :48] if x.shape[-1] >= 48 else torch.randn(2, 3, 48, 48)
            assert net(x).shape == (2, 1000)
        before = torch.autograd.grad(net(x).square().mean(), list(net.parameters()), allow_unused=True)
        net.set_grad_checkpointing(True)
        after = torch.autograd.grad(net(x).square().mean(), list(net.parameters()), allow_unused=True)
        torch.testing.assert_close(after, before)
        matcher = net.group_matcher(coarse=True)
        assert matcher

    @every_case
    def test_copies_and_files_keep_what_is_shared(self, case, tmp_path):
        net, x = make(case)
        twin = copy.deepcopy(net)
        torch.save(net, tmp_path / "net.pth")
        read = torch.load(tmp_path / "net.pth", weights_only=False)
        for other in (twin, read):
            assert sharing(other) == sharing(net)
            torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)

    @every_case
    def test_jit_script_is_refused_by_name(self, case):
        with pytest.raises(RuntimeError, match=r"cannot be compiled by torch\.jit\.script; torch\.jit\.trace"):
            torch.jit.script(make(case)[0])


class TestFeatures:
    @every_case
    def test_levels_are_the_static_networks(self, case):
        for kwargs in ({}, {"out_indices": (1, 2)}, {"out_indices": (-1,)}):
            net, x = make(case, features_only=True, **kwargs)
            reference = static(case, features_only=True, **kwargs).eval()
            assert type(net) is type(reference)
            assert net.feature_info.channels() == reference.feature_info.channels()
            assert net.feature_info.reduction() == reference.feature_info.reduction()
            assert net.feature_info.module_name() == reference.feature_info.module_name()
            maps = net(x)
            assert [y.shape for y in maps] == [y.shape for y in reference(x)]
            assert dynamic_layers(net) or kwargs  # the first levels may have none
            assert net.default_cfg is net.pretrained_cfg
            assert net.default_cfg["architecture"] == case[0]
            assert net.default_cfg.keys() == reference.default_cfg.keys() | {"url", "hf_hub_id", "tag"}
        assert all(user in dynamic_layers(net) for users in sharing(net).values() for user in users)

    @pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
    @every_case
    def test_classes(self, case, feature_cls):
        try:
            reference = static(case, features_only=True, feature_cls=feature_cls).eval()
        except Exception as e:
            with pytest.raises(type(e)):
                make(case, features_only=True, feature_cls=feature_cls)
            return
        net, x = make(case, features_only=True, feature_cls=feature_cls)
        maps, expected = net(x), reference(x)
        assert type(maps) is type(expected)
        if isinstance(maps, dict):
            assert maps.keys() == expected.keys()
            maps, expected = maps.values(), expected.values()
        assert [y.shape for y in maps] == [y.shape for y in expected]
        assert dynamic_layers(net)

    @every_case
    def test_they_compute_what_the_network_does(self, case):
        weights = make(case)[0].state_dict()
        loading = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
        net, x = make(case, **loading)
        extractor, _ = make(case, **loading, features_only=True)
        getter, _ = make(case, **loading, features_only=True, feature_cls="getter")
        last = extractor(x)[-1]
        torch.testing.assert_close(last, getter(x)[-1])
        torch.testing.assert_close(last, net.forward_intermediates(x, intermediates_only=True)[-1])

    @every_case
    def test_intermediates(self, case):
        net, x = make(case)
        output, maps = net.forward_intermediates(x)
        torch.testing.assert_close(output, net.forward_features(x))
        info = FeatureInfo(copy.deepcopy(net.feature_info), len(net.feature_info))
        assert [y.shape[1] for y in maps] == info.channels()
        indices = (0, -1)
        assert len(net.forward_intermediates(x, indices=indices, intermediates_only=True)) == 2
        net.prune_intermediate_layers(1, prune_head=True)
        assert torch.isfinite(net(x)).all()


class TestTracing:
    @every_case
    def test_feature_extractor(self, case):
        net, x = make(case)
        nodes = get_graph_node_names(net)[1]
        layers = dynamic_layers(net)
        assert all(any(f"{name}.".startswith(f"{node}.") for node in nodes) for name in layers)  # alone, or in a block
        traced = create_feature_extractor(net, [nodes[-1]]).eval()
        torch.testing.assert_close(traced(x)[nodes[-1]], net(x))
        assert sharing(traced) == sharing(net)
        net.train()
        traced = create_feature_extractor(net, [get_graph_node_names(net)[0][-1]]).train()
        output = next(iter(traced(x).values()))
        output.mean().backward()
        assert not [name for name, p in traced.named_parameters() if p.grad is None]
        assert sum(p.numel() for p in traced.parameters()) == sum(p.numel() for p in net.parameters())

    def test_symbolic_trace_has_layers_for_leaves(self):
        net, x = make(CASES[0].values[0])
        traced = torch.fx.symbolic_trace(net)
        leaves = {node.target for node in traced.graph.nodes if node.op == "call_module"}
        assert set(dynamic_layers(net)) <= leaves
        torch.testing.assert_close(traced(x), net(x))
        assert sharing(traced) == sharing(net)
        twin = copy.deepcopy(traced)
        assert sharing(twin) == sharing(net)
        assert all(type(la).__module__.startswith("kernelwarehouse") for la in dynamic_layers(twin).values())


class TestRegistry:
    def test_names_are_listed(self):
        listed = set(timm.list_models())
        assert set(registered_models()) <= listed
        assert {n for n in registered_models() if n.startswith("kw_")} == set(timm.list_models("kw_*"))
        assert all(timm.is_model(name) and not timm.is_model_pretrained(name) for name in registered_models())
