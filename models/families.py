"""What is known about families of backbones: the stage, the block and the role of each layer, by its name."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torchvision
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

Place = tuple[str, str, str]  # stage, block, role


@dataclass(frozen=True)
class Family:
    """A family of backbones.

    Attributes:
        name: Its name.
        matches: Whether a network belongs to it.
        place: The names of its layers → stage, block and role of those it knows.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    place: Callable[[list[str]], dict[str, Place]]


def find_family(net: nn.Module) -> Family | None:
    """The family that a network belongs to, None where there is no table for it."""
    return next((family for family in FAMILIES if family.matches(net)), None)


def _place_resnet(names: list[str]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for name in names:
        if re.fullmatch(r"conv1(\.\d+)*", name):
            places[name] = "", "", "stem"
        elif m := re.fullmatch(r"layer(\d+)\.(\d+)\.(?:(conv\d+)|downsample\.\d+)", name):
            places[name] = m[1], m[2], m[3] or "downsample"
        elif name == "fc":
            places[name] = "", "", "head"
    return places


def _place_mobilenetv2(names: list[str]) -> dict[str, Place]:
    tops = {"conv_stem": "stem", "conv_head": "last", "classifier": "head"}
    roles = {"pw": "expand", "dw": "depthwise", "pwl": "project"}
    places: dict[str, Place] = {name: ("", "", tops[name]) for name in names if name in tops}
    for name in names:
        if m := re.fullmatch(r"blocks\.(\d)\.(\d+)\.conv_(pw|dw|pwl)", name):
            # The one block without expansion calls its projection conv_pw.
            places[name] = m[1], m[2], "project" if m[1] == "0" and m[3] == "pw" else roles[m[3]]
    return places


def _place_convnext(names: list[str]) -> dict[str, Place]:
    roles = {"conv_dw": "depthwise", "mlp.fc1": "expand", "mlp.fc2": "project"}
    places: dict[str, Place] = {}
    for name in names:
        if name == "stem.0":
            places[name] = "0", "", "stem"
        elif m := re.fullmatch(r"stages\.(\d+)\.downsample\.1", name):
            places[name] = m[1], "", "downsample"
        elif m := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(conv_dw|mlp\.fc1|mlp\.fc2)", name):
            places[name] = m[1], m[2], roles[m[3]]
        elif name == "head.fc":
            places[name] = "", "", "head"
    return places


def _place_vit(names: list[str]) -> dict[str, Place]:
    roles = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    places: dict[str, Place] = {}
    for name in names:
        if name == "patch_embed.proj":
            places[name] = "", "", "stem"
        elif (m := re.fullmatch(r"blocks\.(\d+)\.(attn\.\w+|mlp\.fc\d)", name)) and m[2] in roles:
            places[name] = "", m[1], roles[m[2]]
        elif name in ("head", "head_dist"):
            places[name] = "", "", "head"
    return places


def _is_mobilenetv2(net: nn.Module) -> bool:
    """timm builds many networks from one class; MobileNetV2 has seven settings of 3×3 blocks without attention."""
    if not isinstance(net, EfficientNet):
        return False
    stages: list[Any] = list(net.blocks)
    if len(stages) != 7 or len(stages[0]) != 1:
        return False
    blocks = [block for stage in stages for block in stage]
    plain = all(isinstance(getattr(block, "se", None), nn.Identity) for block in blocks)
    return plain and all(getattr(getattr(b, "conv_dw", None), "kernel_size", None) == (3, 3) for b in blocks)


FAMILIES = (
    Family("ResNet", lambda net: isinstance(net, ResNet | torchvision.models.ResNet), _place_resnet),
    Family("MobileNetV2", _is_mobilenetv2, _place_mobilenetv2),
    Family("ConvNeXt", lambda net: isinstance(net, ConvNeXt), _place_convnext),
    Family("VisionTransformer", lambda net: isinstance(net, VisionTransformer), _place_vit),
)
