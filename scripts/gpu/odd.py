"""Small networks of odd sizes, of which every operator's layers are made."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from kernelwarehouse.models import convert_, dynamic_layers, get_operator, operator_names
from kernelwarehouse.models.tuning import Layer, distinct_layers

BATCH = 3


class Odd(NamedTuple):
    """A small static network.

    Attributes:
        build: Makes it.
        shape: Of an input, without the batch.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _residual() -> nn.Module:
    return timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(5, 10, 15, 20), num_classes=5)


def _tokens() -> nn.Module:
    arguments = {"embed_dim": 18, "depth": 1, "num_heads": 3, "img_size": 48, "num_classes": 5}
    return timm.create_model("deit_tiny_patch16_224", **arguments)


def _geometry() -> nn.Module:
    """Unequal strides and paddings, dilation, groups, depthwise, more channels than a tile has, a map of few pixels."""
    return nn.Sequential(
        nn.Conv2d(6, 10, (3, 5), (2, 1), (1, 2)),
        nn.ReLU(),
        nn.Conv2d(10, 14, 3, dilation=2, padding="same"),
        nn.ReLU(),
        nn.Conv2d(14, 14, 3, groups=7, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(14, 14, 7, groups=14, padding=3),
        nn.ReLU(),
        nn.Conv2d(14, 130, 1, (1, 2)),
        nn.ReLU(),
        nn.Conv2d(130, 22, (1, 3), (2, 3), bias=False),
    )


def _line() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(6, 10, 3, padding=1), nn.ReLU(), nn.Conv1d(10, 14, 5, 2, 2), nn.ReLU(), nn.Conv1d(14, 18, 1)
    )


def _layer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1))


NETWORKS = {
    "residual": Odd(_residual, (3, 35, 37)),
    "geometry": Odd(_geometry, (6, 13, 15)),
    "tokens": Odd(_tokens, (3, 48, 48)),
    "line": Odd(_line, (6, 19)),
    "layer": Odd(_layer, (3, 5, 7)),
}


def odd_layers(names: tuple[str, ...]) -> Iterator[tuple[str, Layer]]:
    """Layers of distinct shapes of every operator, in fp32 on the CPU, in training mode, with inputs and outputs.

    They are those of each network converted with the operator's default configuration; what an operator does not take
    is said, and so is an operator whose layers are computed in one way alone. Layers have no parameter that is zero.
    """
    for operator in operator_names():
        for name in names:
            torch.manual_seed(0)
            net, x = NETWORKS[name].build(), torch.randn(BATCH, *NETWORKS[name].shape)
            try:
                convert_(net, get_operator(operator).Config(), keep_weights=False, example_input=torch.empty_like(x))
            except ValueError as e:
                print(f"{operator}, {name}: {e}", flush=True)
                continue
            if not any(layer.candidates() for layer in dynamic_layers(net).values()):
                print(f"{operator}, {name}: its layers have no implementations to compare", flush=True)
                continue
            disturb(net)
            for layer in distinct_layers(net, x, training=True):
                layer.x = varied(layer.x.shape)
                yield f"{operator} {name} {layer.name}", layer


def varied(shape: torch.Size) -> Tensor:
    """Random values whose means differ from sample to sample and from channel to channel, wherever channels are.

    An attention that normalises over the batch would else be about rounding errors.
    """
    x = torch.randn(shape)
    for dimension in range(1, len(shape)):
        size = [n if i in (0, dimension) else 1 for i, n in enumerate(shape)]
        x += torch.randn(size)
    return x


@torch.no_grad()
def disturb(net: nn.Module) -> None:
    """Move every parameter from where it starts, so that no branch is silent."""
    for parameter in net.parameters():
        scale = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
        parameter.add_(torch.randn_like(parameter), alpha=0.1 + 0.3 * scale.nan_to_num().item())
