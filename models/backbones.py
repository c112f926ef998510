"""What is known about each family of backbones: how its layers are labelled, and so which of them share a warehouse.

A label reads ``stage{s}_layer{l}_{role}{i}``; layers whose labels agree after the sharing range has dropped numbers
share a warehouse. Labels are given in the order in which upstream constructs the layers, which numbers the
warehouses. Everything architecture-specific about the conversion stands in this file.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torchvision
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

Labels = list[tuple[str, str]]


@dataclass(frozen=True)
class Family:
    """A family of backbones.

    Attributes:
        name: Its name.
        matches: Whether a network belongs to it.
        label: Convolutions and linear layers by name → (name, label) in order of construction.
        sharing_range: Parts of labels whose numbers are dropped unless the configuration says otherwise.
        static: First parts of labels of layers that stay static unless `include` names them.
        norm: Normalisation in the attention, "batch" or "layer".
        drop_path_rule: How upstream spreads the rate of stochastic depth over the blocks, "constant" or "linear".
        linear_dims: Spatial dimensions of the cells of linear layers, all 1.
        upstream_name: (module name, network) → upstream's name of that module.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    label: Callable[[Mapping[str, nn.Module]], Labels]
    sharing_range: tuple[str, ...]
    static: tuple[str, ...]
    norm: str
    drop_path_rule: str = "linear"
    linear_dims: int = 1
    upstream_name: Callable[[str, nn.Module], str] = lambda name, _: name


def find_family(net: nn.Module) -> Family | None:
    """The family that a network belongs to, None where there is no table for it."""
    return next((family for family in FAMILIES if family.matches(net)), None)


def label_resnet(layers: Mapping[str, nn.Module]) -> Labels:
    """Label a ResNet of timm or torchvision.

    A block that changes the stage's shape hands over: its first convolution and its downsample belong to the stage
    before, whose features they read. Before the first stage there is only the static stem. Grouped convolutions
    (ResNeXt) share among themselves, since their few input channels would cut all other kernels small.
    """
    found = {
        name: m for name in layers if (m := re.fullmatch(r"layer(\d+)\.(\d+)\.(?:conv(\d+)|downsample\.\d+)", name))
    }
    depth: dict[int, int] = {}
    handing_over = set()
    for m in found.values():
        stage, block = int(m[1]), int(m[2])
        depth[stage] = max(depth.get(stage, 0), block + 1)
        if m[3] is None:
            handing_over.add((stage, block))
    labels: Labels = [(name, "stem") for name in layers if re.fullmatch(r"conv1(\.\d+)*", name)]
    # A downsample is constructed before its block.
    for name, m in sorted(found.items(), key=lambda item: (int(item[1][1]), int(item[1][2]), int(item[1][3] or 0))):
        stage, block, conv = int(m[1]), int(m[2]), int(m[3] or 0)
        if (stage, block) in handing_over and conv <= 1:
            before = f"stage{stage - 2}_layer{depth.get(stage - 1, 0)}" if stage - 1 in depth else f"stem_layer{block}"
            labels.append((name, f"{before}_conv{conv}"))
        else:
            role = "conv" if layers[name].groups == 1 else "gconv"
            labels.append((name, f"stage{stage - 1}_layer{block}_{role}{conv}"))
    return labels + [(name, "head") for name in layers if name == "fc"]


# The warehouse stage of each of MobileNetV2's seven settings.
_MOBILENETV2_STAGES = (1, 2, 3, 4, 5, 6, 6)


def label_mobilenetv2(layers: Mapping[str, nn.Module]) -> Labels:
    """Label a MobileNetV2 of timm.

    Every layer is converted but the classifier. Where the warehouse stage changes, the first block still belongs to
    the stage before. Expansion (pwconv0), depthwise (dwconv0) and projection (pwconv1) are roles of their own;
    the last 1×1 convolution counts as a projection.
    """
    labels: Labels = []
    for name in layers:
        if name == "conv_stem":
            labels.append((name, "stage0_conv0"))
        elif m := re.fullmatch(r"blocks\.(\d)\.(\d+)\.conv_(pw|dw|pwl)", name):
            setting, block = int(m[1]), int(m[2])
            stage = _MOBILENETV2_STAGES[max(setting - 1, 0) if block == 0 else setting]
            # The one block without expansion calls its projection conv_pw.
            role = {"pw": "pwconv1" if setting == 0 else "pwconv0", "dw": "dwconv0", "pwl": "pwconv1"}[m[3]]
            labels.append((name, f"stage{stage}_layer{setting}{block:02}_{role}"))
        elif name == "conv_head":
            labels.append((name, "stage6_layer700_pwconv1"))
        elif name == "classifier":
            labels.append((name, "head"))
    return labels


def label_convnext(layers: Mapping[str, nn.Module]) -> Labels:
    """Label a ConvNeXt of timm.

    Stem and downsampling layers have warehouses of their own; in a stage, the depthwise layers share one and the
    pointwise layers another.
    """
    labels: Labels = [(name, "downsample0_conv0") for name in layers if name == "stem.0"]
    labels += [
        (n, f"downsample{m[1]}_conv0") for n in layers if (m := re.fullmatch(r"stages\.(\d+)\.downsample\.1", n))
    ]
    roles = {"conv_dw": "dwconv0", "mlp.fc1": "pwconv0", "mlp.fc2": "pwconv1"}
    for name in layers:
        if m := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(conv_dw|mlp\.fc1|mlp\.fc2)", name):
            labels.append((name, f"stage{m[1]}_layer{m[2]}_{roles[m[3]]}"))
    return labels + [(name, "head") for name in layers if name == "head.fc"]


def label_vit(layers: Mapping[str, nn.Module]) -> Labels:
    """Label a vision transformer of timm, by our own choice: upstream published accuracies but no table.

    The blocks are cut into four equal groups, the stages that the other families have: one warehouse for all twelve
    would make mixing dearer than the network (its cost grows with the square of the layers that share). In a group
    the attention's two layers (qkv, proj) share, and the two of the MLP (fc1, fc2), whose kernels differ in kind;
    ConvNeXt's table likewise keeps its two kinds apart and joins fc1 and fc2.
    """
    roles = {"attn.qkv": "attn0", "attn.proj": "attn1", "mlp.fc1": "mlp0", "mlp.fc2": "mlp1"}
    found = {name: m for name in layers if (m := re.fullmatch(r"blocks\.(\d+)\.(attn\.\w+|mlp\.fc\d)", name))}
    depth = max((int(m[1]) + 1 for m in found.values()), default=0)
    labels: Labels = [(name, "stem") for name in layers if name == "patch_embed.proj"]
    for name, m in found.items():
        if m[2] in roles:
            labels.append((name, f"stage{int(m[1]) * 4 // depth}_layer{m[1]}_{roles[m[2]]}"))
    return labels + [(name, "head") for name in layers if name in ("head", "head_dist")]


def _is_mobilenetv2(net: nn.Module) -> bool:
    """timm builds many networks from one class; MobileNetV2 has seven settings of 3×3 blocks without attention."""
    if not isinstance(net, EfficientNet) or len(net.blocks) != len(_MOBILENETV2_STAGES) or len(net.blocks[0]) != 1:
        return False
    blocks = [block for stage in net.blocks for block in stage]
    plain = all(isinstance(getattr(block, "se", None), nn.Identity) for block in blocks)
    return plain and all(getattr(getattr(b, "conv_dw", None), "kernel_size", None) == (3, 3) for b in blocks)


def _upstream_mobilenetv2(name: str, net: nn.Module) -> str:
    """Upstream follows torchvision's numbering: features.{n}.conv.{k}."""
    depths = [len(stage) for stage in net.blocks]
    tops = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    tops |= {"conv_head": f"features.{sum(depths) + 1}.0", "bn2": f"features.{sum(depths) + 1}.1"}
    if name in tops:
        return tops[name]
    if name == "classifier":
        head = net.get_submodule(name)
        if isinstance(head, nn.Linear):
            return "classifier" if hasattr(net, "warehouses") else "classifier.1"
        return "classifier.1.conv"
    m = re.fullmatch(r"blocks\.(\d)\.(\d+)\.(conv|bn)(?:_(\w+)|(\d))", name)
    if m is None:
        return name
    setting, block = int(m[1]), int(m[2])
    first = ["conv.0.0", "conv.0.1", "conv.1", "conv.2"]
    other = ["conv.0.0", "conv.0.1", "conv.1.0", "conv.1.1", "conv.2", "conv.3"]
    ours = (
        ["conv_dw", "bn1", "conv_pw", "bn2"]
        if setting == 0
        else ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
    )
    theirs = dict(zip(ours, first if setting == 0 else other, strict=True))
    return f"features.{sum(depths[:setting]) + block + 1}.{theirs[name.rsplit('.', 1)[1]]}"


def _upstream_convnext(name: str, _: nn.Module) -> str:
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


FAMILIES = (
    Family(
        "ResNet",
        lambda net: isinstance(net, ResNet | torchvision.models.ResNet),
        label_resnet,
        sharing_range=("layer", "conv"),
        static=("stem", "head"),
        norm="batch",
        drop_path_rule="constant",
    ),
    Family(
        "MobileNetV2",
        _is_mobilenetv2,
        label_mobilenetv2,
        sharing_range=("layer", "pwconv"),
        static=("head",),
        norm="batch",
        upstream_name=_upstream_mobilenetv2,
    ),
    Family(
        "ConvNeXt",
        lambda net: isinstance(net, ConvNeXt),
        label_convnext,
        sharing_range=("layer", "pwconv"),
        static=("head",),
        norm="layer",
        linear_dims=2,
        upstream_name=_upstream_convnext,
    ),
    Family(
        "VisionTransformer",
        lambda net: isinstance(net, VisionTransformer),
        label_vit,
        sharing_range=("layer", "attn", "mlp"),
        static=("stem", "head"),
        norm="layer",
    ),
)
