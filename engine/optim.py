"""The optimizer: timm's factory over groups of parameters with their own decay and learning-rate scale."""

from collections import defaultdict

from timm.models import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_info  # pyright: ignore[reportPrivateImportUsage]
from torch import nn
from torch.optim import Optimizer

from ..configs.schema import ConfigError, RunConfig
from ..models import warehouse_users


def build_optimizer(model: nn.Module, run: RunConfig) -> Optimizer:
    """Return the optimizer that `run` names over the trainable parameters of `model`.

    Each group has an `lr_scale`, by which a schedule multiplies the learning rate.

    Raises:
        ConfigError: An optimizer that timm does not know or that refuses its settings, or `layer_decay` for a network
            that does not name its layers.
    """
    try:
        info = get_optimizer_info(run.opt.lower().removeprefix("lookahead_"))
        options = {"eps": run.opt_eps if info.has_eps else None, "betas": run.opt_betas if info.has_betas else None}
        return create_optimizer_v2(
            parameter_groups(model, run.weight_decay, run.layer_decay),
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
    exempt = getattr(model, "no_weight_decay", set)()
    layers = parameter_layers(model) if layer_decay != 1 else {}
    top = max(layers.values(), default=0)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt
            scale = layer_decay ** (top - layers.get(name, top))
            groups[decays, scale].append(parameter)
    return [
        {"params": p, "weight_decay": weight_decay if decays else 0.0, "decays": decays, "lr_scale": scale}
        for (decays, scale), p in groups.items()
    ]


def parameter_layers(model: nn.Module) -> dict[str, int]:
    """Number the layer of each parameter from the input on; cells count to the last layer that shares them.

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
    for cells, users in warehouse_users(model).items():
        prefixes = tuple(f"{user}." for user in users)
        layers[cells] = max(layer for name, layer in layers.items() if name.startswith(prefixes))
    return layers
