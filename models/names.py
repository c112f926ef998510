"""Module names of backbones in their original code (torchvision's MobileNetV2, Facebook Research's ConvNeXt).

Authors of operators build on these, and so name the weights that they publish.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from .families import find_family


def original_names(net: nn.Module) -> Callable[[str], str]:
    """A function from our name of a module of `net`, which is timm's, to that in the original code.

    It is right as long as `net` had all its blocks when it was made.
    """
    family = find_family(net)
    if family is not None and family.name == "MobileNetV2":
        stages: Any = net.blocks
        depths = [len(stage) for stage in stages]
        return lambda name: _mobilenetv2(name, depths)
    if family is not None and family.name == "ConvNeXt":
        return _convnext
    return lambda name: name


def _mobilenetv2(name: str, depths: list[int]) -> str:
    """torchvision numbers all blocks: features.{n}.conv.{k}."""
    last = sum(depths) + 1
    tops = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
    tops |= {"conv_head": f"features.{last}.0", "bn2": f"features.{last}.1"}
    if name in tops:
        return tops[name]
    m = re.fullmatch(r"blocks\.(\d)\.(\d+)\.(conv|bn)(?:_(\w+)|(\d))", name)
    if m is None:
        return name
    setting, block = int(m[1]), int(m[2])
    if setting == 0:
        theirs = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
    else:
        theirs = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
    return f"features.{sum(depths[:setting]) + block + 1}.conv.{theirs[name.rsplit('.', 1)[1]]}"


def _convnext(name: str) -> str:
    rules = (
        (r"stem\.(\d)", r"downsample_layers.0.\1"),
        (r"stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2"),
        (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw", r"stages.\1.\2.dwconv"),
        (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc(\d)", r"stages.\1.\2.pwconv\3"),
        (r"stages\.(\d)\.blocks\.(\d+)(.*)", r"stages.\1.\2\3"),
        (r"head\.norm", "norm"),
        (r"head\.fc", "head"),
    )
    for pattern, replacement in rules:
        if m := re.fullmatch(pattern, name):
            return m.expand(replacement)
    return name
