"""From a configuration to a network: timm's backbone, converted; and the kw_* names that timm finds."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet
from timm.models.efficientnet import EfficientNet
from torch import nn

from ..configs.schema import ConfigError, KWConfig, ModelConfig, load_config
from .backbones import find_family
from .convert import convert_, plan_conversion, remove_unused_warehouses_

# timm's names of backbones that upstream or its paper calls otherwise.
ALIASES = {"deit_tiny": "deit_tiny_patch16_224", "deit_small": "deit_small_patch16_224"}

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

# Converted models by name: the backbone and the operator's fields. Any other kw_X converts timm's X by default.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "kw_resnet18": ("resnet18", {}),
    "kw_resnet50": ("resnet50", {}),
    "kw_mobilenetv2_050": ("mobilenetv2_050", {}),
    "kw_mobilenetv2_100": ("mobilenetv2_100", {}),
    "kw1d2x_mobilenetv2_050": ("mobilenetv2_050", _MOBILENETV2_HALF),
    "kw1d2x_mobilenetv2_100": ("mobilenetv2_100", _MOBILENETV2_HALF),
    "kw_convnext_tiny": ("convnext_tiny", {}),
    "kw_deit_tiny": ("deit_tiny_patch16_224", {}),
    "kw_deit_small": ("deit_small_patch16_224", {}),
}


def build_model(config: ModelConfig | Mapping[str, Any] | str | Path, **overrides: Any) -> nn.Module:
    """Build the network that a configuration describes.

    Args:
        config: A `ModelConfig`, the fields of one, or a configuration file (or the name of a shipped one); fields of
            the run are allowed there and play no part.
        **overrides: Fields that win over those of `config`, such as ``nb_classes=10`` or ``cell_num_ratio=4``.

    Returns:
        timm's network, converted unless the model's name is a static one; (B, in_chans, H, W) → (B, nb_classes).

    Raises:
        ConfigError: An unknown model or field, or a value that the backbone refuses.
        ValueError: A conversion that cannot be done.
    """
    if isinstance(config, ModelConfig):
        fields = dataclasses.asdict(config)
        config = {**fields.pop("kw"), **fields}
    config = load_config(config, overrides).model
    backbone, preset = _resolve(config.model)
    kwargs = {
        "num_classes": config.nb_classes,
        "in_chans": config.in_chans,
        "drop_path_rate": config.drop_path or None,
        "drop_rate": config.dropout or None,
        "ls_init_value": config.layer_scale_init_value,
        **config.model_kwargs,
    }
    example = None
    if timm.get_pretrained_cfg_value(backbone, "fixed_input_size"):
        kwargs["img_size"] = config.input_size
        example = torch.empty(2, config.in_chans, config.input_size, config.input_size, device="meta")
    try:
        net = timm.create_model(backbone, pretrained=config.pretrained, **kwargs)
    except TypeError as e:
        raise ConfigError(f"{config.model}: the backbone {backbone} refuses its arguments: {e}") from e
    _spread_drop_path(net, config)
    if preset is None:
        if config.kw:
            raise ConfigError(
                f"{config.model} is a static network, for which '{next(iter(config.kw))}' means nothing; the converted "
                f"one is 'kw_{config.model}'"
            )
        return net
    return _convert(net, KWConfig(**{**preset, **config.kw}), keep_weights=config.pretrained, example_input=example)


def _convert(
    net: nn.Module, config: KWConfig, *, keep_weights: bool, example_input: torch.Tensor | None = None
) -> nn.Module:
    convert_(net, plan_conversion(net, config, example_input=example_input), keep_weights=keep_weights)
    if type(net) is EfficientNet:
        net.__class__ = ConvertedEfficientNet
    return net


class ConvertedEfficientNet(EfficientNet):
    """timm's EfficientNet class, for networks whose classifier may have cells of its own."""

    def reset_classifier(self, num_classes: int, global_pool: str = "avg", **kwargs: Any) -> None:
        """Replace the classifier by a static one; cells that only the old one used go with it."""
        super().reset_classifier(num_classes, global_pool, **kwargs)
        remove_unused_warehouses_(self)


def _resolve(model: str) -> tuple[str, dict[str, Any] | None]:
    """Name → timm's backbone and the operator's fields, None for a static network."""
    backbone, preset = PRESETS.get(model, (model, None))
    if preset is None and model.startswith("kw_"):
        backbone, preset = model.removeprefix("kw_"), {}
    backbone = ALIASES.get(backbone, backbone)
    if not timm.is_model(backbone):
        names = [*PRESETS, *ALIASES, *timm.list_models(exclude_filters="kw*")]
        near = difflib.get_close_matches(model, names, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(f"field 'model': timm has no network {backbone!r}{hint}")
    return backbone, preset


def _spread_drop_path(net: nn.Module, config: ModelConfig) -> None:
    """timm raises the rate linearly with depth; the rule "constant" gives every block the full rate."""
    family = find_family(net)
    rule = config.drop_path_rule or (family.drop_path_rule if family else "linear")
    if rule == "linear" or not config.drop_path:
        return
    names = ("drop_path", "drop_path1", "drop_path2")
    owners = [(m, name) for m in net.modules() for name in names if hasattr(m, name)]
    if not owners:
        raise ConfigError(f"{config.model} has no blocks with a drop path for drop_path_rule 'constant'")
    for module, name in owners:
        setattr(module, name, DropPath(config.drop_path))


def _entry_point(name: str) -> Callable[..., nn.Module]:
    backbone, preset = PRESETS[name]

    def create(pretrained: bool = False, features_only: bool = False, **kwargs: Any) -> nn.Module:
        for key in ("pretrained_cfg", "pretrained_cfg_overlay"):
            if kwargs.get(key) is None:
                kwargs.pop(key, None)
        fields = {f.name: kwargs.pop(f.name) for f in dataclasses.fields(KWConfig) if f.name in kwargs}
        out_indices = kwargs.pop("out_indices", None)
        net = timm.create_model(backbone, pretrained=pretrained, **kwargs)
        cfg = {**net.pretrained_cfg, "architecture": name}
        net.pretrained_cfg = net.default_cfg = cfg if pretrained else {**cfg, **_NO_WEIGHTS}
        net = _convert(net, KWConfig(**{**preset, **fields}), keep_weights=pretrained)
        if features_only:
            # timm's default wrapper keeps the children that make features, and would lose the cells at the root.
            return FeatureGetterNet(net, out_indices=out_indices if out_indices is not None else (0, 1, 2, 3))
        return net

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{backbone} converted to KernelWarehouse; takes the fields of `KWConfig` beside timm's arguments."
    return create


# timm reads a model's default configuration from this name in the module that registers it.
_NO_WEIGHTS = {"url": "", "hf_hub_id": None, "tag": ""}
default_cfgs = generate_default_cfgs(
    {
        name: {**timm.get_pretrained_cfg(backbone).to_dict(), "architecture": name, **_NO_WEIGHTS}
        for name, (backbone, _) in PRESETS.items()
    }
)
__all__ = ["PRESETS", "build_model"]
for _name in PRESETS:
    register_model(_entry_point(_name))
