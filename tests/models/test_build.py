import copy
import json
import pickle

import pytest
import timm
import timm.optim
import torch
from timm.layers import DropPath
from timm.utils import ModelEmaV3
from torch import nn

import kernelwarehouse
from kernelwarehouse import ConfigError, ModelConfig, build_model, load_checkpoint, plans, set_temperature
from kernelwarehouse.configs.schema import find_config
from kernelwarehouse.models import DynamicLayer, find_preset
from kernelwarehouse.models.build import registered_models
from kernelwarehouse.models.ops.kernel_warehouse import KWLayer, KWLinear, Warehouse

DEIT = {  # name: parameters of the static network, and of ours at 1× and 4×
    "deit_tiny": (5_717_416, 6_363_640, 22_546_360),
    "deit_small": (22_050_664, 24_319_960, 88_485_784),
}


class TestBuildModel:
    def test_sources_of_a_configuration(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # shipped files are found from anywhere
        by_name = build_model("resnet18/kw4x_resnet18", nb_classes=3)
        by_path = build_model("configs/resnet18/kw4x_resnet18.json", nb_classes=3)
        by_fields = build_model({"model": "kw_resnet18", "cell_num_ratio": 4, "lr": 0.1}, nb_classes=3)
        by_config = build_model(ModelConfig("kw_resnet18", nb_classes=3, operator_fields={"cell_num_ratio": 4.0}))
        (tmp_path / "own.yaml").write_text("model: kw_resnet18\ncell_num_ratio: 4\nlr: 4e-3\n")
        by_yaml = build_model(tmp_path / "own.yaml", nb_classes=3)
        shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (by_name, by_path, by_fields, by_config)]
        assert shapes[0] == shapes[1] == shapes[2] == shapes[3] == {k: v.shape for k, v in by_yaml.state_dict().items()}

    def test_a_static_model_is_timms(self):
        for source in ("configs/mobilenetv2_050/mobilenetv2_050.json", ModelConfig("mobilenetv2_050")):
            assert list(build_model(source).state_dict()) == list(timm.create_model("mobilenetv2_050").state_dict())

    def test_any_backbone_of_timm(self):
        net = build_model({"model": "kw_regnetx_002", "nb_classes": 4})
        assert any(isinstance(m, KWLayer) for m in net.modules())
        assert net.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 4)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"model": "kw_resnet81"}, "no network 'resnet81'; did you mean .*kw_resnet18"),
            ({"model": "resnet18", "cell_num_ratio": 4}, "static network.*'cell_num_ratio'.*kernel_warehouse"),
            ({"model": "kw_resnet18", "cell_num_ration": 4}, "unknown field 'cell_num_ration'.*'cell_num_ratio'"),
            ({"model": "resnet18", "model_kwargs": {"chanels": 3}}, "resnet18 refuses its arguments.*chanels"),
            ({"model": "resnet18", "layer_scale_init_value": 0.1}, "ls_init_value"),
            ({"model": "vgg11", "drop_path": 0.1, "drop_path_rule": "constant"}, "drop_path"),
            ({"model": "kw_resnet18", "operator": "kernel_warehous"}, "converted by 'kernel_warehouse'"),
        ],
    )
    def test_errors(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            build_model(fields)

    def test_drop_path_is_constant_for_resnets_and_rises_elsewhere(self):
        def rates(fields):
            return [m.drop_prob for m in build_model(fields).modules() if isinstance(m, DropPath)]

        assert rates({"model": "kw_resnet18", "drop_path": 0.1}) == [0.1] * 8
        rising = rates({"model": "kw_convnext_tiny", "drop_path": 0.3})
        assert rising == sorted(rising)
        assert rising[-1] == pytest.approx(0.3)
        linear = rates({"model": "resnet18", "drop_path": 0.1, "drop_path_rule": "linear"})
        assert len(set(linear)) == len(linear)

    def test_dropout_classes_and_channels(self):
        net = build_model({"model": "kw_mobilenetv2_050", "dropout": 0.2, "nb_classes": 11, "in_chans": 1})
        assert net.drop_rate == 0.2
        assert net.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 11)

    @pytest.mark.parametrize("model", ["convnext_atto", "kw_convnext_atto", "inception_next_atto"])
    def test_images_that_are_too_small_are_refused_before_anything_runs(self, model):
        fields = {"model": model, "nb_classes": 2, "in_chans": 1}
        with torch.device("meta"):
            with pytest.raises(ConfigError, match=f"'input_size': {model} does not run on images of 16×16: .* greater"):
                build_model({**fields, "input_size": 16})
            net = build_model({**fields, "input_size": 32})
            assert net(torch.empty(2, 1, 32, 32)).shape == (2, 2)

    @pytest.mark.parametrize("training", [False, True])
    def test_the_layers_say_so_too(self, training):
        net = build_model({"model": "kw_convnext_atto", "nb_classes": 2}).train(training)
        with pytest.raises(ValueError, match=r"^an input of \(1, 1\) is too small for a kernel of \(2, 2\)$"):
            net(torch.randn(2, 3, 16, 16))

    def test_networks_of_a_fixed_size_take_the_input_size(self):
        mixer = build_model({"model": "kw_mixer_s32_224", "input_size": 64, "nb_classes": 2})
        assert mixer.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 2)
        net = build_model("configs/deit_tiny/kw1x_deit_tiny.json", input_size=64, nb_classes=2)
        assert net.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 2)

    @pytest.mark.parametrize("size", DEIT)
    def test_deit_parameters(self, size):
        counts = tuple(
            sum(p.numel() for p in build_model(f"configs/{size}/{name}.json").parameters())
            for name in (size, f"kw1x_{size}", f"kw4x_{size}")
        )
        assert counts == DEIT[size]

    def test_every_shipped_configuration_builds(self):
        root = find_config("resnet18/resnet18").parent.parent
        files = sorted(root.glob("*/*.json"))
        assert len(files) == 53
        for file in files:
            with torch.device("meta"):
                net = build_model(file, nb_classes=2)
            assert net.num_classes == 2
            assert sum(plan.parameters_after for plan in plans(net)) in (0, sum(p.numel() for p in net.parameters()))
            assert isinstance(json.loads(file.read_text()), dict)


class TestTimm:
    @pytest.mark.parametrize("name", registered_models())
    def test_a_registered_model_is_like_timms_own(self, name):
        """Shapes are compared on meta, but for the first operator's networks, which run."""
        with torch.device("cpu" if name.startswith("kw") else "meta"):
            self.check_registered_model(name)

    def check_registered_model(self, name):
        assert name in timm.list_models(f"{name[:2]}*")
        net = timm.create_model(name, num_classes=10).eval()
        static = timm.create_model(find_preset(name).backbone, num_classes=10).eval()
        size = 224 if net.default_cfg["fixed_input_size"] else 32
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            features = net.forward_features(x)
            assert net(x).shape == net.forward_head(features).shape == (2, 10)
            assert features.shape == static.forward_features(x).shape
            ours, theirs = net.forward_intermediates(x), static.forward_intermediates(x)
        assert [f.shape for f in ours[1]] == [f.shape for f in theirs[1]]
        assert net.num_features == static.num_features
        assert net.num_classes == 10
        assert net.default_cfg["architecture"] == name
        assert net.default_cfg["mean"] == static.default_cfg["mean"]
        assert not net.default_cfg["url"]
        assert not net.default_cfg["hf_hub_id"]
        assert net.feature_info == static.feature_info
        classifier = plans(net)[0].layers[-1].name in ("fc", "classifier")
        assert isinstance(net.get_classifier(), DynamicLayer if classifier else nn.Linear)
        assert isinstance(net.get_classifier(), KWLinear) == name.startswith("kw1d2x")
        net.reset_classifier(4)
        assert net(x).shape == (2, 4)
        net.reset_classifier(0)
        assert net(x).shape == (2, net.head_hidden_size)
        if name in ("kw_resnet18", "kw1d2x_mobilenetv2_050"):
            net.reset_classifier(4)
            net.train()(x).square().mean().backward()
            assert all(p.grad is not None for p in net.parameters())

    def test_fields_of_the_operator(self):
        four = timm.create_model("kw_resnet18", cell_num_ratio=4)
        assert sum(p.numel() for p in four.parameters()) == 45_862_085

    def test_features_only_keeps_the_cells(self):
        net = timm.create_model("kw_resnet18", features_only=True, out_indices=(1, 2, 3)).eval()
        assert sum(isinstance(m, Warehouse) for m in net.modules()) == 3
        assert [f.shape[1:] for f in net(torch.randn(1, 3, 64, 64))] == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]

    def test_checkpoint_path_and_save_load(self, tmp_path):
        net = timm.create_model("kw_mobilenetv2_050", num_classes=3).eval()
        torch.save({"state_dict": net.state_dict()}, tmp_path / "timm.pth")
        again = timm.create_model("kw_mobilenetv2_050", num_classes=3, checkpoint_path=tmp_path / "timm.pth").eval()
        ours = build_model({"model": "kw_mobilenetv2_050", "nb_classes": 3}).eval()
        load_checkpoint(ours, tmp_path / "timm.pth")
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(again(x), net(x))
        torch.testing.assert_close(ours(x), net(x))

    def test_data_config_and_group_matcher(self):
        net = timm.create_model("kw_resnet18")
        assert timm.data.resolve_model_data_config(net)["input_size"] == (3, 224, 224)
        optimizer = timm.optim.create_optimizer_v2(net, opt="adamw", lr=1e-3, weight_decay=0.05)
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(net.parameters()))

    def test_ema_copy_sees_its_own_temperature(self):
        net = timm.create_model("kw_resnet18", channels=(8, 8, 16, 16), num_classes=3)
        ema = ModelEmaV3(net, decay=0.5)
        set_temperature(net, 0.7)
        assert ema.module.layer2[0].conv1.temperature.value == 0
        set_temperature(ema, 0.7)
        assert ema.module.layer1[0].conv2.temperature.value == pytest.approx(0.7)
        with torch.no_grad():
            net.layer2[1].conv2.warehouse.weight.add_(1.0)
        before = ema.module.layer2[1].conv2.warehouse.weight.clone()
        ema.update(net)
        assert not torch.equal(ema.module.layer2[1].conv2.warehouse.weight, before)


@pytest.mark.parametrize("name", ["kw_resnet18", "kw1d2x_mobilenetv2_050", "kw_deit_tiny"])
def test_whole_networks_copy_and_pickle(name):
    net = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 224, 224)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(twin(x), net(x))


def test_root_package_has_the_public_names():
    for name in kernelwarehouse.__all__:
        assert getattr(kernelwarehouse, name) is not None
