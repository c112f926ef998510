"""timm's factory for a converted network: weights of either network from any source of timm's, and feature extractors.

timm loads weights and wraps feature extractors before anybody could convert the network; here it is converted between.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.models import FeatureDictNet, FeatureHookNet, load_checkpoint, load_pretrained, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._features_fx import FeatureGraphNet
from torch import Tensor, nn

from ..configs.schema import ConfigError
from .convert import convert_, dynamic_layers, sharing
from .loading import translations
from .ops.api import OperatorConfig
from .ops.tied import state_aliases
from .static_weights import accept_static_weights
from .translation import canonical_names

# Where a configuration of timm's says that weights are, and what is blank where there are none.
SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")
NO_WEIGHTS = {"url": "", "hf_hub_id": None, "tag": ""}

_logger = logging.getLogger(__name__)
_WRAPPERS = (FeatureDictNet, FeatureHookNet, FeatureGetterNet, FeatureGraphNet)
_OF_FEATURES = ("out_indices", "feature_cls", "feature_location")  # arguments that only feature extractors take


def create_converted(
    name: str, backbone: str, config: OperatorConfig, pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    """Make timm's network `backbone` and convert it.

    Args:
        name: What the network is called.
        backbone: timm's name of the static network.
        config: How to convert it.
        pretrained: Start from weights: of the static or the converted network where `pretrained_cfg` or its overlay
            says where they are, else of timm's for the static one. The conversion keeps static weights.
        **kwargs: As for `timm.create_model`.

    Returns:
        The network, or timm's feature extractor of it with ``features_only=True``. It is at the temperature of a
        trained network, and its `load_state_dict` takes weights of the static network too.

    Raises:
        ValueError: A conversion that cannot be done.
        ConfigError: A feature extractor that cannot be converted.
        RuntimeError: Weights that do not fit, as timm reports it.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    checkpoint = kwargs.pop("checkpoint_path", None)
    features_only = kwargs.pop("features_only", False)
    state = None
    if pretrained:
        given = _given_source(name, kwargs)
        if given is not None:
            state = _read_state(given, kwargs.get("cache_dir"))
        else:
            kwargs = _for_static_source(kwargs)
    plain = {key: value for key, value in kwargs.items() if key not in _OF_FEATURES}
    if state is not None and not _is_converted(state, backbone, config, plain):
        state = None  # timm reads it into the static network
    static = partial(timm.create_model, backbone, pretrained=pretrained and state is None)
    described: dict[str, Any] = {}

    def finish(net: Any) -> nn.Module:
        before = dict(net.pretrained_cfg or {})
        convert_(net, config, keep_weights=pretrained and state is None)
        described.update(_describe(net, name, before, pretrained, _has_source(kwargs)))
        if state is not None:
            _load_converted(net, state, before, kwargs.get("in_chans", 3))
        accept_static_weights(net)
        net.pretrained_cfg = net.default_cfg = dict(described)
        if isinstance(traits := getattr(net, "_traits", None), dict):  # newer versions of timm
            net._traits = {**traits, "first_conv": described.get("first_conv")}
        return net

    if not features_only:
        model = finish(static(**kwargs))
    else:
        model = _create_features(static, finish, kwargs, plain)
        removed = ("num_classes", "classifier", "global_pool")
        model.pretrained_cfg = model.default_cfg = {k: v for k, v in described.items() if k not in removed}
    if checkpoint:
        load_checkpoint(model, checkpoint)
    return model


def weighted(names: str | tuple[str, ...] | list[str] | None, state: Mapping[str, Any]) -> Any:
    """Names of layers, as timm's configurations have them, without those that have no weight of their own."""
    kept = tuple(n for n in ([names] if isinstance(names, str) else names or ()) if f"{n}.weight" in state)
    return names if names is None or kept == ((names,) if isinstance(names, str) else tuple(names)) else kept


def _describe(net: nn.Module, name: str, cfg: Mapping[str, Any], pretrained: bool, has_source: bool) -> dict[str, Any]:
    """The configuration of a converted network, given that of the static one."""
    state = net.state_dict()
    layers = {key: weighted(cfg.get(key), state) for key in ("first_conv", "classifier") if key in cfg}
    sources = {} if pretrained or has_source else NO_WEIGHTS
    return {**{k: v for k, v in cfg.items() if k != "state_dict"}, **layers, "architecture": name, **sources}


def _has_source(kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments say where weights are."""
    given, overlay = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay") or {}
    if isinstance(given, str):
        return True  # the tag of weights of the static network
    fields = {} if given is None else dict(given) if isinstance(given, Mapping) else vars(given)
    return any({**fields, **overlay}.get(key) for key in SOURCES)


def _given_source(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """timm's configuration, if the arguments say where weights are that may be of the converted network."""
    given, overlay = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    if not _has_source(kwargs) or (isinstance(given, str) and not _has_source({"pretrained_cfg_overlay": overlay})):
        return None
    known: Any = None if isinstance(given, str) else given
    if known is not None and not isinstance(known, Mapping):
        known = vars(known)
    architecture = {"architecture": name}
    return resolve_pretrained_cfg(name, {**architecture, **known} if known else architecture, overlay).to_dict()


def _for_static_source(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a configuration that says nothing of weights laid over that of the static network."""
    given: Any = kwargs.get("pretrained_cfg")
    if given is None or isinstance(given, str):
        return kwargs
    fields = dict(given) if isinstance(given, Mapping) else dict(vars(given))
    ours = (*SOURCES, "architecture", "tag", "first_conv", "classifier")
    overlay = {key: value for key, value in fields.items() if key not in ours}
    overlay |= kwargs.get("pretrained_cfg_overlay") or {}
    return {**{k: v for k, v in kwargs.items() if k != "pretrained_cfg"}, "pretrained_cfg_overlay": overlay}


class _Catch(nn.Module):
    """Keeps the state dict that is loaded into it."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *_args: Any, **_kwargs: Any) -> Any:
        self.state = dict(state_dict)
        return nn.modules.module._IncompatibleKeys([], [])


def _read_state(cfg: Mapping[str, Any], cache_dir: Any) -> dict[str, Tensor]:
    """The weights that timm finds by a configuration, as they are there."""
    catch = _Catch()
    cfg = {**cfg, "first_conv": None, "classifier": None, "custom_load": False}
    load_pretrained(catch, pretrained_cfg=cfg, cache_dir=cache_dir)
    return catch.state


def _is_converted(
    state: Mapping[str, Tensor], backbone: str, config: OperatorConfig, kwargs: Mapping[str, Any]
) -> bool:
    """Whether weights have a name, ours or the authors', that the converted network has and the static one has not."""
    net = timm.create_model(backbone, **kwargs)
    static = set(net.state_dict())
    convert_(net, config, keep_weights=False)
    own = {*net.state_dict(), *state_aliases(net)} - static
    theirs = {names[key] for names in (t.names for t in translations(net)) for key in own & names.keys()}
    return not state.keys().isdisjoint((own | theirs) - static)


def _load_converted(net: Any, state: dict[str, Tensor], cfg: Mapping[str, Any], in_chans: int) -> None:
    """Load weights of the converted network as timm would, which may have other classes or channels.

    Args:
        net: The converted network.
        state: Its weights, as the file has them.
        cfg: timm's configuration of the static network, with the classes and channels of the file.
        in_chans: Channels that the network reads.
    """
    for translation in translations(net):
        if translation.recognises(state):
            state = translation.from_authors(state)
            break
    state = canonical_names(net, state)
    target, layers, replaced = net.state_dict(), dynamic_layers(net), []
    if net.num_classes != cfg.get("num_classes"):
        replaced += [name for name in _names(cfg.get("classifier")) if f"{name}.weight" not in target]
    if in_chans != (cfg.get("input_size") or (3,))[0]:
        stems = [name for name in _names(cfg.get("first_conv")) if name in layers]
        if stems:
            _logger.warning("%s: weights for other channels are not taken; it starts anew", ", ".join(stems))
        replaced += stems
    dropped = _keys_of(net, replaced)
    kept = {key: value for key, value in state.items() if not (dropped and key.startswith(dropped))}
    if any(key in target and value.shape != target[key].shape for key, value in kept.items()):
        resample = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)  # position embeddings
        kept = resample(kept, net) if resample else kept
    cfg = {**cfg, "state_dict": kept, "source": "", "classifier": weighted(cfg.get("classifier"), target)}
    cfg["first_conv"] = weighted(cfg.get("first_conv"), target)
    if isinstance(traits := getattr(net, "_traits", None), dict):
        net._traits = {**traits, "first_conv": cfg["first_conv"]}
    load_pretrained(net, pretrained_cfg=cfg, num_classes=net.num_classes, in_chans=in_chans, strict=not replaced)


def _names(names: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _keys_of(net: nn.Module, names: list[str]) -> tuple[str, ...]:
    """Beginnings of the state dict's keys that belong to layers, with what they alone share."""
    shared = [key for key, users in sharing(net).items() if all(user in names for user in users)]
    return (*(f"{name}." for name in names), *shared)


def _create_features(
    static: Callable[..., Any],
    finish: Callable[[Any], nn.Module],
    kwargs: Mapping[str, Any],
    plain: Mapping[str, Any],
) -> Any:
    """timm's feature extractor of a converted network.

    Args:
        static: Makes the static network, with its weights if those are wanted.
        finish: Converts it in place.
        kwargs: Arguments for `static`, those of feature extractors among them.
        plain: The same without them.
    """
    template = static(features_only=True, **kwargs)
    kind: Any = type(template)
    if issubclass(kind, _WRAPPERS):
        # timm takes this for a class of its wrappers; made, it is one of a network that was converted before.
        methods = {"__new__": lambda _, model, **arguments: kind(finish(model), **arguments)}
        return static(features_only=True, **{**kwargs, "feature_cls": type(kind.__name__, (kind,), methods)})
    return _transplant(finish(static(**plain)), template)


def _transplant(net: nn.Module, template: nn.Module) -> nn.Module:
    """Put the layers and weights of a converted network into a static one that has a part of its modules.

    Raises:
        ConfigError: It has others as well.
    """
    state, places, moved = net.state_dict(), dict(template.named_modules()), ()
    for name, module in net.named_modules():  # the layers, and blocks that the operator has rewritten
        if name and name in places and not name.startswith(moved) and type(module) is not type(places[name]):
            _move_hooks(places[name], module)
            template.set_submodule(name, module)
            moved += (f"{name}.",)
    kept = {key: value for key, value in template.state_dict().items() if not key.startswith(moved)}
    strange = [key for key, value in kept.items() if key not in state or state[key].shape != value.shape]
    if strange:
        raise ConfigError(
            f"features_only: {type(template).__name__} has {strange[0]}, which {type(net).__name__} has not; pass "
            "feature_cls='getter' or 'hook'"
        )
    with torch.no_grad():
        for key, value in kept.items():
            value.copy_(state[key])
    return template


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let the forward hooks of a module, and of what it holds, see what takes its place."""
    places = dict(new.named_modules())
    for name, module in old.named_modules():
        for hook in module._forward_pre_hooks.values():
            places[name].register_forward_pre_hook(hook)
        for hook in module._forward_hooks.values():
            places[name].register_forward_hook(hook)
