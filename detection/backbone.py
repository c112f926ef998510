"""The backbone of a detector: any network that a configuration describes, without what a detector has no use for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mmdet.registry import MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModule
from timm.layers.norm import LayerNorm2d
from timm.models import group_parameters
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..configs.schema import ConfigError
from ..models import (
    build_model,
    check_entries,
    copy_weights,
    find_state_dict,
    fit_weights,
    read_checkpoint,
    read_config,
    sharing,
    translations,
)

PREFIX = "backbone."


@MODELS.register_module()
class DynamicBackbone(BaseModule):
    """A network of `build_model` that gives feature maps, static or converted, at the temperature of a trained one.

    Its levels are those of timm's `feature_info`: ResNet has five (the stem, then a stage each), MobileNetV2 five,
    ConvNeXt four, a vision transformer one for each block. What no chosen level needs is removed, with the cells that
    only it used, so that every parameter receives a gradient; the classifier goes too.

    Attributes:
        levels: The chosen levels, counted from 0.
        out_channels: Channels of each feature map.
        out_strides: Pixels of the image for one step of each feature map.

    Args:
        config: As `build_model`: a configuration file (or the name of a shipped one), or its fields.
        checkpoint: Weights to start from: a classifier's, ours or upstream's, or a detector's, of which the backbone
            is taken. They are read by `init_weights`, that is when a training starts: a trained detector needs no
            classifier's file. None keeps the initialisation.
        model_key: Entry of the checkpoint, such as "model_ema"; several in order of preference, separated by "|". None
            takes the weights that the file was kept for, else the model's.
        out_indices: Levels to return, in ascending order; negative ones count from the last.
        out_norm: Normalise each feature map by a LayerNorm over its channels, as detectors on ConvNeXt do.
        final_features: In place of the last level, return what the network makes of it before pooling (MobileNetV2's
            last convolution, with 1280 channels).
        frozen_stages: Freeze all that makes the levels up to this one, in the numbering of `out_indices`: parameters
            stay as they are, and norms and stochastic depth are in evaluation mode. What they share (the cells of a
            warehouse) is frozen with them when only frozen layers use it; what layers further up use too keeps
            learning, so that the frozen layers still mix by their own attention, but from cells that move. −1 freezes
            nothing.
        norm_eval: Keep all batch norms, those of the attentions too, in evaluation mode; their scale and shift learn.
        drop_path: Rate of stochastic depth, whatever the configuration says about training the classifier.
        with_cp: Recompute activations in the backward pass instead of keeping them.
        overrides: Fields that win over those of `config`, such as ``{"cell_num_ratio": 4}``.
        init_cfg: None; mmengine's own loading would accept weights of which nothing fits.

    Raises:
        ConfigError: An unknown field, levels that the network does not have, or a network without levels.
        ValueError: A conversion that cannot be done.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str | Path,
        checkpoint: str | Path | None = None,
        model_key: str | None = None,
        out_indices: Sequence[int] = (-4, -3, -2, -1),
        out_norm: bool = False,
        final_features: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = True,
        drop_path: float = 0.0,
        with_cp: bool = False,
        overrides: Mapping[str, Any] | None = None,
        init_cfg: None = None,
    ):
        super().__init__()
        if init_cfg is not None:
            raise ConfigError(
                f"field 'init_cfg': {type(self).__name__} takes its weights by 'checkpoint'; found {init_cfg!r}"
            )
        self.checkpoint = checkpoint
        self.model_key = model_key
        self.norm_eval = norm_eval
        self.final_features = final_features
        net = _build(config, {**(overrides or {}), "drop_path": drop_path})
        self.levels = _find_levels(net, out_indices, final_features)
        info = [net.feature_info[level] for level in self.levels]
        self.out_strides = tuple(level["reduction"] for level in info)
        channels = [level["num_chs"] for level in info]
        if final_features:
            channels[-1] = net.num_features
        self.out_channels = tuple(channels)
        # Names are taken before the pruning: authors number what the whole network has.
        self._translations = translations(net)
        whole = net.state_dict().keys()
        _prune_(net, self.levels, final_features)
        self._pruned = frozenset(whole - net.state_dict().keys())
        if with_cp:
            net.set_grad_checkpointing(True)
        if frozen_stages >= 0:
            _freeze(net, frozen_stages)
        self.net: Any = net
        for level, width in zip(self.levels, self.out_channels, strict=True):
            if out_norm:
                self.add_module(f"norm{level}", LayerNorm2d(width))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, in_chans, H, W) → a map (B, out_channels[i], H / out_strides[i], W / out_strides[i]) for each level."""
        levels = list(self.levels)
        if self.final_features:
            final, maps = self.net.forward_intermediates(x, indices=levels)
            maps[-1] = final
        else:
            maps = self.net.forward_intermediates(x, indices=levels, stop_early=True, intermediates_only=True)
        norms = [getattr(self, f"norm{level}", nn.Identity()) for level in levels]
        return tuple(norm(x) for norm, x in zip(norms, maps, strict=True))

    def train(self, mode: bool = True) -> "DynamicBackbone":
        """Set the mode; what is frozen, and with `norm_eval` every batch norm, stays in evaluation mode."""
        super().train(mode)
        shared = {self.net.get_parameter(name) for name in sharing(self.net)}
        for module in self.net.modules():
            parameters = [p for p in module.parameters() if p not in shared]
            frozen = parameters and not any(p.requires_grad for p in parameters)
            if frozen or (self.norm_eval and isinstance(module, _BatchNorm)):
                module.eval()
        return self

    def init_weights(self) -> None:
        """Load `checkpoint`, if there is one.

        Raises:
            CheckpointError: It cannot be read, or does not fit; the message lists the differences, and the backbone is
                unchanged.
        """
        if self.checkpoint:
            source = str(self.checkpoint)
            state = find_state_dict(read_checkpoint(self.checkpoint), self.model_key, source)
            of_detector = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
            net, norms = self._fit(of_detector or state, source)
            copy_weights(self.net, net, source)
            copy_weights(self._norms(), norms, source)
        self._is_init = True

    def fit(self, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """Check weights of a classifier or a detector's backbone; return them under the names of this module.

        Raises:
            CheckpointError: They do not fit, or have values that the backbone cannot hold.
        """
        net, norms = self._fit(state, source)
        return {**{f"net.{k}": v for k, v in net.items()}, **norms}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Accept upstream's names too, and nothing that does not fit: mmengine asks for no strictness at all."""
        own = {k.removeprefix(prefix): state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
        state_dict.update({prefix + k: v for k, v in self.fit(own, "the backbone's part").items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _fit(self, state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Whole state dicts for the network and for the output norms, of weights that were checked.

        Output norms that the weights lack altogether, as those of a classifier do, keep their values.
        """
        check_entries(state, source)
        modules = {name for name, _ in self.named_children()} - {"net"}
        authors = {theirs for translation in self._translations for theirs in translation.names.values()}
        norms = {k: v for k, v in state.items() if k.split(".")[0] in modules and k not in authors}
        state = {k.removeprefix("net."): v for k, v in state.items() if k not in norms}
        for translation in self._translations:
            if translation.recognises(state):
                state = translation.from_authors(state)
                break
        unused = [k for k in state if k in self._pruned]
        used = {k: v for k, v in state.items() if k not in self._pruned}
        net = fit_weights(self.net, used, source=source, known=()).state
        norms = (
            fit_weights(self._norms(), norms, source=source, known=()).state if norms else self._norms().state_dict()
        )
        if unused:
            some = ", ".join(unused[:4]) + (f" and {len(unused) - 4} more" if len(unused) > 4 else "")
            print_log(f"{source}: left out {some}, which the detector does not use", logger="current")
        return net, norms

    def _norms(self) -> nn.ModuleDict:
        """The output norms under their own names."""
        return nn.ModuleDict({name: module for name, module in self.named_children() if name != "net"})


# The name by which configurations of earlier versions ask for it.
KWBackbone = DynamicBackbone
MODELS.register_module(name="KWBackbone", module=DynamicBackbone)
BACKBONES = ("DynamicBackbone", "KWBackbone")


# timm's networks have no class in common that would name what they all have; so they are Any here.
def _build(config: Mapping[str, Any] | str | Path, fields: dict[str, Any]) -> Any:
    net = build_model(config, **fields)
    if getattr(net, "dynamic_img_size", True):
        return net
    # A transformer takes images of one size unless it is told to interpolate its position embedding.
    model_kwargs = read_config(config, fields).model.model_kwargs
    return build_model(config, **{**fields, "model_kwargs": {**model_kwargs, "dynamic_img_size": True}})


def _find_levels(net: Any, indices: Sequence[int], final_features: bool) -> tuple[int, ...]:
    """The levels that `indices` name, each checked to be there."""
    name = type(net).__name__
    if not all(hasattr(net, a) for a in ("feature_info", "forward_intermediates", "prune_intermediate_layers")):
        raise ConfigError(f"{name} of timm gives no feature maps (forward_intermediates); take another backbone")
    count = len(net.feature_info)
    levels = tuple(i + count if i < 0 else i for i in indices)
    if not levels or sorted(set(levels)) != list(levels) or levels[0] < 0 or levels[-1] >= count:
        known = ", ".join(f"{i}: {f['num_chs']}" for i, f in enumerate(net.feature_info))
        raise ConfigError(
            f"field 'out_indices': {name} has levels 0 to {count - 1} (with channels {known}), to be given in "
            f"ascending order; found {tuple(indices)}"
        )
    if final_features and not (isinstance(net, EfficientNet) and levels[-1] == count - 1):
        raise ConfigError(
            f"field 'final_features': takes the place of the last level, {count - 1}, in networks of timm's class "
            f"EfficientNet (MobileNetV2); found levels {tuple(indices)} of {name}"
        )
    return levels


def _prune_(net: Any, levels: Sequence[int], final_features: bool) -> None:
    """Remove what the levels do not need."""
    if final_features:
        net.reset_classifier(0, "")
    else:
        net.prune_intermediate_layers(list(levels), prune_norm=True, prune_head=True)
        if hasattr(getattr(net, "head", None), "norm"):
            net.head.norm = nn.Identity()  # ConvNeXt's, which older timm leaves


def _freeze(net: Any, level: int) -> None:
    """Freeze all that makes the levels up to `level`, and what they share with nothing else."""
    if level >= len(net.feature_info):
        raise ConfigError(
            f"field 'frozen_stages': {type(net).__name__} has levels 0 to {len(net.feature_info) - 1}, found {level}"
        )
    stages = cast("dict[str, int]", group_parameters(net, net.group_matcher(coarse=True), reverse=True))
    module = f"{net.feature_info[level]['module']}."
    # The level of the stem may name an activation, which has no parameters.
    last = max((stage for name, stage in stages.items() if name.startswith(module)), default=0)
    users = sharing(net)
    for name, parameter in net.named_parameters():
        if name not in users and stages[name] <= last:
            parameter.requires_grad_(False)
    shared = {net.get_parameter(name) for name in users}
    for name, layers in users.items():
        own = (p for layer in layers for p in net.get_submodule(layer).parameters() if p not in shared)
        if not any(p.requires_grad for p in own):
            net.get_parameter(name).requires_grad_(False)
