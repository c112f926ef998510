"""Print, for every ImageNet configuration, parameters (ours and published), MACs an image, and published accuracy."""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from kernelwarehouse import build_model, plans
from kernelwarehouse.configs.schema import find_config
from kernelwarehouse.models import read_config

# Published by the authors on ImageNet: parameters in millions, top-1 in percent. DeiT has no published table of ours.
PUBLISHED = {
    "resnet18": ("11.69", "70.44"),
    "kw1d4x_resnet18": ("4.08", "72.73"),
    "kw1d2x_resnet18": ("7.43", "73.33"),
    "kw1x_resnet18": ("11.93", "74.77"),
    "kw2x_resnet18": ("23.24", "75.19"),
    "kw4x_resnet18": ("45.86", "76.05"),
    "resnet50": ("25.56", "78.44"),
    "kw1d2x_resnet50": ("17.64", "79.30"),
    "kw1x_resnet50": ("28.05", "80.38"),
    "kw4x_resnet50": ("102.02", "81.05"),
    "mobilenetv2_050": ("1.97", "64.32"),
    "kw1d2x_mobilenetv2_050": ("1.47", "65.20"),
    "kw1x_mobilenetv2_050": ("2.85", "68.29"),
    "kw4x_mobilenetv2_050": ("4.65", "70.26"),
    "mobilenetv2_100": ("3.50", "72.04"),
    "kw1d2x_mobilenetv2_100": ("2.65", "72.59"),
    "kw1x_mobilenetv2_100": ("5.17", "74.68"),
    "kw4x_mobilenetv2_100": ("11.38", "75.92"),
    "convnext_tiny": ("28.59", "82.07"),
    "kw1x_convnext_tiny": ("39.37", "82.51"),
}
FAMILIES = ("resnet18", "resnet50", "mobilenetv2_050", "mobilenetv2_100", "convnext", "deit_tiny", "deit_small")


def rows() -> list[tuple[str, ...]]:
    """Return a row of figures for each configuration; the MACs of the static layers are measured on its static twin."""
    root = find_config("resnet18/resnet18").parent.parent
    table = []
    for family in FAMILIES:
        static_macs = None
        files = sorted(root.glob(f"{family}/*.json"), key=lambda file: _budget(file.stem))
        for file in files:
            net = build_model(file)
            if static_macs is None:
                static_macs = convolution_macs(net, read_config(file).model.input_size)
            mixing = f"{sum(plan.mixing_macs for plan in plans(net)) / 1e9:.3f}" if plans(net) else "–"
            parameters = sum(p.numel() for p in net.parameters()) / 1e6
            published = PUBLISHED.get(file.stem, ("–", "–"))
            table.append(
                (file.stem, f"{parameters:.2f}", published[0], f"{static_macs / 1e9:.3f}", mixing, published[1])
            )
    return table


def convolution_macs(net: torch.nn.Module, side: int) -> int:
    """Multiply-accumulates of a static network for one image of that side."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.to("meta").eval()(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2


def _budget(name: str) -> float:
    """The budget in a configuration's name: kw1d2x is ½; static networks come first."""
    if not name.startswith("kw"):
        return 0.0
    numerator, _, denominator = name[2 : name.index("x")].partition("d")
    return float(numerator) / float(denominator or 1)


def main() -> None:
    """Print the table as Markdown, or as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    header = ("configuration", "params (M)", "published (M)", "conv MACs (G)", "mixing MACs (G)", "top-1 published (%)")
    table = rows()
    for row in (header, ("---", *("---:",) * (len(header) - 1)), *table):
        print("| " + " | ".join(row) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps([dict(zip(header, row, strict=True)) for row in table], indent=2) + "\n")


if __name__ == "__main__":
    main()
