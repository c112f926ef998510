"""Weights of a static network for its converted form: `accept_static_weights` lets `load_state_dict` take them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .convert import dynamic_layers, plans
from .layers import LAYERS, Layer
from .operators import get_operator
from .ops.api import DynamicLayer
from .ops.tied import Temperature
from .plan import LayerPlan

_KINDS: Mapping[str, type[Layer]] = {cls.__name__: cls for cls in LAYERS}


def accept_static_weights(net: nn.Module) -> None:
    """Let `net.load_state_dict` also take weights of the network that `net` was converted from.

    The converted layers then compute what the static ones did, as after ``convert_(net, …, keep_weights=True)``; where
    the operator cannot do that, loading fails and says why.
    """
    net.register_load_state_dict_pre_hook(_convert_state)


def _convert_state(
    net: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Replace static weights in a state dict that is being loaded by those of the converted layers."""
    for plan in plans(net):
        layers = {name: la for name, la in dynamic_layers(net).items() if la.plan == plan}
        planned = {layer.name: layer for layer in plan.layers}
        if not planned.keys() >= layers.keys():
            continue
        olds = {name: _static_layer(planned[name], layer, state_dict, prefix + name) for name, layer in layers.items()}
        if None in olds.values():
            continue
        operator = get_operator(plan.operator)
        try:
            operator.check_static(plan)
            operator.load_static(layers, olds, plan)
        except ValueError as e:
            errors.append(f"these are weights of the static network: {e}")
            continue
        temperatures = tuple(f"{prefix}{name}." for name, m in net.named_modules() if isinstance(m, Temperature))
        insides = tuple(f"{prefix}{name}." for name in layers)
        for key in [key for key in state_dict if key.startswith(insides)]:
            del state_dict[key]
        made = net.state_dict(prefix=prefix).items()
        state_dict |= {k: v for k, v in made if k.startswith(insides) and not k.startswith(temperatures)}


def _static_layer(planned: LayerPlan, layer: DynamicLayer, state: Mapping[str, Any], name: str) -> Layer | None:
    """The static layer whose weights a state dict has under a converted layer's name, if it has just these."""
    found = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    weight = found.get("weight")
    if not isinstance(weight, Tensor) or not found.keys() <= {"weight", "bias"} or found.keys() == set(_own(layer)):
        return None
    shape = tuple(weight.shape)
    if shape + (1,) * (len(planned.kernel) - len(shape)) != planned.kernel:
        return None
    with torch.device("meta"):
        if planned.kind == "Linear":
            old: Any = nn.Linear(planned.in_channels, planned.kernel[0], bias="bias" in found)
        else:
            groups = planned.in_channels // planned.kernel[1]
            convolution: Any = _KINDS[planned.kind]
            sizes = planned.in_channels, planned.kernel[0], planned.kernel[2:]
            old = convolution(*sizes, groups=groups, bias="bias" in found)
    for key, value in found.items():
        setattr(old, key, nn.Parameter(value, requires_grad=False))
    return old


def _own(layer: nn.Module) -> dict[str, Any]:
    return layer.state_dict()
