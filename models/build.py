"""From a configuration to a network: timm's backbone, converted; and the converted networks that timm finds by name."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..configs.schema import ConfigError, ModelConfig
from .convert import convert_
from .factory import NO_WEIGHTS, create_converted
from .families import find_family
from .operators import built_in_operators, get_operator, read_config, split_model_name
from .ops.api import OperatorConfig, Preset
from .structure import why_not_run

# timm's names of backbones that upstream or its paper calls otherwise.
ALIASES = {"deit_tiny": "deit_tiny_patch16_224", "deit_small": "deit_small_patch16_224"}

# Families whose recipes give every block the full rate of stochastic depth.
CONSTANT_DROP_PATH = ("ResNet",)


def build_model(config: ModelConfig | Mapping[str, Any] | str | Path, **overrides: Any) -> nn.Module:
    """Build the network that a configuration describes.

    Args:
        config: A `ModelConfig`, the fields of one, or a configuration file (or the name of a shipped one); fields of
            the run are allowed there and play no part.
        **overrides: Fields that win over those of `config`, such as ``nb_classes=10`` or ``cell_num_ratio=4``.

    Returns:
        timm's network, converted unless neither the model's name nor the field `operator` says by which operator;
        (B, in_chans, H, W) → (B, nb_classes).

    Raises:
        ConfigError: An unknown model, operator or field, a value that the backbone refuses, or images that are too
            small for it.
        ValueError: A conversion that cannot be done.
    """
    if isinstance(config, ModelConfig):
        fields = dataclasses.asdict(config)
        config = {**fields.pop("operator_fields"), **fields}
    config = read_config(config, overrides).model
    preset = find_preset(config.model)
    backbone = ALIASES.get(preset.backbone, preset.backbone)
    if not timm.is_model(backbone):
        raise ConfigError(f"field 'model': timm has no network {backbone!r}{_nearest(config.model)}")
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
    _check_input_size(net, config)
    if config.operator is None:
        return net
    operator = get_operator(config.operator)
    fields = {**preset.fields, **config.operator_fields}
    return convert_(net, operator.Config(**fields), keep_weights=config.pretrained, example_input=example)


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model` for any name, also of converted networks that are not registered with timm.

    Args:
        name: A name of timm's, or an operator's prefix and a name of timm's, such as ``kw_resnet34``.
        pretrained: Start from timm's weights of the static network, which the conversion keeps.
        **kwargs: timm's arguments and the operator's fields.

    Raises:
        ConfigError: No such network.
        ValueError: A conversion that cannot be done.
    """
    split = split_model_name(name)
    if timm.is_model(name) or split is None:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    return _create_converted(name, split[0], find_preset(name), pretrained, kwargs)


def find_preset(model: str) -> Preset:
    """The backbone and the operator's fields that the name of a model stands for."""
    split = split_model_name(model)
    if split is None:
        return Preset(model)
    name, backbone = split
    return get_operator(name).presets.get(model, Preset(backbone))


def registered_models() -> dict[str, str]:
    """The converted networks that are registered with timm, and their operators."""
    return {model: name for name in built_in_operators() for model in get_operator(name).presets}


def _nearest(model: str) -> str:
    names = {*registered_models(), *ALIASES, *timm.list_models()}
    near = difflib.get_close_matches(model, names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _spread_drop_path(net: nn.Module, config: ModelConfig) -> None:
    """timm raises the rate linearly with depth; the rule "constant" gives every block the full rate."""
    family = find_family(net)
    constant = family is not None and family.name in CONSTANT_DROP_PATH
    rule = config.drop_path_rule or ("constant" if constant else "linear")
    if rule == "linear" or not config.drop_path:
        return
    names = ("drop_path", "drop_path1", "drop_path2")
    owners = [(m, name) for m in net.modules() for name in names if hasattr(m, name)]
    if not owners:
        raise ConfigError(f"{config.model} has no blocks with a drop path for drop_path_rule 'constant'")
    for module, name in owners:
        setattr(module, name, DropPath(config.drop_path))


def _check_input_size(net: nn.Module, config: ModelConfig) -> None:
    """Images may be smaller than what a network's strides leave something of; those below its default are tried."""
    default = (getattr(net, "default_cfg", None) or {}).get("input_size") or ()
    size = config.input_size
    if len(default) != 3 or size >= min(default[1:]):
        return
    reason = why_not_run(net, torch.empty(2, config.in_chans, size, size, device="meta"))
    if reason is None or why_not_run(net, torch.empty(2, config.in_chans, *default[1:], device="meta")) is not None:
        return
    raise ConfigError(f"field 'input_size': {config.model} does not run on images of {size}×{size}: {reason}")


def _create_converted(name: str, operator: str, preset: Preset, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    cls: type[OperatorConfig] = get_operator(operator).Config
    names = {f.name for f in dataclasses.fields(cls)}
    fields = {key: value for key, value in kwargs.items() if key in names}
    kwargs = {key: value for key, value in kwargs.items() if key not in names}
    if saved := kwargs.get("pretrained_model_args"):  # of a folder that timm's save_for_hf wrote
        kwargs["pretrained_model_args"] = {key: value for key, value in saved.items() if key not in names}
    backbone = ALIASES.get(preset.backbone, preset.backbone)
    if not timm.is_model(backbone):
        raise ConfigError(f"timm has no network {backbone!r}{_nearest(name)}")
    # A plan that replaces the classifier needs one; it is taken away afterwards.
    headless = "classifier" in preset.replaced and kwargs.get("num_classes") == 0
    if headless:
        del kwargs["num_classes"]
    net: Any = create_converted(name, backbone, cls(**{**preset.fields, **fields}), pretrained, **kwargs)
    if headless and not kwargs.get("features_only"):
        net.reset_classifier(0)
    return net


def _entry_point(name: str, operator: str) -> Callable[..., nn.Module]:
    preset = get_operator(operator).presets[name]

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_converted(name, operator, preset, pretrained, kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{preset.backbone} converted by {operator}; takes the operator's fields beside timm's arguments."
    return create


def _default_cfg(name: str, preset: Preset) -> dict[str, Any]:
    """timm's for the static network, without weights; another package may have registered it without any."""
    try:
        cfg = timm.get_pretrained_cfg(preset.backbone)
    except RuntimeError:  # which timm raises for the tags of a model that was registered over its own
        cfg = None
    fields = cfg.to_dict() if cfg is not None else {}
    return {**fields, "architecture": name, **NO_WEIGHTS, **dict.fromkeys(preset.replaced, ())}


# timm reads a model's default configuration from this name in the module that registers it.
default_cfgs = generate_default_cfgs(
    {name: _default_cfg(name, get_operator(op).presets[name]) for name, op in registered_models().items()}
)
__all__ = ["build_model", "create_model", "registered_models"]
for _name, _operator in registered_models().items():
    register_model(_entry_point(_name, _operator))
