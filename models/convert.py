"""Converting a network: `plan_conversion` looks and decides, `convert_` allocates the cells and swaps the layers."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..configs.schema import KWConfig
from .backbones import Family, find_family
from .ops.kernel_warehouse import KWConv1d, KWConv2d, KWConv3d, KWLayer, KWLinear, Warehouses
from .ops.kernel_warehouse.partition import Partition, count_cells, share_cells
from .plan import ConversionPlan, LayerPlan, WarehousePlan
from .structure import label_by_structure

CONVOLUTIONS = {nn.Conv1d: KWConv1d, nn.Conv2d: KWConv2d, nn.Conv3d: KWConv3d}
WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule", "ScriptModule")


def plan_conversion(
    net: nn.Module, config: KWConfig | None = None, *, example_input: Tensor | None = None
) -> ConversionPlan:
    """Decide how `net` would be converted, changing nothing.

    Args:
        net: Any network of torch.nn convolutions and linear layers.
        config: The operator's configuration; default: the paper's 1×.
        example_input: For a network without a table in `backbones`: an input of it, of which the shape is used.

    Returns:
        The plan; ``print(plan)`` shows it, `convert_` carries it out.

    Raises:
        ValueError: The network cannot be converted so; the message names the layer or warehouse, what was found and
            what would work.
    """
    config = config or KWConfig()
    _check_network(net)
    layers = {name: m for name, m in net.named_modules() if type(m) in CONVOLUTIONS or type(m) is nn.Linear}
    if not layers:
        raise ValueError(f"{type(net).__name__} holds no convolution and no linear layer of torch.nn")
    family = find_family(net)
    groups = _group(net, layers, family, config, example_input)
    for name in groups:
        if not name.isidentifier():
            raise ValueError(f"warehouse {name!r}: a name may hold letters, digits and underscores only")
    for name in itertools.chain.from_iterable(groups.values()):
        _check_layer(net, name, layers[name])
    for field in ("cell_num_ratio", "cell_inplane_ratio", "cell_outplane_ratio", "nonlocal_basis_ratio"):
        value = getattr(config, field)
        if isinstance(value, tuple) and len(value) != len(groups):
            raise ValueError(f"{field} holds {len(value)} ratios, one for each of {len(groups)}: {', '.join(groups)}")
    linear_dims = family.linear_dims if family else 1
    order = {name: i for i, name in enumerate(layers)}
    planned: list[LayerPlan] = []
    warehouses = []
    for index, (warehouse, names) in enumerate(groups.items()):
        members = {name: layers[name] for name in sorted(names, key=order.__getitem__)}
        plan, own = _plan_warehouse(warehouse, members, config, index, linear_dims)
        warehouses.append(plan)
        planned += own
    return ConversionPlan(
        layers=tuple(sorted(planned, key=lambda layer: order[layer.name])),
        warehouses=tuple(warehouses),
        reduction=config.reduction,
        norm=config.norm or (family.norm if family else _norm_of(net)),
        parameters_before=sum(p.numel() for p in net.parameters()),
    )


def convert_(net: nn.Module, plan: ConversionPlan, *, keep_weights: bool = True) -> nn.Module:
    """Convert `net` in place: give it `net.warehouses` and swap the planned layers.

    Args:
        net: The network that the plan was made for.
        plan: From `plan_conversion`; it stays at hand as ``net.warehouses.plan``.
        keep_weights: Put the static kernels into the assigned cells and let the attention hold the assignment, so
            that with b ≥ 1 the network computes what it did before (to a relative 1e-3 per layer at temperatures
            above 0) and can be fine-tuned; with b < 1 the assigned part of each kernel is kept. False initialises
            as the paper, for training from scratch.

    Returns:
        `net`, at temperature 0; `set_temperature` changes that.

    Raises:
        ValueError: The plan does not fit the network, which is then left unchanged.
    """
    _check_network(net)
    old = _find_layers(net, plan)
    weight = next(iter(old.values())).weight
    warehouses = Warehouses({w.name: w.shape for w in plan.warehouses}, weight.device, weight.dtype)
    new = {layer.name: _make_layer(layer, old[layer.name], plan, warehouses) for layer in plan.layers}
    for name, layer in new.items():
        layer.reset_parameters()
        if keep_weights:
            layer.hold(old[name].weight, old[name].bias)
    for warehouse in warehouses.names:
        users = [layer.name for layer in plan.layers if layer.warehouse == warehouse]
        warehouses.cells(warehouse).requires_grad_(any(old[name].weight.requires_grad for name in users))
    warehouses.plan = plan
    warehouses.train(net.training)
    net.add_module("warehouses", warehouses)
    for name, layer in new.items():
        net.set_submodule(name, layer)
    return net


def _find_layers(net: nn.Module, plan: ConversionPlan) -> dict[str, nn.Module]:
    """The layers of `net` that the plan names, each checked to be what it expects."""
    modules = dict(net.named_modules())
    found = {}
    for layer in plan.layers:
        module = modules.get(layer.name)
        if type(module).__name__ != layer.kind or _kernel(module, layer.kernel) != layer.kernel:
            text = "no such layer" if module is None else repr(module).partition("\n")[0]
            raise ValueError(f"the plan expects {layer.name} to be a {layer.kind} of {layer.kernel}, found {text}")
        _check_layer(net, layer.name, module)
        found[layer.name] = module
    placed = {(m.weight.device, m.weight.dtype) for m in found.values()}
    if len(placed) > 1:
        raise ValueError(f"the layers to convert are on several devices or of several types: {placed}")
    return found


def warehouse_users(model: nn.Module) -> dict[str, list[str]]:
    """Names of the cells' parameters → names of the layers that mix from them, both as `model` spells them."""
    parameters = {id(p): name for name, p in model.named_parameters()}
    users: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, KWLayer) and module.products is None:
            users.setdefault(parameters[id(module.cells)], []).append(name)
    return users


def conversion_plan(model: nn.Module) -> ConversionPlan | None:
    """Return the plan by which `model` was converted; None for a static network."""
    return getattr(getattr(model, "warehouses", None), "plan", None)


def remove_unused_warehouses_(net: nn.Module) -> nn.Module:
    """Drop the cells that no layer of `net` mixes from any more, after some were replaced or folded; returns `net`."""
    layers = [module for module in net.modules() if isinstance(module, KWLayer) and module.products is None]
    net.warehouses.keep({layer.warehouse for layer in layers})
    return net


def _check_network(net: nn.Module) -> None:
    if type(net).__name__ in WRAPPERS or isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"the network is wrapped in {type(net).__name__}: convert the network inside, then wrap it")
    if any(isinstance(m, Warehouses) for m in net.modules()):
        raise ValueError(f"this {type(net).__name__} is already converted")
    if type(net) in CONVOLUTIONS or type(net) is nn.Linear:
        raise ValueError(f"a single {type(net).__name__} cannot be swapped in place: put it into a module first")
    if hasattr(net, "warehouses"):
        raise ValueError(f"{type(net).__name__} has an attribute `warehouses`, where its cells would go: rename it")


def _check_layer(net: nn.Module, name: str, layer: nn.Module) -> None:
    aliases = [n for n, m in net.named_modules(remove_duplicate=False) if m is layer]
    if len(aliases) > 1:
        raise ValueError(f"{' and '.join(aliases)} are one module: untie or exclude them")
    owners = [n for n, m in net.named_modules() if any(p is layer.weight for p in m.parameters(recurse=False))]
    if len(owners) > 1:
        raise ValueError(f"{' and '.join(owners)} share one weight: untie or exclude them")
    if min(layer.weight.shape) < 1:
        raise ValueError(f"{name} has a kernel without elements: {tuple(layer.weight.shape)}")
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        raise ValueError(f"{name} has hooks, which a conversion would lose: remove or exclude it")


def _group(
    net: nn.Module,
    layers: Mapping[str, nn.Module],
    family: Family | None,
    config: KWConfig,
    example_input: Tensor | None,
) -> dict[str, list[str]]:
    """Warehouse → its layers, both in order of construction."""
    if config.warehouses is not None:
        labels = [(n, w) for n in layers if (w := _first_match(config.warehouses, n)) is not None]
        _check_patterns("warehouses", config.warehouses, layers)
        chosen = labels
    elif family is not None:
        labels = family.label(layers)
        chosen = [(n, label) for n, label in labels if label.split("_")[0] not in family.static]
    else:
        if config.sharing_range is not None:
            raise ValueError(
                f"sharing_range needs a table of labels, and {type(net).__name__} has none: name the warehouses with "
                "the field `warehouses`, or leave sharing to the network's structure"
            )
        labels = chosen = label_by_structure(net, layers, example_input)
    if config.include is not None:
        _check_patterns("include", config.include, layers)
        chosen = [(n, label) for n, label in labels if _matches(config.include, n)]
        missing = [n for n in layers if _matches(config.include, n) and n not in dict(labels)]
        if missing:
            raise ValueError(f"include names {missing[0]}, for which there is no warehouse: use the field `warehouses`")
    _check_patterns("exclude", config.exclude, layers)
    sharing = config.sharing_range
    if sharing is None:
        sharing = family.sharing_range if family and config.warehouses is None else ()
    groups: dict[str, list[str]] = {}
    for name, label in chosen:
        if not _matches(config.exclude, name):
            groups.setdefault(_shared_label(label, sharing), []).append(name)
    if not groups:
        raise ValueError(f"nothing to convert: include and exclude leave none of {len(layers)} layers")
    return groups


def _plan_warehouse(
    warehouse: str, members: Mapping[str, nn.Module], config: KWConfig, index: int, linear_dims: int
) -> tuple[WarehousePlan, list[LayerPlan]]:
    dims = {m.weight.ndim - 2 if type(m) in CONVOLUTIONS else linear_dims for m in members.values()}
    if len(dims) > 1:
        raise ValueError(f"warehouse {warehouse}: layers of {dims} dimensions cannot share: {', '.join(members)}")
    kernels = {name: _kernel(m, (1,) * (2 + max(dims))) for name, m in members.items()}
    sizes = {kernel[2:] for kernel in kernels.values()}
    if config.spatial_partition:
        space = (1,) * max(dims)
    elif len(sizes) == 1:
        space = next(iter(sizes))
    else:
        raise ValueError(f"warehouse {warehouse}: cells that span the kernel need one kernel size, found {sizes}")
    channels = [
        _cell_channels(warehouse, field, math.gcd(*(k[axis] for k in kernels.values())), config.ratio(field, index))
        for axis, field in enumerate(("cell_outplane_ratio", "cell_inplane_ratio"))
    ]
    cell = (*channels, *space)
    mixtures = [Partition(kernel, cell).mixtures for kernel in kernels.values()]
    ratio = config.ratio("cell_num_ratio", index)
    cells = count_cells(sum(mixtures), ratio)
    if cells < len(members):
        least = math.ceil(len(members) / sum(mixtures) * 1e4) / 1e4
        raise ValueError(
            f"warehouse {warehouse}: cell_num_ratio {ratio:g} of {sum(mixtures)} mixtures makes {cells} cells, which "
            f"{len(members)} layers cannot share: every layer needs one of its own. Ratios from {least:g} work"
        )
    starts = [0, *itertools.accumulate(shares := share_cells(mixtures, cells))]
    layers = [
        LayerPlan(name, type(m).__name__, _in_channels(m), kernels[name], warehouse, start, own, count)
        for (name, m), start, own, count in zip(members.items(), starts, shares, mixtures, strict=False)
    ]
    return WarehousePlan(warehouse, cells, cell, config.ratio("nonlocal_basis_ratio", index)), layers


def _cell_channels(warehouse: str, field: str, channels: int, ratio: float) -> int:
    size = max(math.floor(channels * ratio + 1e-9), 1)
    if channels % size:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - channels * ratio))[:2]
        raise ValueError(
            f"warehouse {warehouse}: {field} {ratio:g} of {channels} channels makes cells of {size}, which do not "
            f"divide them; {' or '.join(f'{d / channels:g}' for d in sorted(near))} would"
        )
    return size


def _make_layer(layer: LayerPlan, old: nn.Module, plan: ConversionPlan, warehouses: Warehouses) -> KWLayer:
    warehouse = plan.warehouse(layer.warehouse)
    share = {
        "bias": old.bias is not None,
        "warehouses": warehouses,
        "warehouse": warehouse.name,
        "own_cells": range(layer.start, layer.start + layer.own_cells),
        "reduction": plan.reduction,
        "norm": plan.norm,
        "nonlocal_basis_ratio": warehouse.nonlocal_basis_ratio,
    }
    if isinstance(old, nn.Linear):
        new: KWLayer = KWLinear(old.in_features, old.out_features, **share)
    else:
        arguments = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        geometry = {name: getattr(old, name) for name in arguments}
        new = CONVOLUTIONS[type(old)](old.in_channels, old.out_channels, **geometry, **share)
    return new.train(old.training).requires_grad_(old.weight.requires_grad)


def _kernel(layer: nn.Module, like: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a layer's kernel; a linear layer's is widened by ones to the dimensions of `like`."""
    shape = tuple(layer.weight.shape)
    return shape + (1,) * (len(like) - len(shape)) if isinstance(layer, nn.Linear) else shape


def _in_channels(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _norm_of(net: nn.Module) -> str:
    batch = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    return "batch" if batch else "layer"


def _shared_label(label: str, sharing: Iterable[str]) -> str:
    """Drop what follows a shared part's name: with ("layer", "conv"), stage1_layer0_conv2 → stage1_layer_conv."""
    return "_".join(next((s for s in sharing if part.startswith(s)), part) for part in label.split("_"))


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _first_match(patterns: Mapping[str, str], name: str) -> str | None:
    return next((value for pattern, value in patterns.items() if re.fullmatch(pattern, name)), None)


def _check_patterns(field: str, patterns: Iterable[str], layers: Mapping[str, nn.Module]) -> None:
    for pattern in patterns:
        try:
            if not any(re.fullmatch(pattern, name) for name in layers):
                some = ", ".join(itertools.islice(layers, 3))
                raise ValueError(
                    f"{field}: {pattern!r} matches no layer; a pattern is a regular expression for the whole name, "
                    f"such as those of {some}"
                )
        except re.error as e:
            raise ValueError(f"{field}: {pattern!r} is not a regular expression: {e}") from e
