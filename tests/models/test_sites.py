"""What is known about the layers of a network, before any operator is asked."""

import timm
import torch
from torch import nn

from kernelwarehouse.models.sites import find_sites


def by_name(net, **options):
    return {site.name: site for site in find_sites(net, **options)}


def test_a_table_says_stage_block_and_role():
    resnet = by_name(timm.create_model("resnet50"))
    assert (resnet["conv1"].role, resnet["fc"].role) == ("stem", "head")
    site = resnet["layer3.0.conv2"]
    assert (site.stage, site.block, site.role, site.kernel) == ("3", "0", "conv2", (256, 256, 3, 3))
    assert (site.stride, site.padding, site.groups, site.bias, site.batch_first) == ((2, 2), (1, 1), 1, False, True)
    assert resnet["layer3.0.downsample.0"].role == "downsample"
    mobilenet = by_name(timm.create_model("mobilenetv2_050"))
    assert [mobilenet[f"blocks.3.1.conv_{n}"].role for n in ("pw", "dw", "pwl")] == ["expand", "depthwise", "project"]
    assert mobilenet["blocks.0.0.conv_pw"].role == "project"
    vit = by_name(timm.create_model("vit_tiny_patch16_224"))
    assert (vit["blocks.11.attn.qkv"].block, vit["blocks.11.attn.qkv"].role) == ("11", "qkv")


def test_without_a_table_the_structure_does():
    net = timm.create_model("vgg11", num_classes=3)
    sites = find_sites(net, torch.empty(2, 3, 64, 64))
    assert sites.family is None
    known = {site.name: site for site in sites}
    assert known["features.0"].role == "stem"
    assert (known["features.3"].role, known["features.3"].stage) == ("body", "r32x32")
    assert known["head.fc"].role == "head"
    turns = [site.turn for site in sites]
    assert turns == sorted(turns)


def test_readers_are_the_next_sites_on_every_way():
    net = by_name(timm.create_model("resnet18"), readers=True)
    assert net["conv1"].readers == ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0")
    assert net["layer4.1.conv2"].readers == ("fc",)
    assert net["layer1.0.conv1"].readers == ("layer1.0.conv2",)

    class Data(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) if x.sum() > 0 else x

    assert by_name(Data(), readers=True)["a"].readers == ()  # a way that depends on values cannot be traced


def test_looking_changes_nothing():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).train()
    net[1].eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    find_sites(net, readers=True)
    assert [m.training for m in net] == [True, False, True]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()
