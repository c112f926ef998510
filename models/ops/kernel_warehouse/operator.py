"""KernelWarehouse as an operator of this package."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ...plan import ConversionPlan
from ...sites import Sites
from ...translation import Translation
from ..api import Anneal, Operator, OperatorConfig, Preset, Report
from ..tied import Tied
from .checkpoint import KWTranslation
from .config import KWConfig
from .layer import KWLayer
from .layers import KWConv1d, KWConv2d, KWConv3d, KWLinear
from .merge import merge_layers_
from .plan import KWLayerPlan, KWPlan
from .planning import make_plan
from .warehouse import Warehouse

_CONVOLUTIONS = {"Conv1d": KWConv1d, "Conv2d": KWConv2d, "Conv3d": KWConv3d}

# MobileNetV2 at half the budget: the early pointwise layers stay static, the classifier is converted, and ratios
# differ between warehouses.
_MOBILENETV2_HALF = {
    "sharing_range": ("layer",),
    "include": (
        "conv_stem",
        r"blocks\.\d\.\d+\.conv_dw",
        r"blocks\.(5\.[12]|6\.0)\.conv_pwl?",
        "conv_head",
        "classifier",
    ),
    "reduction": 1 / 32,
    "cell_num_ratio": (1, 1, 1, 1, 1, 1, 0.5, 1, 0.5, 0.5),
    "cell_inplane_ratio": (1, 1, 1, 1, 1, 1, 0.5, 1, 0.5, 0.025),
    "cell_outplane_ratio": (1, 1, 1, 1, 1, 1, 0.5, 1, 0.5, 1),
}


class KernelWarehouse(Operator):
    """Kernels mixed, per input, from a warehouse of cells that the layers of a stage share (ICML 2024)."""

    name: ClassVar[str] = "kernel_warehouse"
    prefix: ClassVar[str] = "kw"
    Config: ClassVar[type[OperatorConfig]] = KWConfig
    Plan: ClassVar[type[ConversionPlan]] = KWPlan
    presets: ClassVar[Mapping[str, Preset]] = {
        "kw_resnet18": Preset("resnet18"),
        "kw_resnet50": Preset("resnet50"),
        "kw_mobilenetv2_050": Preset("mobilenetv2_050", replaced=("first_conv",)),
        "kw_mobilenetv2_100": Preset("mobilenetv2_100", replaced=("first_conv",)),
        "kw1d2x_mobilenetv2_050": Preset("mobilenetv2_050", _MOBILENETV2_HALF, ("first_conv", "classifier")),
        "kw1d2x_mobilenetv2_100": Preset("mobilenetv2_100", _MOBILENETV2_HALF, ("first_conv", "classifier")),
        "kw_convnext_tiny": Preset("convnext_tiny", replaced=("first_conv",)),
        "kw_deit_tiny": Preset("deit_tiny_patch16_224"),
        "kw_deit_small": Preset("deit_small_patch16_224"),
    }

    def anneal(self, config: KWConfig) -> Anneal:
        """τ from the static assignment to pure attention over 20 epochs (the paper; 15 of 150 for MobileNetV2)."""
        del config
        return Anneal(start=1.0, end=0.0, epochs=20, limits=(0.0, 1.0))

    def plan(self, sites: Sites, config: KWConfig) -> KWPlan:
        """As `Operator.plan`; see `planning.py`."""
        return make_plan(sites, config)

    def shared(self, plan: KWPlan, device: torch.device, dtype: torch.dtype) -> dict[str, Tied]:
        """The warehouses."""
        return {w.name: Warehouse(w.shape, device, dtype) for w in plan.warehouses}

    def layer(self, layer: KWLayerPlan, old: Any, shared: Mapping[str, Warehouse], plan: KWPlan) -> KWLayer:
        """One layer, with its own cells initialised."""
        share = {
            "bias": old.bias is not None,
            "warehouse": shared[layer.warehouse],
            "own_cells": range(layer.start, layer.start + layer.own_cells),
            "reduction": plan.reduction,
            "norm": plan.norm,
            "nonlocal_basis_ratio": plan.warehouse(layer.warehouse).nonlocal_basis_ratio,
        }
        if layer.kind == "Linear":
            new: KWLayer = KWLinear(old.in_features, old.out_features, **share)
        else:
            arguments = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
            geometry = {name: getattr(old, name) for name in arguments}
            new = _CONVOLUTIONS[layer.kind](old.in_channels, old.out_channels, **geometry, **share)
        new.reset_parameters()
        return new

    def check_static(self, plan: KWPlan) -> None:
        """Below a budget of 1 there are fewer cells than parts of kernels."""
        parts = {w.name: sum(la.mixtures for la in plan.layers if la.warehouse == w.name) for w in plan.warehouses}
        short = [w.name for w in plan.warehouses if w.cells < parts[w.name]]
        if short:
            raise ValueError(
                f"a static network's weights cannot be kept with fewer cells than the kernels have parts, as in "
                f"{', '.join(short)}: take a cell_num_ratio of 1 or more, or start from scratch (keep_weights=False)"
            )

    def load_static(self, layers: Mapping[str, KWLayer], olds: Mapping[str, Any], plan: KWPlan) -> Report:
        """Put the static kernels into the assigned cells and let the attention hold the assignment.

        The network then computes what it did before (to a relative 1e-3 per layer at temperatures above 0).
        """
        self.check_static(plan)
        for name, layer in layers.items():
            layer.load_static_weight(olds[name].weight, olds[name].bias)
        return Report(dict.fromkeys(layers, 0.0))

    def translation(self, net: nn.Module, plan: KWPlan) -> Translation:
        """Upstream's names, and those of older checkpoints of ours."""
        return KWTranslation(net, plan)

    def check_merge(self, layers: Mapping[str, KWLayer], **options: Any) -> None:
        """As `Operator.check_merge`."""
        if unknown := options.keys() - {"dtype", "max_bytes"}:
            raise ValueError(f"merging knows no option {unknown.pop()!r}; there are dtype and max_bytes")
        for name, layer in layers.items():
            if not layer.attention.is_linear():
                raise ValueError(f"{name}: logits that come from other layers than torch's Linear cannot be merged")

    def merge_(self, layers: Mapping[str, KWLayer], x_shapes: Mapping[str, Sequence[int]], **options: Any) -> list[str]:
        """Attention and cells multiplied once and for all; see `merge.py` for the options."""
        return merge_layers_(layers, x_shapes, **options)
