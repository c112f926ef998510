"""Time a converted network beside its static twin, as upstream computes it and as we do, interleaved in one process.

    python scripts/benchmark.py --model configs/resnet18/kw1x_resnet18.json --batch 1 8 --mode infer train

"upstream" mixes kernels, puts them in order, and runs one grouped convolution (a batched product where the kernel is
1×1). The static network is taken in the faster of its two memory layouts. Outputs and gradients of ours and upstream's
are compared first, in float64; nothing is printed if they differ.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelwarehouse import build_model, set_implementation
from kernelwarehouse.schema import load_config

TOLERANCE = 1e-9


def check_parity(net: nn.Module, x: Tensor) -> float:
    """Return the largest relative difference of outputs and gradients between the two, in float64.

    Raises:
        SystemExit: It is above `TOLERANCE`.
    """
    results = []
    net = net.double().train()
    for implementation in ("grouped", "auto"):
        torch.manual_seed(0)  # drop path draws the same
        set_implementation(net, implementation)
        y = net(x.double())
        results.append([y, *torch.autograd.grad(y.square().sum(), list(net.parameters()), allow_unused=True)])
    pairs = [(a, b) for a, b in zip(*results, strict=True) if a is not None]
    floor = 1e-6 * max(a.norm().item() for a, _ in pairs)  # below it a gradient is rounding errors only
    worst = max(((a - b).norm() / a.norm().clamp_min(floor)).item() for a, b in pairs)
    if worst > TOLERANCE:
        raise SystemExit(f"error: the two orders differ by {worst:.1e}; no figure is printed")
    net.float()
    return worst


def step(net: nn.Module, x: Tensor, train: bool) -> Callable[[], None]:
    """Return a function that runs `net` on x once: inference, or forward and backward."""

    def infer() -> None:
        with torch.inference_mode():
            net(x)

    def forward_backward() -> None:
        net.zero_grad()
        y = net(x)
        F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long, device=y.device)).backward()

    net.train(train)
    return forward_backward if train else infer


def measure(steps: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each round; a round runs every step once, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, run in steps.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Print a table with one row for each mode and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="configuration of a converted network")
    parser.add_argument("--static", help="configuration of its static twin; default: the same without the kw prefix")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--mode", nargs="+", default=["infer", "train"], choices=("infer", "train"))
    parser.add_argument("--size", type=int, help="side of the image; default: the configuration's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the seconds of every round there")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    config = load_config(arguments.model).model
    net = build_model(config).to(device)
    static_source = arguments.static or {"model": config.model.split("_", 1)[1]}
    overrides = {} if arguments.static else {"nb_classes": config.nb_classes, "in_chans": config.in_chans}
    if not arguments.static and config.model_kwargs:
        overrides["model_kwargs"] = config.model_kwargs
    size = arguments.size or config.input_size
    difference = check_parity(net, torch.randn(2, config.in_chans, max(size, 64), max(size, 64), device=device))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.model} at {size}×{size}, {where}, torch {torch.__version__}; parity {difference:.0e}")
    print(f"{'mode':6}{'batch':>6}{'static':>20}{'upstream':>20}{'ours':>20}{'upstream/static':>17}{'ours/static':>13}")
    kept = []
    for mode in arguments.mode:
        for batch in arguments.batch:
            x = torch.randn(batch, config.in_chans, size, size, device=device)
            steps = {}
            for layout in ("contiguous_format", "channels_last"):
                static = build_model(static_source, **overrides).to(device, memory_format=getattr(torch, layout))
                images = x.to(memory_format=getattr(torch, layout))
                steps[f"static {layout}"] = step(static, images, mode == "train")
            for name, implementation in (("upstream", "grouped"), ("ours", "auto")):
                run = step(net, x, mode == "train")
                steps[name] = lambda run=run, name=implementation: (set_implementation(net, name), run())[1]
            try:
                seconds = measure(steps, arguments.rounds, device)
            except ValueError as e:  # BatchNorm refuses a single value per channel
                raise SystemExit(f"error: {mode} with batches of {batch}: {e}") from e
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            layout = min((n for n in medians if n.startswith("static")), key=medians.__getitem__)
            cells = [_time(seconds[n]) for n in (layout, "upstream", "ours")]
            ratios = [medians[n] / medians[layout] for n in ("upstream", "ours")]
            print(f"{mode:6}{batch:>6}" + "".join(f"{c:>20}" for c in cells) + f"{ratios[0]:>17.2f}{ratios[1]:>13.2f}")
            kept.append({"mode": mode, "batch": batch, "size": size, "device": where, "seconds": seconds})
    if arguments.json:
        arguments.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _time(seconds: list[float]) -> str:
    """Median and half the range, in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:.1f} ± {(max(seconds) - min(seconds)) * 5e2:.1f} ms"


if __name__ == "__main__":
    main()
