"""Layer-wise decay of the learning rate, as an option of mmengine's optimizers."""

import math
from collections import defaultdict
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..configs.schema import ConfigError
from ..configs.schema.fields import reject_unknown
from ..engine.optim import parameter_layers
from .backbone import DynamicBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Let each layer of a `DynamicBackbone` learn slower than the one above it; biases, norms and tokens do not decay.

    Layers are counted as by the engine that trains classifiers (`parameter_layers`): 0 is the stem, and each block of
    the backbone is one layer; cells count to the last layer that mixes from them. Neck, heads and output norms are the
    layer above all, which learns at the full rate. With `num_layers` the blocks are folded evenly into that many
    groups: 6 of ConvNeXt-T's 18 blocks are upstream's groups exactly (a group for each three blocks; a downsampling
    belongs to the block after it), but for the cells, which upstream lets learn at the full rate.

    Set by ``optim_wrapper = dict(constructor="LayerDecayConstructor", paramwise_cfg=dict(layer_decay=0.95,
    num_layers=6))``; frozen parameters are left out.

    Raises:
        ConfigError: No `layer_decay` or `lr`, one out of range, an unknown field, or no `DynamicBackbone` in the model.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        fields = dict(paramwise_cfg or {})
        reject_unknown(fields, ("layer_decay", "num_layers"), "optim_wrapper.paramwise_cfg")
        for name, found in fields.items():
            if not isinstance(found, int | float) or not 0 < found <= (1 if name == "layer_decay" else math.inf):
                raise ConfigError(f"field 'optim_wrapper.paramwise_cfg.{name}': out of range, found {found!r}")
        if "layer_decay" not in fields:
            raise ConfigError("field 'optim_wrapper.paramwise_cfg': LayerDecayConstructor needs a 'layer_decay'")
        super().__init__(optim_wrapper_cfg, fields)
        if self.base_lr is None:
            raise ConfigError("field 'optim_wrapper.optimizer.lr': LayerDecayConstructor needs one to scale")

    def add_params(self, params: list[dict], module: nn.Module, *_: Any, **__: Any) -> None:
        """Add the groups of all trainable parameters of `module` to `params`."""
        decay, folded = self.paramwise_cfg["layer_decay"], self.paramwise_cfg.get("num_layers")
        layers: dict[str, float] = {}
        exempt = set()
        for prefix, backbone in module.named_modules():
            if isinstance(backbone, DynamicBackbone):
                own = parameter_layers(backbone.net)
                depth = max(own.values())
                count = folded or depth
                root = ".".join(filter(None, (prefix, "net.")))
                # Depth below the heads, which are one above the last of the backbone's layers.
                layers |= {root + name: count + 1 - math.ceil(layer * count / depth) for name, layer in own.items()}
                exempt |= {root + name for name in getattr(backbone.net, "no_weight_decay", set)()}
        if not layers:
            raise ConfigError(
                f"LayerDecayConstructor: {type(module).__name__} holds no DynamicBackbone to count layers in"
            )
        groups = defaultdict(list)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt
                groups[layers.get(name, 0), decays].append(parameter)
        for (below, decays), members in groups.items():
            group = {"params": members, "lr": self.base_lr * decay**below}
            params.append(group if decays else {**group, "weight_decay": 0.0})
