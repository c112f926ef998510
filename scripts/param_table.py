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
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
FAMILIES = ("resnet18", "resnet50", "mobilenetv2_050", "mobilenetv2_100", "convnext", "deit_tiny", "deit_small")


def rows() -> list[tuple[str, ...]]:
    """Return a row of figures for each configuration; the MACs of the static layers are measured on its static twin."""
    root = find_config("resnet18/resnet18").parent.parent
    table = []
    for family in FAMILIES:
        nets = {file: build_model(file) for file in root.glob(f"{family}/*.json")}
        counts = {file: sum(p.numel() for p in net.parameters()) for file, net in nets.items()}
        static_macs = None
        # The static network comes first, then the budgets as they rise.
        for file, net in sorted(nets.items(), key=lambda item: (bool(plans(item[1])), counts[item[0]])):
            if static_macs is None:
                static_macs = convolution_macs(net, read_config(file).model.input_size)
            mixing = f"{sum(plan.mixing_macs for plan in plans(net)) / 1e9:.3f}" if plans(net) else "–"
            published = PUBLISHED.get(file.stem, {"parameters": "–", "top1": "–"})
            ours, macs = f"{counts[file] / 1e6:.2f}", f"{static_macs / 1e9:.3f}"
            table.append((file.stem, ours, published["parameters"], macs, mixing, published["top1"]))
    return table


def convolution_macs(net: torch.nn.Module, side: int) -> int:
    """Multiply-accumulates of a static network for one image of that side."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.to("meta").eval()(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2


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
