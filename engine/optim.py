"""The optimizer: timm's factory over groups of parameters with their own decay and learning-rate scale."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from timm.models import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_info  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.optim import Optimizer

from ..configs.schema import ConfigError, RunConfig
from ..models import sharing, translations


def build_optimizer(model: nn.Module, run: RunConfig) -> Optimizer:
    """Return the optimizer that `run` names over the trainable parameters of `model`.

    Each group has an `lr_scale`, by which a schedule multiplies the learning rate.

    Raises:
        ConfigError: An optimizer that timm does not know or that refuses its settings, or `layer_decay` for a network
            that does not name its layers.
    """
    return make_optimizer(parameter_groups(model, run.weight_decay, run.layer_decay), run)


def make_optimizer(groups: list[dict], run: RunConfig) -> Optimizer:
    """Return the optimizer that `run` names over groups such as `parameter_groups` gives.

    Raises:
        ConfigError: An optimizer that timm does not know or that refuses its settings.
    """
    try:
        info = get_optimizer_info(run.opt.lower().removeprefix("lookahead_"))
        options = {"eps": run.opt_eps if info.has_eps else None, "betas": run.opt_betas if info.has_betas else None}
        return create_optimizer_v2(
            groups,
            run.opt,
            lr=run.lr,
            momentum=run.momentum,
            **{name: value for name, value in options.items() if value is not None},
        )
    except ValueError as e:
        raise ConfigError(f"field 'opt': {e}") from e


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Group the trainable parameters by weight decay and learning-rate scale.

    Biases, other vectors and what the model exempts by `no_weight_decay()` do not decay. The classifier learns at
    the full rate and each layer below at `layer_decay` times the rate of the one above it.

    Raises:
        ConfigError: `layer_decay` is not 1 and the model has no `group_matcher`, as timm's networks have.
    """
    parameters = dict(model.named_parameters())
    return [
        {
            "params": [parameters[name] for name in names],
            "weight_decay": weight_decay if decays else 0.0,
            "decays": decays,
            "lr_scale": scale,
        }
        for (decays, scale), names in _grouped(model, parameters, layer_decay).items()
    ]


def optimizer_state_for(
    model: nn.Module, weights: Mapping[str, Tensor], saved: dict[str, Any], run: RunConfig
) -> dict[str, Any]:
    """The state of an optimizer that was saved beside `weights`, with its entries where `model` has the parameters.

    An optimizer numbers parameters in the order in which the network had them then, which the weights still show: they
    may be those of an older version, with other names, places and layouts.

    Raises:
        KeyError, ValueError: It is that of another network or grouping.
    """
    translation = next((t for t in translations(model) if t.recognises(weights)), None)
    parameters = dict(model.named_parameters())
    theirs = {}
    for key in weights:
        name = key if translation is None else next(iter(translation.from_authors({key: weights[key]})))
        theirs.setdefault(name, key)
    before = _grouped(model, [name for name in theirs if name in parameters], run.layer_decay)
    now = _grouped(model, parameters, run.layer_decay)
    old = [name for names in before.values() for name in names]
    if before == now and translation is None:
        return saved
    if sorted(old) != sorted(name for names in now.values() for name in names):
        raise ValueError("it trains other parameters")
    numbers = {name: number for number, name in enumerate(old)}

    def entry(name: str) -> dict[str, Any]:
        key, values = theirs[name], saved["state"].get(numbers[name], {})
        shaped = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.shape == weights[key].shape}
        moved = {k: translation.from_authors({key: v})[name] for k, v in shaped.items()} if translation else {}
        return {**values, **moved}

    settings = {(group["decays"], group["lr_scale"]): group for group in saved["param_groups"]}
    count, groups, state = 0, [], {}
    for kind, names in now.items():
        groups.append({**settings[kind], "params": list(range(count, count + len(names)))})
        state |= {count + i: entry(name) for i, name in enumerate(names)}
        count += len(names)
    return {"state": {number: values for number, values in state.items() if values}, "param_groups": groups}


def _grouped(model: nn.Module, names: Iterable[str], layer_decay: float) -> dict[tuple[bool, float], list[str]]:
    """Names of trainable parameters by whether they decay and by their learning-rate scale, in the order given."""
    parameters = dict(model.named_parameters())
    exempt = getattr(model, "no_weight_decay", set)()
    layers = parameter_layers(model) if layer_decay != 1 else {}
    top = max(layers.values(), default=0)
    groups: dict[tuple[bool, float], list[str]] = defaultdict(list)
    for name in names:
        if parameters[name].requires_grad:
            decays = parameters[name].ndim > 1 and not name.endswith(".bias") and name not in exempt
            groups[decays, layer_decay ** (top - layers.get(name, top))].append(name)
    return groups


def parameter_layers(model: nn.Module) -> dict[str, int]:
    """Number the layer of each parameter from the input on; what layers share counts to the last of them.

    Raises:
        ConfigError: The model has no `group_matcher`.
    """
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ConfigError(
            f"field 'layer_decay': {type(model).__name__} has no group_matcher() to name its layers; pass "
            "--layer_decay 1 or take a network of timm's"
        )
    layers = group_parameters(model, matcher(coarse=False), reverse=True)
    for shared, users in sharing(model).items():
        prefixes = tuple(f"{user}." for user in users)
        layers[shared] = max(layer for name, layer in layers.items() if name.startswith(prefixes))
    return layers
