"""Draw a converted network's attention over its warehouses: show_attention.py CHECKPOINT IMAGE [IMAGE ...].

One heat map for each warehouse: a row for each mixture, grouped by layer, a column for each cell, and the mean of the
coefficient over the images as colour. A box surrounds the cells that belong to a layer, a dot marks the cell that a
mixture was assigned at the start of training. Beside it: how much each layer's coefficients change between the images.
The network is built from the configuration in the checkpoint, at the temperature at which that was saved.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from kernelwarehouse.configs.schema import Config, ConfigError
from kernelwarehouse.datasets import eval_transform
from kernelwarehouse.engine import check_picture
from kernelwarehouse.models import (
    CheckpointError,
    build_model,
    dynamic_layers,
    load_content,
    plans,
    read_checkpoint,
    read_config,
)

# Assignments are marked up to so many mixtures in a heat map, beyond which the dots would cover it.
MARKED = 400


@dataclass(frozen=True)
class LayerAttention:
    """The coefficients of one layer.

    Attributes:
        name: The layer's name in the network.
        warehouse: Its warehouse.
        own_cells: The range of that warehouse's cells that belongs to it.
        assignment: β, (m, n).
        coefficients: α for each image, (B, m, n).
    """

    name: str
    warehouse: str
    own_cells: range
    assignment: Tensor
    coefficients: Tensor

    @property
    def change(self) -> float:
        """How much α changes between images: its mean standard deviation over them, per mean absolute value."""
        deviation = self.coefficients.std(dim=0, correction=0).mean()
        return (deviation / self.coefficients.abs().mean().clamp(min=1e-12)).item()


def load(checkpoint: Path, key: str | None) -> tuple[nn.Module, Config]:
    """Return the network of a checkpoint of ours, for evaluation, and the configuration that it was trained by.

    Raises:
        CheckpointError: It cannot be read, holds no configuration, or a static network.
    """
    content = read_checkpoint(checkpoint)
    if not isinstance(content.get("config"), dict):
        raise CheckpointError(f"{checkpoint}: holds no configuration; checkpoints of main.py do")
    config = read_config(content["config"])
    model = build_model(config.model, pretrained=False)
    load_content(model, content, key, source=str(checkpoint))
    if not any(hasattr(layer, "attention") for layer in dynamic_layers(model).values()):
        raise CheckpointError(f"{checkpoint}: {config.model.model} has no attention over what layers share")
    return model.eval(), config


def read_images(paths: Sequence[Path], config: Config) -> Tensor:
    """Return the images as evaluation sees them, (B, C, H, W)."""
    transform, images = eval_transform(config), []
    for path in paths:
        try:
            image = Image.open(path)
            image.load()
        except OSError as e:
            raise ConfigError(f"{path}: not an image that can be read: {e}") from e
        # The digits are kept as tensors of one channel in [0, 1], not as pictures.
        images.append(transform(pil_to_tensor(image.convert("L")) / 255 if config.run.data_set == "DIGITS" else image))
    return torch.stack(images)


@torch.inference_mode()
def collect(model: nn.Module, images: Tensor) -> list[LayerAttention]:
    """Return the attention of each converted layer to the images, in the order of the network's modules."""
    found: dict[str, Tensor] = {}
    shared = {layer.name: " ".join(layer.shares) for plan in plans(model) for layer in plan.layers}
    attentions = {name: layer.attention for name, layer in dynamic_layers(model).items() if hasattr(layer, "attention")}
    hooks = [
        attention.register_forward_hook(lambda _module, _input, output, name=name: found.update({name: output}))
        for name, attention in attentions.items()
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return [
        LayerAttention(name, shared[name], a.own_cells, a.assignment, found[name]) for name, a in attentions.items()
    ]


def draw(layers: Sequence[LayerAttention]) -> Figure:
    """Draw a heat map for each warehouse, and the change of each of its layers beside it."""
    warehouses = list(dict.fromkeys(layer.warehouse for layer in layers))
    groups = [[layer for layer in layers if layer.warehouse == name] for name in warehouses]
    heights = [max(1.6, 0.4 * len(group)) + 0.9 for group in groups]
    figure = Figure(figsize=(14, sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(groups), 2, width_ratios=(4, 1), height_ratios=heights, squeeze=False)
    # The few coefficients beyond this share take the ends of the scale, so that the many others keep their colours.
    values = torch.cat([layer.coefficients.mean(dim=0).abs().flatten() for layer in layers])
    norm = CenteredNorm(halfrange=np.quantile(values.numpy(), 0.995))
    furthest = max(layer.change for layer in layers)
    for (heat, bars), name, group in zip(axes, warehouses, groups, strict=True):
        drawn = _draw_warehouse(heat, name, group, norm)
        bars.barh([layer.name for layer in group], [layer.change for layer in group], color="tab:gray")
        bars.invert_yaxis()
        bars.set(xlim=(0, 1.25 * furthest or 1))
        bars.set_yticks([])
        bars.bar_label(bars.containers[0], fmt="%.2f", padding=3)
    figure.colorbar(drawn, ax=axes[:, 0].tolist(), label="α, mean over the images", aspect=40, extend="both")
    axes[0, 1].set_title("change between images")
    axes[-1, 0].set_xlabel("cell of the warehouse")
    axes[-1, 1].set_xlabel("standard deviation / mean |α|")
    return figure


def _draw_warehouse(axis: Axes, name: str, layers: Sequence[LayerAttention], norm: CenteredNorm) -> object:
    """Draw the heat map of a warehouse; return what a colour bar needs."""
    means = torch.cat([layer.coefficients.mean(dim=0) for layer in layers])
    drawn = axis.imshow(means, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    edges = np.cumsum([0, *(len(layer.assignment) for layer in layers)]) - 0.5
    for top, bottom, layer in zip(edges, edges[1:], layers, strict=False):
        own = layer.own_cells
        box = (own.start - 0.5, top), len(own), bottom - top
        axis.add_patch(Rectangle(*box, fill=False, edgecolor="black", linewidth=1.2))
        if len(means) <= MARKED:
            mixtures, cells = layer.assignment.nonzero(as_tuple=True)
            axis.scatter(cells, mixtures + top + 0.5, s=3, color="black", linewidths=0)
    for edge in edges[1:-1]:
        axis.axhline(edge, color="gray", linewidth=0.6)
    axis.set_yticks((edges[1:] + edges[:-1]) / 2, [layer.name for layer in layers])
    axis.tick_params(axis="y", length=0)
    axis.set_title(f"{name}: {means.shape[0]} mixtures × {means.shape[1]} cells", loc="left")
    return drawn


def main() -> int:
    """Run the command line; return 0, or 2 for a file that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--output", type=Path, default=Path("attention.png"), metavar="FILE", help="picture to write")
    parser.add_argument(
        "--model_key",
        metavar="KEY",
        help="model, or model_ema for the average; default: what the file was kept for, else the model",
    )
    arguments = parser.parse_args()
    try:
        check_picture("--output", arguments.output)
        model, config = load(arguments.checkpoint, arguments.model_key)
        layers = collect(model, read_images(arguments.images, config))
    except (ConfigError, CheckpointError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    draw(layers).savefig(arguments.output, dpi=110)
    print(f"attention of {len(layers)} layers to {len(arguments.images)} images: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
