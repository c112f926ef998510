"""Warehouses for a network without a table: layers of one resolution and one kind share.

A layer is judged by the features that it reads, as the paper's tables do: a strided convolution belongs with the
layers before it. Layers share only where their channels nest (the smaller divide the larger), so that cells are as
large as the smallest kernel, and while their mixtures are few beside the size of a cell: the parameters of attention
grow with the square of the mixtures that share.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Labels = list[tuple[str, str]]


def label_by_structure(net: nn.Module, layers: Mapping[str, nn.Module], example_input: Tensor | None = None) -> Labels:
    """Label the layers that are converted by default.

    These are convolutions over more than one position, and linear layers over tokens; the first layer of all (its
    input is the image) and whatever runs on pooled features stay static.

    Args:
        net: Any network; it is run once on the meta device, without touching its weights, and left as it was.
        layers: Its convolutions and linear layers by name.
        example_input: An input of the network; only its shape and type are used. None tries timm's default input,
            then 256, 224×224 or 32×64×64 positions according to the first convolution.

    Returns:
        (name, warehouse) in the order of execution.

    Raises:
        ValueError: The network does not run on such an input, or nothing is left to convert.
    """
    shapes = _input_shapes(net, layers, _example(net, layers) if example_input is None else example_input)
    first = next(iter(shapes), None)
    labels: Labels = []
    groups: dict[str, list[_Group]] = {}
    for name, shape in shapes.items():
        layer = layers[name]
        linear = isinstance(layer, nn.Linear)
        positions = shape[1:-1] if linear else shape[2:]
        if name == first or math.prod(positions) <= 1:
            continue
        key = f"r{'x'.join(map(str, positions))}_{_kind(layer)}"
        labels.append((name, _join(groups.setdefault(key, []), key, tuple(layer.weight.shape))))
    if not labels:
        raise ValueError("no layer of the network reads more than one position; choose layers with `include`")
    return labels


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    if layer.groups == 1:
        return "conv"
    return "dwconv" if layer.groups == layer.in_channels else "gconv"


@dataclass
class _Group:
    """Layers that share: the channels of a cell, and the elements of all kernels."""

    name: str
    cout: int
    cin: int
    elements: int


def _join(groups: list[_Group], key: str, kernel: tuple[int, ...]) -> str:
    """Return the name of the first group that the kernel fits into, or of a new one."""
    cout, cin = kernel[:2]
    elements = math.prod(kernel)
    for group in groups:
        cell = math.gcd(cout, group.cout), math.gcd(cin, group.cin)
        nested = cell == (min(cout, group.cout), min(cin, group.cin))
        mixtures = (group.elements + elements) // math.prod(cell)
        if nested and mixtures <= max(64, math.prod(cell) // 16):
            group.cout, group.cin = cell
            group.elements += elements
            return group.name
    name = key if not groups else f"{key}_{len(groups) + 1}"
    groups.append(_Group(name, cout, cin, elements))
    return name


def _example(net: nn.Module, layers: Mapping[str, nn.Module]) -> Tensor:
    cfg = getattr(net, "default_cfg", None)
    first = next(iter(layers.values()))
    if isinstance(cfg, Mapping) and "input_size" in cfg and len(cfg["input_size"]) == 3:
        channels = getattr(first, "in_channels", cfg["input_size"][0])
        size = (channels, *cfg["input_size"][1:])
    elif isinstance(first, nn.Linear):
        raise ValueError("the network's input cannot be guessed; pass example_input")
    else:
        sizes = {1: (256,), 2: (224, 224), 3: (32, 64, 64)}
        size = (first.in_channels, *sizes[first.weight.ndim - 2])
    return torch.empty(2, *size, dtype=first.weight.dtype, device="meta")


def _input_shapes(net: nn.Module, layers: Mapping[str, nn.Module], example: Tensor) -> dict[str, tuple[int, ...]]:
    """Shape of each layer's input, in the order in which the layers run."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: shapes.setdefault(name, tuple(args[0].shape)) and None
        )
        for name, layer in layers.items()
    ]
    modes = {module: module.training for module in net.modules()}
    state = {name: t.to("meta") for group in (net.named_parameters, net.named_buffers) for name, t in group()}
    try:
        net.eval()
        with torch.no_grad():
            torch.func.functional_call(net, state, (example.to("meta"),))
    except Exception as e:
        shape = tuple(example.shape)
        raise ValueError(
            f"the network has no table, and does not run on an input of shape {shape} ({e}); pass example_input, or "
            "name the warehouses yourself with the field `warehouses`"
        ) from e
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return shapes
