"""Weights of either network, from every source of timm's factory."""

import logging

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

from kernelwarehouse import create_model, set_temperature
from kernelwarehouse.models import temperatures, to_upstream
from kernelwarehouse.models.build import registered_models

RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}


def stirred(net):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
    return net.eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["converted", "static", "authors'"])
def file(request, tmp_path_factory, x):
    """A file of weights, and what the network that it belongs to computes."""
    path = tmp_path_factory.mktemp("files") / "weights.pth"
    net = stirred(timm.create_model("resnet18" if request.param == "static" else "kw_resnet18", **RESNET))
    state = net.state_dict() if request.param != "authors'" else to_upstream(net)
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return path, state, net(x), request.param


class TestSources:
    def test_a_file_or_a_state_dict_by_an_overlay(self, file, x):
        path, state, expected, _ = file
        for overlay in ({"file": str(path)}, {"state_dict": state}):
            net = timm.create_model("kw_resnet18", pretrained=True, pretrained_cfg_overlay=overlay, **RESNET)
            torch.testing.assert_close(net.eval()(x), expected, rtol=2e-3, atol=1e-3)
            assert temperatures(net) == {"kernel_warehouse": 0.0}
            assert "state_dict" not in net.default_cfg
        cfg = {**timm.get_pretrained_cfg("kw_resnet18").to_dict(), "file": str(path)}
        net = timm.create_model("kw_resnet18", pretrained=True, pretrained_cfg=cfg, **RESNET)
        torch.testing.assert_close(net.eval()(x), expected, rtol=2e-3, atol=1e-3)

    def test_checkpoint_path(self, file, tmp_path, x):
        path, state, expected, kind = file
        if kind == "authors'":  # of which timm's reader knows nothing, for any network
            with pytest.raises(RuntimeError, match="Unexpected key"):
                timm.create_model("kw_resnet18", checkpoint_path=str(path), **RESNET)
            return
        safe = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(state, safe)
        for name in (path, safe):
            net = timm.create_model("kw_resnet18", checkpoint_path=str(name), **RESNET)
            torch.testing.assert_close(net.eval()(x), expected, rtol=2e-3, atol=1e-3)
        net = create_model("kw_resnet18", checkpoint_path=str(path), **RESNET)
        torch.testing.assert_close(net.eval()(x), expected, rtol=2e-3, atol=1e-3)

    def test_a_folder(self, file, tmp_path, x):
        _, state, expected, _ = file
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text('{"architecture": "kw_resnet18", "num_classes": 1000}')
        net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **RESNET)
        torch.testing.assert_close(net.eval()(x), expected, rtol=2e-3, atol=1e-3)

    def test_other_classes_and_channels(self, file, x):
        path = file[0]
        overlay = {"file": str(path)}
        arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay, **RESNET}
        whole = timm.create_model("kw_resnet18", **arguments).eval()
        net = timm.create_model("kw_resnet18", num_classes=5, in_chans=1, **arguments).eval()
        assert net(x[:, :1]).shape == (2, 5)
        torch.testing.assert_close(net.conv1.weight, whole.conv1.weight.sum(1, keepdim=True))
        torch.testing.assert_close(net.layer4[0].bn2.weight, whole.layer4[0].bn2.weight)
        gray = x[:, :1].expand(-1, 3, -1, -1)
        torch.testing.assert_close(net.forward_features(x[:, :1]), whole.forward_features(gray), rtol=2e-3, atol=1e-3)
        none = timm.create_model("kw_resnet18", num_classes=0, **arguments).eval()
        torch.testing.assert_close(none(x), whole.forward_head(whole.forward_features(x), pre_logits=True))

    def test_features(self, file, x):
        overlay = {"file": str(file[0])}
        arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay, **RESNET}
        net = timm.create_model("kw_resnet18", **arguments).eval()
        extractor = timm.create_model("kw_resnet18", features_only=True, **arguments).eval()
        torch.testing.assert_close(extractor(x)[-1], net.forward_features(x), rtol=2e-3, atol=1e-3)


class TestConvertedStemAndHead:
    """kw1d2x_mobilenetv2_050 has both."""

    def test_other_classes_and_channels(self, caplog):
        before = stirred(timm.create_model("kw1d2x_mobilenetv2_050"))
        overlay = {"state_dict": before.state_dict()}
        x = torch.randn(2, 3, 32, 32)
        arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay}
        net = timm.create_model("kw1d2x_mobilenetv2_050", num_classes=5, **arguments).eval()
        torch.testing.assert_close(net.forward_features(x), before.forward_features(x))
        with caplog.at_level(logging.WARNING):
            net = timm.create_model("kw1d2x_mobilenetv2_050", in_chans=1, **arguments).eval()
        assert "conv_stem: weights for other channels" in caplog.text
        torch.testing.assert_close(net.bn1.weight, before.bn1.weight)
        torch.testing.assert_close(net.classifier.warehouse.weight, before.classifier.warehouse.weight)
        net = timm.create_model("kw1d2x_mobilenetv2_050", num_classes=0, **arguments).eval()
        torch.testing.assert_close(net(x), before.forward_head(before.forward_features(x), pre_logits=True))
        for kwargs in ({}, {"feature_cls": "getter"}):
            net = timm.create_model("kw1d2x_mobilenetv2_050", num_classes=0, features_only=True, **kwargs, **arguments)
            assert len(net.eval()(x)) == 5

    def test_a_static_file_cannot_fill_fewer_cells(self, tmp_path):
        torch.save(timm.create_model("mobilenetv2_050").state_dict(), tmp_path / "static.pth")
        with pytest.raises(RuntimeError, match=r"static network.*cell_num_ratio"):
            timm.create_model("kw1d2x_mobilenetv2_050", checkpoint_path=str(tmp_path / "static.pth"))


class TestPositions:
    def test_embeddings_are_resampled_for_images_of_another_size(self):
        small = {"embed_dim": 24, "depth": 2, "num_heads": 3}
        before = stirred(timm.create_model("kw_deit_tiny", img_size=32, **small))
        overlay = {"state_dict": before.state_dict(), "input_size": (3, 32, 32)}
        net = timm.create_model("kw_deit_tiny", img_size=64, pretrained=True, pretrained_cfg_overlay=overlay, **small)
        assert net.pos_embed.shape[1] == 17
        torch.testing.assert_close(net.pos_embed[:, :1], before.pos_embed[:, :1])
        assert net.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()


class TestSaveForHub:
    @pytest.mark.parametrize("safe", [False, True])
    def test_what_timm_writes_is_read_back(self, tmp_path, x, safe):
        fields = {"cell_num_ratio": 2, "sharing_range": ("layer", "conv"), "num_classes": 7, **RESNET}
        net = stirred(timm.create_model("kw_resnet18", **fields))
        save_for_hf(net, tmp_path, model_args=fields, safe_serialization=safe)
        read = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(read(x), net(x), rtol=0, atol=0)
        assert read.num_classes == 7
        fresh = timm.create_model(f"local-dir:{tmp_path}", pretrained=False)
        assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
        few = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
        torch.testing.assert_close(few.forward_features(x), net.forward_features(x), rtol=0, atol=0)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", registered_models())
    def test_every_name(self, tmp_path, name):
        net = stirred(timm.create_model(name, num_classes=7))
        images = torch.randn(1, 3, 224, 224)
        save_for_hf(net, tmp_path, safe_serialization=True)
        read = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7).eval()
        torch.testing.assert_close(read(images), net(images), rtol=0, atol=0)


class TestStaticWeights:
    def test_state_dict_of_the_static_network_is_taken_any_time(self, x):
        static = stirred(timm.create_model("resnet18", **RESNET))
        net = timm.create_model("kw_resnet18", **RESNET).eval()
        set_temperature(net, 0.5)
        net.load_state_dict(static.state_dict())
        assert temperatures(net) == {"kernel_warehouse": 0.0}
        torch.testing.assert_close(net(x), static(x), rtol=2e-3, atol=1e-3)
        twin = timm.create_model("kw_resnet18", **RESNET).eval()
        twin.load_state_dict(net.state_dict())
        torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)

    def test_missing_and_strange_entries_are_still_errors(self):
        state = timm.create_model("resnet18", **RESNET).state_dict()
        net = timm.create_model("kw_resnet18", **RESNET)
        with pytest.raises(RuntimeError, match=r"Missing key.*bn1\.weight"):
            net.load_state_dict({key: value for key, value in state.items() if key != "bn1.weight"})
        with pytest.raises(RuntimeError, match=r"Unexpected key.*strange"):
            net.load_state_dict({**state, "strange": torch.zeros(1)})
        part = {key: value for key, value in state.items() if key != "layer4.0.conv2.weight"}
        with pytest.raises(RuntimeError, match=r"Unexpected key.*layer2\.0\.conv1\.weight"):
            net.load_state_dict(part)


class TestWeightsOfTheHub:
    """timm's for the static network, as its factory downloads them."""

    @pytest.fixture
    def static(self, monkeypatch):
        net, asked = stirred(timm.create_model("resnet18", **RESNET)), []

        def download(where, **_kwargs):
            asked.append(where)
            return net.state_dict()

        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
        return net, asked

    @pytest.mark.parametrize(
        ("name", "arguments", "where"),
        [
            ("kw_resnet18", {}, "timm/resnet18.a1_in1k"),
            ("kw_resnet18.fb_swsl_ig1b_ft_in1k", {}, "timm/resnet18.fb_swsl_ig1b_ft_in1k"),
            ("kw_resnet18", {"pretrained_cfg": "fb_ssl_yfcc100m_ft_in1k"}, "timm/resnet18.fb_ssl_yfcc100m_ft_in1k"),
            ("kw_resnet18", {"pretrained_cfg_overlay": {"crop_pct": 1.0}}, "timm/resnet18.a1_in1k"),
            ("kw_resnet18", {"pretrained_cfg": timm.get_pretrained_cfg("kw_resnet18")}, "timm/resnet18.a1_in1k"),
            (
                "kw_resnet18",
                {"pretrained_cfg": timm.get_pretrained_cfg("kw_resnet18").to_dict()},
                "timm/resnet18.a1_in1k",
            ),
        ],
    )
    def test_they_are_kept(self, static, x, name, arguments, where):
        net = timm.create_model(name, pretrained=True, **arguments, **RESNET).eval()
        torch.testing.assert_close(net(x), static[0](x), rtol=2e-3, atol=1e-3)
        assert static[1] == [where]
        assert net.default_cfg["architecture"] == "kw_resnet18"
        if "pretrained_cfg_overlay" in arguments:
            assert net.default_cfg["crop_pct"] == 1.0

    def test_other_classes_channels_and_features(self, static, x):
        net = timm.create_model("kw_resnet18", pretrained=True, num_classes=5, in_chans=1, **RESNET).eval()
        torch.testing.assert_close(net.conv1.weight, static[0].conv1.weight.sum(1, keepdim=True))
        assert net(x[:, :1]).shape == (2, 5)
        features = timm.create_model("kw_resnet18", pretrained=True, features_only=True, **RESNET).eval()
        torch.testing.assert_close(features(x)[-1], static[0].forward_features(x), rtol=2e-3, atol=1e-3)
