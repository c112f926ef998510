"""Networks of other libraries that are dynamic already: their layers computed by this package's primitives."""

from torch import nn

from .obstacles import hooks_of
from .operators import built_in_operators, get_operator
from .ops.api import DynamicLayer
from .sites import check_network


def accelerate_(net: nn.Module) -> nn.Module:
    """Let the dynamic layers of another library in `net`, such as timm's ``CondConv2d``, be computed by this package.

    The new layers hold the same parameters, so that an optimizer stays valid, and have the same names: the state dict
    is what it was, in both directions. Results are the same up to rounding.

    Args:
        net: A network, such as ``timm.create_model("tf_efficientnet_cc_b0_4e")``.

    Returns:
        `net`, whose new layers `dynamic_layers` lists.

    Raises:
        ValueError: No such layer, or one with hooks, parametrizations or a forward of its own, which would be lost;
            nothing is changed then.
    """
    check_network(net)
    operators = [get_operator(name) for name in built_in_operators()]
    new: dict[str, DynamicLayer] = {}
    made: dict[nn.Module, DynamicLayer] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        try:
            found = made.get(module) or next(filter(None, (o.accelerated(module) for o in operators)), None)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from e
        if found is None:
            continue
        _check(name, module)
        made[module] = new[name] = found.train(module.training)
    if not new:
        raise ValueError(f"{type(net).__name__} has no layer to accelerate: there is none of timm's CondConv2d in it")
    for name, layer in new.items():
        net.set_submodule(name, layer)
    return net


def _check(name: str, module: nn.Module) -> None:
    """Raise a ValueError for what would be lost with a layer."""
    if not name:
        raise ValueError(f"a single {type(module).__name__} cannot be swapped in place: put it into a module first")
    if hooks := hooks_of(module, parameters=False):
        raise ValueError(f"{name} has {hooks}, which would be lost: remove them first")
    if "forward" in vars(module):
        raise ValueError(f"{name} has a forward of its own, set on the instance, which would be lost: remove it first")
