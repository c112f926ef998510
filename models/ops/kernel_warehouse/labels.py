"""Which layers share a warehouse: the tables of upstream and its paper, and a rule for every other network.

A label reads ``stage{s}_layer{l}_{role}{i}``; layers whose labels agree after the sharing range has dropped numbers
share a warehouse. Labels come in the order in which upstream constructs the layers, which numbers the warehouses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ...sites import Site, Sites

Labels = list[tuple[Site, str]]


@dataclass(frozen=True)
class Table:
    """What is known about a family of backbones.

    Attributes:
        label: Its sites with a label each, in order of construction.
        sharing_range: Parts of labels whose numbers are dropped unless the configuration says otherwise.
        static: First parts of labels of layers that stay static unless `include` names them.
        norm: Normalisation in the attention, "batch" or "layer".
        linear_dims: Spatial dimensions of the cells of linear layers, all 1.
    """

    label: Callable[[Sites], Labels]
    sharing_range: tuple[str, ...]
    static: tuple[str, ...]
    norm: str
    linear_dims: int = 1


def _label_resnet(sites: Sites) -> Labels:
    """Label a ResNet.

    A block that changes the stage's shape hands over: its first convolution and its downsample belong to the stage
    before, whose features they read. Before the first stage there is only the static stem. Grouped convolutions
    (ResNeXt) share among themselves, since their few input channels would cut all other kernels small.
    """
    blocks = [site for site in sites if site.stage]
    depth: dict[int, int] = {}
    for site in blocks:
        depth[int(site.stage)] = max(depth.get(int(site.stage), 0), int(site.block) + 1)
    handing_over = {(site.stage, site.block) for site in blocks if site.role == "downsample"}

    def number(site: Site) -> int:
        return int(site.role.removeprefix("conv") or 0) if site.role != "downsample" else 0

    labels: Labels = [(site, "stem") for site in sites if site.role == "stem"]
    # A downsample is constructed before its block.
    for site in sorted(blocks, key=lambda site: (int(site.stage), int(site.block), number(site))):
        stage, conv = int(site.stage), number(site)
        if (site.stage, site.block) in handing_over and conv <= 1:
            # All of the stage before may have been converted by another operator.
            before = f"stage{stage - 2}_layer{depth.get(stage - 1, 0)}" if stage > 1 else f"stem_layer{site.block}"
            labels.append((site, f"{before}_conv{conv}"))
        else:
            role = "conv" if site.groups == 1 else "gconv"
            labels.append((site, f"stage{stage - 1}_layer{site.block}_{role}{conv}"))
    return labels + [(site, "head") for site in sites if site.role == "head"]


# The warehouse stage of each of MobileNetV2's seven settings.
_MOBILENETV2_STAGES = (1, 2, 3, 4, 5, 6, 6)


def _label_mobilenetv2(sites: Sites) -> Labels:
    """Label a MobileNetV2.

    Every layer is converted but the classifier. Where the warehouse stage changes, the first block still belongs to
    the stage before. Expansion (pwconv0), depthwise (dwconv0) and projection (pwconv1) are roles of their own;
    the last 1×1 convolution counts as a projection.
    """
    roles = {"expand": "pwconv0", "depthwise": "dwconv0", "project": "pwconv1"}
    tops = {"stem": "stage0_conv0", "last": "stage6_layer700_pwconv1", "head": "head"}
    labels: Labels = []
    for site in sites:
        if site.role in tops:
            labels.append((site, tops[site.role]))
        elif site.role in roles:
            setting, block = int(site.stage), int(site.block)
            stage = _MOBILENETV2_STAGES[max(setting - 1, 0) if block == 0 else setting]
            labels.append((site, f"stage{stage}_layer{setting}{block:02}_{roles[site.role]}"))
    return labels


def _label_convnext(sites: Sites) -> Labels:
    """Label a ConvNeXt.

    Stem and downsampling layers have warehouses of their own; in a stage, the depthwise layers share one and the
    pointwise layers another.
    """
    roles = {"depthwise": "dwconv0", "expand": "pwconv0", "project": "pwconv1"}
    labels: Labels = [(s, f"downsample{s.stage}_conv0") for r in ("stem", "downsample") for s in sites if s.role == r]
    labels += [(s, f"stage{s.stage}_layer{s.block}_{roles[s.role]}") for s in sites if s.role in roles]
    return labels + [(site, "head") for site in sites if site.role == "head"]


def _label_vit(sites: Sites) -> Labels:
    """Label a vision transformer, by our own choice: upstream published accuracies but no table.

    The blocks are cut into four equal groups, the stages that the other families have: one warehouse for all twelve
    would make mixing dearer than the network (its cost grows with the square of the layers that share). In a group
    the attention's two layers (qkv, proj) share, and the two of the MLP (fc1, fc2), whose kernels differ in kind;
    ConvNeXt's table likewise keeps its two kinds apart and joins fc1 and fc2.
    """
    roles = {"qkv": "attn0", "proj": "attn1", "fc1": "mlp0", "fc2": "mlp1"}
    depth = max((int(site.block) + 1 for site in sites if site.block), default=0)
    labels: Labels = [(site, "stem") for site in sites if site.role == "stem"]
    for site in sites:
        if site.role in roles:
            labels.append((site, f"stage{int(site.block) * 4 // depth}_layer{site.block}_{roles[site.role]}"))
    return labels + [(site, "head") for site in sites if site.role == "head"]


TABLES = {
    "ResNet": Table(_label_resnet, ("layer", "conv"), ("stem", "head"), "batch"),
    "MobileNetV2": Table(_label_mobilenetv2, ("layer", "pwconv"), ("head",), "batch"),
    "ConvNeXt": Table(_label_convnext, ("layer", "pwconv"), ("head",), "layer", linear_dims=2),
    "VisionTransformer": Table(_label_vit, ("layer", "attn", "mlp"), ("stem", "head"), "layer"),
}


def label_by_structure(sites: Sites) -> Labels:
    """Label the layers of a network without a table that are converted by default, in the order of execution.

    These are convolutions over more than one position, and linear layers over tokens; the first layer of all (its
    input is the image) and whatever runs on pooled features stay static. Layers of one resolution and one kind share,
    judged by the features that they read, as the paper's tables do: a strided convolution belongs with the layers
    before it. They share only where their channels nest (the smaller divide the larger), so that cells are as large as
    the smallest kernel, and while their mixtures are few beside the size of a cell: the parameters of attention grow
    with the square of the mixtures that share.

    Raises:
        ValueError: The network could not be run, or nothing is left to convert.
    """
    if sites.untraced:
        raise ValueError(
            f"the network has no table, and {sites.untraced}; pass example_input, or name the warehouses yourself with "
            "the field `warehouses`"
        )
    labels: Labels = []
    groups: dict[str, list[_Group]] = {}
    for site in sorted((s for s in sites if s.turn is not None), key=lambda s: s.turn or 0):
        if site.role == "body" and site.foreign is None:
            key = f"{site.stage}_{_kind(site)}"
            labels.append((site, _join(groups.setdefault(key, []), key, site.kernel)))
    left = [f"{site.name}: {site.foreign}" for site in sites if site.foreign and site.role == "body"]
    if not labels and left:
        raise ValueError(f"nothing to convert in {sites.network}; {left[0]}")
    if not labels:
        raise ValueError("no layer of the network reads more than one position; choose layers with `include`")
    return labels


def _kind(site: Site) -> str:
    if site.kind == "Linear":
        return "linear"
    if site.groups == 1:
        return "conv"
    return "dwconv" if site.groups == site.in_channels else "gconv"


@dataclass
class _Group:
    """Layers that share: the channels of a cell, and the elements of all kernels."""

    name: str
    cout: int
    cin: int
    elements: int


def _join(groups: list[_Group], key: str, kernel: tuple[int, ...]) -> str:
    """Return the name of the first group that the kernel fits into, or of a new one."""
    cout, cin = kernel[:2]
    elements = math.prod(kernel)
    for group in groups:
        cell = math.gcd(cout, group.cout), math.gcd(cin, group.cin)
        nested = cell == (min(cout, group.cout), min(cin, group.cin))
        mixtures = (group.elements + elements) // math.prod(cell)
        if nested and mixtures <= max(64, math.prod(cell) // 16):
            group.cout, group.cin = cell
            group.elements += elements
            return group.name
    name = key if not groups else f"{key}_{len(groups) + 1}"
    groups.append(_Group(name, cout, cin, elements))
    return name
