"""Converting a network: `plan_conversion` looks and decides, `convert_` checks, allocates what is shared, and swaps."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from .layers import LAYERS, Layer, kernel_shape
from .obstacles import Obstacles
from .operators import get_operator
from .ops.api import Anneal, DynamicLayer, Operator, OperatorConfig
from .ops.tied import Temperature, Tied
from .plan import ConversionPlan, LayerPlan
from .reminder import remind
from .sites import check_network, find_sites
from .trial import ARGUMENTS


def plan_conversion(net: nn.Module, config: OperatorConfig, *, example_input: Tensor | None = None) -> ConversionPlan:
    """Decide how `net` would be converted, changing nothing; copies of it may be run on the meta device.

    Args:
        net: Any network of torch.nn convolutions and linear layers.
        config: An operator's configuration, such as ``KWConfig(cell_num_ratio=4)``.
        example_input: For a network without a table in `sites`: an input of it, of which shape and type are used.

    Returns:
        The plan; ``print(plan)`` shows it, `convert_` carries it out.

    Raises:
        ValueError: The network cannot be converted so; the message names the layer, what was found and what would work.
    """
    operator = get_operator(config.operator)
    _check_not_converted(net, operator)
    sites = find_sites(net, example_input, readers=operator.needs_readers, converted=dynamic_layers(net))
    plan = operator.plan(sites, config)
    if not plan.layers:
        raise ValueError(f"nothing to convert in {type(net).__name__}")
    return dataclasses.replace(plan, untraced=sites.untraced)


def convert_(
    net: nn.Module,
    plan: ConversionPlan | OperatorConfig,
    *,
    keep_weights: bool = True,
    example_input: Tensor | None = None,
) -> nn.Module:
    """Convert `net` in place by a plan, or by the plan for a configuration.

    An optimizer made before the conversion knows the parameters of the layers that are gone, and trains nothing of the
    new ones: make it afterwards, from ``net.parameters()``. Each layer keeps its place, mode, device and type, and each
    of its parameters is trained where the one that it replaces was.

    Args:
        net: The network that the plan was made for. It may have been converted by another operator before, in other
            layers.
        plan: From `plan_conversion`, or a configuration; every new layer refers to it (`plans`).
        keep_weights: Let the new layers compute what the static ones did, as exactly as the operator can (its README
            says how), to be fine-tuned from there. False initialises as its paper, for training from scratch.
        example_input: As `plan_conversion`.

    Returns:
        `net`, at the temperature of a trained network; `TemperatureSchedule` and `set_temperature` change that. A
        network that is trained before anybody has done so warns of it once.

    Raises:
        ValueError: The plan does not fit the network, or the operator cannot keep weights; nothing is changed then.
    """
    if not isinstance(plan, ConversionPlan):
        plan = plan_conversion(net, plan, example_input=example_input)
    operator = get_operator(plan.operator)
    _check_not_converted(net, operator)
    check_network(net)
    old = _find_layers(net, plan)
    if keep_weights:
        operator.check_static(plan)
    new = _make_layers(operator, plan, old)
    if keep_weights:
        operator.load_static(new, old, plan)
    _inherit(new, old)
    operator.apply_(net, plan, new)
    _leave_fast_paths_(net, new)
    next(iter(new.values())).register_forward_pre_hook(remind)
    return net


def _make_layers(operator: Operator, plan: ConversionPlan, old: Mapping[str, Layer]) -> dict[str, DynamicLayer]:
    """New layers by name, sharing what the plan says, with one temperature."""
    weight = next(iter(old.values())).weight
    shared = operator.shared(plan, weight.device, weight.dtype)
    anneal = operator.anneal(plan.config)
    temperature = None
    if anneal is not None:
        temperature = Temperature(anneal.end, anneal.limits, device=weight.device, dtype=weight.dtype)
    for name, module in shared.items():
        module.label = name
    layers = {}
    for planned in plan.layers:
        layer = operator.layer(planned, old[planned.name], shared, plan)
        layer.plan, layer.temperature = plan, temperature
        layers[planned.name] = layer
    return layers


def _inherit(new: Mapping[str, DynamicLayer], old: Mapping[str, Layer]) -> None:
    """Mode, arguments and trainability: a bias is trained if the old one was, all else if the old weight was."""
    users: dict[Tied, list[bool]] = {}
    for name, layer in new.items():
        before = old[name]
        layer.train(before.training)
        for argument in ARGUMENTS:
            if hasattr(before, argument) and not hasattr(layer, argument):
                setattr(layer, argument, getattr(before, argument))
        shared = layer.shared()
        of_others = {p for module in shared for p in module.parameters()}
        for parameter in layer.parameters():
            if parameter not in of_others:
                parameter.requires_grad_(before.weight.requires_grad)
        bias = getattr(layer, "bias", None)
        if bias is not None and before.bias is not None:
            bias.requires_grad_(before.bias.requires_grad)
        for module in shared:
            users.setdefault(module, []).append(before.weight.requires_grad)
    for module, trained in users.items():
        module.requires_grad_(any(trained))


def _leave_fast_paths_(net: nn.Module, names: Iterable[str]) -> None:
    """Let torch's transformer layers call the linear layers in them: in evaluation they would read their weights."""
    parents = {name.rpartition(".")[0] for name in names}
    for name, module in net.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and name in parents:
            module.register_forward_pre_hook(_without_fast_path)
        elif isinstance(module, nn.TransformerEncoder) and any(parent.startswith(f"{name}.") for parent in parents):
            module.use_nested_tensor = False


def _without_fast_path(_module: nn.Module, _args: tuple) -> None:
    """Do nothing: where a module has a hook, torch takes the path that calls its parts."""


def _find_layers(net: nn.Module, plan: ConversionPlan) -> dict[str, Layer]:
    """The layers of `net` that the plan names, each checked to be what it expects and to stand in nobody's way."""
    modules = dict(net.named_modules())
    obstacles = Obstacles(net)
    found = {}
    for layer in plan.layers:
        module = modules.get(layer.name)
        if not isinstance(module, LAYERS) or not _fits(module, layer):
            text = "no such layer" if module is None else repr(module).partition("\n")[0]
            raise ValueError(f"the plan expects {layer.name} to be a {layer.kind} of {layer.kernel}, found {text}")
        if problem := obstacles.find(layer.name, module):
            raise ValueError(problem)
        found[layer.name] = module
    placed = {(m.weight.device, m.weight.dtype) for m in found.values()}
    if len(placed) > 1:
        raise ValueError(f"the layers to convert are on several devices or of several types: {placed}")
    return found


def _fits(module: Layer, layer: LayerPlan) -> bool:
    shape = kernel_shape(module)
    widened = shape + (1,) * (len(layer.kernel) - len(shape)) if isinstance(module, nn.Linear) else shape
    return layer.kind in (cls.__name__ for cls in type(module).__mro__) and widened == layer.kernel


def _check_not_converted(net: nn.Module, operator: Operator) -> None:
    if any(plan.operator == operator.name for plan in plans(net)):
        raise ValueError(f"this {type(net).__name__} is already converted by {operator.name}")


def dynamic_layers(net: nn.Module) -> dict[str, DynamicLayer]:
    """The converted layers of a network, or of networks inside a module, by name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, DynamicLayer)}


def plans(net: nn.Module) -> list[ConversionPlan]:
    """The plans by which a network, or networks inside a module, were converted, in the order of their layers."""
    found: list[ConversionPlan] = []
    for layer in dynamic_layers(net).values():
        if layer.plan is not None and layer.plan not in found:
            found.append(layer.plan)
    return found


def anneals(net: nn.Module) -> dict[str, Anneal]:
    """How the temperature of each operator in a network changes in training, for those that have one."""
    found = {plan.operator: get_operator(plan.operator).anneal(plan.config) for plan in plans(net)}
    return {name: anneal for name, anneal in found.items() if anneal is not None}


def shared_labels(net: nn.Module) -> dict[str, str]:
    """Name of each parameter that layers may share, as `net` spells it → what the plan calls it."""
    tied = {id(p): m.label for layer in dynamic_layers(net).values() for m in layer.shared() for p in m.parameters()}
    return {name: tied[id(p)] for name, p in net.named_parameters() if id(p) in tied}


def sharing(net: nn.Module) -> dict[str, list[str]]:
    """Name of each parameter that layers may share → names of the layers that use it, both as `net` spells them.

    What the plan says of sharing, for the layers that are there.
    """
    names = {id(p): name for name, p in net.named_parameters()}
    users: dict[str, list[str]] = {}
    for name, layer in dynamic_layers(net).items():
        for module in layer.shared():
            for parameter in module.parameters():
                users.setdefault(names[id(parameter)], []).append(name)
    return users


def sharing_groups(net: nn.Module, modules: Iterable[nn.Module] | None = None) -> list[list[nn.Module]]:
    """Modules that a wrapper which owns parameters has to wrap together, such as FSDP2's ``fully_shard(group)``.

    Args:
        net: A converted network.
        modules: The parts that are to be wrapped, none inside another, such as ``net.children()``; None for the
            converted layers themselves.

    Returns:
        The modules in groups; those of different groups share nothing. Wrapping two that share one by one is an error
        of torch's.
    """
    parts = list(dynamic_layers(net).values() if modules is None else modules)
    groups: list[tuple[list[nn.Module], set[nn.Parameter]]] = []
    for part in parts:
        used = {p for layer in dynamic_layers(part).values() for tied in layer.shared() for p in tied.parameters()}
        touching = [group for group in groups if group[1] & used]
        merged = [m for group in touching for m in group[0]] + [part]
        groups = [group for group in groups if group not in touching]
        groups.append((merged, used.union(*(group[1] for group in touching))))
    order = {id(part): i for i, part in enumerate(parts)}
    return sorted((sorted(g, key=lambda m: order[id(m)]) for g, _ in groups), key=lambda g: order[id(g[0])])


def set_temperature(net: nn.Module, value: float, operator: str | None = None) -> None:
    """Set τ of every converted network inside `net`; a static network has none and is left as it is.

    Args:
        net: A network, or a module that contains one (DDP, an average).
        value: The temperature.
        operator: The operator whose temperature it is; None for all.

    Raises:
        ValueError: A value that an operator does not take; nothing is changed then.
    """
    found = [t for name, t in _temperatures(net) if operator in (None, name)]
    for temperature in found:
        temperature.check(value)
    for temperature in found:
        temperature.fill(value)


def temperatures(net: nn.Module) -> dict[str, float]:
    """The temperature of each operator in a network that has one."""
    return {name: temperature.value.item() for name, temperature in _temperatures(net)}


def _temperatures(net: nn.Module) -> Iterator[tuple[str, Temperature]]:
    seen: set[Temperature] = set()
    for layer in dynamic_layers(net).values():
        if layer.temperature is not None and layer.temperature not in seen:
            seen.add(layer.temperature)
            yield layer.plan.operator if layer.plan else "", layer.temperature


def set_implementation(net: nn.Module, implementation: str, otherwise: str | None = None) -> None:
    """Make every converted layer inside `net` compute in one way, to compare, to time it, or for derivatives.

    Args:
        net: A converted network, or a module that contains one.
        implementation: "auto", or a name that every layer knows; "reference" can be differentiated in every way.
        otherwise: What the layers take that cannot be computed so: "auto", or another name.

    Raises:
        ValueError: An unknown name, a layer that cannot be computed so, or a module without a converted layer; nothing
            is changed then.
    """
    layers = dynamic_layers(net)
    if not layers:
        raise ValueError("the model has no converted layer")
    chosen: dict[str, str] = {}
    for name, layer in layers.items():
        known = ("auto", *layer.candidates())
        for asked in (implementation, otherwise or "auto"):
            if asked not in known:
                raise ValueError(f"{name}: implementation must be {', '.join(known)}; found {asked!r}")
        reason = None if implementation == "auto" else layer.unsupported(implementation)
        if reason is not None and otherwise is None:
            raise ValueError(
                f"{name}: implementation {implementation!r} cannot compute this layer: {reason}; "
                "otherwise='auto' lets such layers choose"
            )
        chosen[name] = implementation if reason is None or otherwise is None else otherwise
    for name, layer in layers.items():
        layer.implementation = chosen[name]
