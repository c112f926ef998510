"""From the sites of a network to the plan: who is converted, who shares, and how large cells and shares are."""

import itertools
import math
from collections.abc import Iterable

from ...sites import Site, Sites
from ..patterns import check_patterns, first_match, matches
from ..placement import check_site
from .attention import parameter_count
from .config import KWConfig
from .labels import TABLES, Table, label_by_structure
from .partition import Partition, count_cells, share_cells
from .plan import KWLayerPlan, KWPlan, WarehousePlan


def make_plan(sites: Sites, config: KWConfig) -> KWPlan:
    """The plan for a network; see `Operator.plan`."""
    table = TABLES.get(sites.family or "")
    groups, left = _group(sites, table, config)
    for name in groups:
        if not name.isidentifier():
            raise ValueError(f"warehouse {name!r}: a name may hold letters, digits and underscores only")
    for site in itertools.chain.from_iterable(groups.values()):
        check_site(site)
    for field in ("cell_num_ratio", "cell_inplane_ratio", "cell_outplane_ratio", "nonlocal_basis_ratio"):
        value = getattr(config, field)
        if isinstance(value, tuple) and len(value) != len(groups):
            raise ValueError(f"{field} holds {len(value)} ratios, one for each of {len(groups)}: {', '.join(groups)}")
    norm = config.norm or (table.norm if table else "batch" if sites.batch_norm else "layer")
    order = {site.name: i for i, site in enumerate(sites)}
    planned: list[KWLayerPlan] = []
    warehouses = []
    for index, (warehouse, members) in enumerate(groups.items()):
        members = sorted(members, key=lambda site: order[site.name])
        plan, own = _plan_warehouse(warehouse, members, config, index, table.linear_dims if table else 1, norm)
        warehouses.append(plan)
        planned += own
    return KWPlan(
        operator=config.operator,
        config=config,
        layers=tuple(sorted(planned, key=lambda layer: order[layer.name])),
        parameters_before=sites.parameters,
        left=left,
        warehouses=tuple(warehouses),
        reduction=config.reduction,
        norm=norm,
        shared_parameters=sum(math.prod(w.shape) for w in warehouses),
    )


def _group(
    sites: Sites, table: Table | None, config: KWConfig
) -> tuple[dict[str, list[Site]], tuple[tuple[str, str], ...]]:
    """Warehouse → its layers, both in order of construction; and the layers that are left though they have a label."""
    names = [site.name for site in sites]
    if config.warehouses is not None:
        check_patterns("warehouses", config.warehouses, names)
        labels = [(s, w) for s in sites if (w := first_match(config.warehouses, s.name)) is not None]
        chosen = labels
    elif table is not None:
        labels = table.label(sites)
        chosen = [(s, label) for s, label in labels if label.split("_")[0] not in table.static]
    else:
        if config.sharing_range is not None:
            raise ValueError(
                f"sharing_range needs a table of labels, and {sites.network} has none: name the warehouses with "
                "the field `warehouses`, or leave sharing to the network's structure"
            )
        labels = chosen = label_by_structure(sites)
    if config.include is None and config.warehouses is None:
        left = tuple((s.name, s.foreign) for s in sites if s.foreign and s.role not in ("stem", "head", "unused"))
        chosen = [(s, label) for s, label in chosen if not s.foreign]
    else:
        left = ()
    if config.include is not None:
        check_patterns("include", config.include, names)
        chosen = [(s, label) for s, label in labels if matches(config.include, s.name)]
        labelled = {s.name for s, _ in labels}
        missing = [n for n in names if matches(config.include, n) and n not in labelled]
        if missing:
            raise ValueError(f"include names {missing[0]}, for which there is no warehouse: use the field `warehouses`")
    check_patterns("exclude", config.exclude, names)
    sharing = config.sharing_range
    if sharing is None:
        sharing = table.sharing_range if table and config.warehouses is None else ()
    groups: dict[str, list[Site]] = {}
    for site, label in chosen:
        if not matches(config.exclude, site.name):
            groups.setdefault(_shared_label(label, sharing), []).append(site)
    if not groups:
        raise ValueError(f"nothing to convert: include and exclude leave none of {len(names)} layers")
    return groups, tuple((name, reason) for name, reason in left if not matches(config.exclude, name))


def _plan_warehouse(
    warehouse: str, members: list[Site], config: KWConfig, index: int, linear_dims: int, norm: str
) -> tuple[WarehousePlan, list[KWLayerPlan]]:
    dims = {linear_dims if site.kind == "Linear" else len(site.kernel) - 2 for site in members}
    if len(dims) > 1:
        names = ", ".join(site.name for site in members)
        raise ValueError(f"warehouse {warehouse}: layers of {dims} dimensions cannot share: {names}")
    kernels = [site.kernel + (1,) * (2 + max(dims) - len(site.kernel)) for site in members]
    sizes = {kernel[2:] for kernel in kernels}
    if config.spatial_partition:
        space = (1,) * max(dims)
    elif len(sizes) == 1:
        space = next(iter(sizes))
    else:
        raise ValueError(f"warehouse {warehouse}: cells that span the kernel need one kernel size, found {sizes}")
    channels = [
        _cell_channels(warehouse, field, math.gcd(*(kernel[axis] for kernel in kernels)), config.ratio(field, index))
        for axis, field in enumerate(("cell_outplane_ratio", "cell_inplane_ratio"))
    ]
    cell = (*channels, *space)
    mixtures = [Partition(kernel, cell).mixtures for kernel in kernels]
    ratio = config.ratio("cell_num_ratio", index)
    cells = count_cells(sum(mixtures), ratio)
    if cells < len(members):
        least = math.ceil(len(members) / sum(mixtures) * 1e4) / 1e4
        raise ValueError(
            f"warehouse {warehouse}: cell_num_ratio {ratio:g} of {sum(mixtures)} mixtures makes {cells} cells, which "
            f"{len(members)} layers cannot share: every layer needs one of its own. Ratios from {least:g} work"
        )
    starts = [0, *itertools.accumulate(shares := share_cells(mixtures, cells))]
    basis_ratio = config.ratio("nonlocal_basis_ratio", index)
    layers = []
    for site, kernel, start, own, count in zip(members, kernels, starts, shares, mixtures, strict=False):
        attention = parameter_count(site.in_channels, cells, own, count, config.reduction, norm, basis_ratio)
        size = math.prod(kernel)
        decided = {"shares": (warehouse,), "start": start, "own_cells": own, "mixtures": count, "macs": size * cells}
        layers.append(KWLayerPlan.of(site, kernel=kernel, added=attention - size, **decided))
    return WarehousePlan(warehouse, cells, cell, basis_ratio), layers


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


def _shared_label(label: str, sharing: Iterable[str]) -> str:
    """Drop what follows a shared part's name: with ("layer", "conv"), stage1_layer0_conv2 → stage1_layer_conv."""
    return "_".join(next((s for s in sharing if part.startswith(s)), part) for part in label.split("_"))
