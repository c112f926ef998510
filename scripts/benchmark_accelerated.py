"""Times a network of another library beside itself with its dynamic layers computed by this package (`accelerate_`).

    python scripts/benchmark_accelerated.py --model tf_efficientnet_cc_b0_4e --batch 1 8 --size 224

Both are timed in turns, in both memory layouts, in inference and in training, after their outputs and gradients were
compared in float64; if those differ, nothing is printed.
"""

import argparse
import copy
import statistics

import timm
import torch
from torch import Tensor, nn

from kernelwarehouse import accelerate_
from kernelwarehouse.models.tuning import measure

LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_cc_b0_4e", help="a name of timm's")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    theirs = timm.create_model(arguments.model)
    ours = accelerate_(copy.deepcopy(theirs))
    print(f"{arguments.model}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds")
    print(f"greatest difference in float64, relative: {parity(theirs, ours):.0e}")
    rows = []
    for batch in arguments.batch:
        for training in (False, True):
            x = torch.randn(batch, 3, arguments.size, arguments.size)
            rows.append(row(theirs, ours, x, training, arguments.rounds))
    head = ["batch", "mode", "timm (ms)", "layout", "ours (ms)", "layout", "ours / timm, pair by pair"]
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")


def row(theirs: nn.Module, ours: nn.Module, x: Tensor, training: bool, rounds: int) -> tuple[str, ...]:
    """A row of the table: medians in the faster layout of each, and the median ratio of rounds in these layouts."""
    seconds = {}
    for layout, memory_format in LAYOUTS.items():
        images = x.to(memory_format=memory_format)
        steps = {}
        for name, net in (("theirs", theirs), ("ours", ours)):
            steps[name] = step(copy.deepcopy(net).to(memory_format=memory_format), images, training)
        for name, found in measure(steps, rounds, x.device).items():
            seconds[name, layout] = found
    cells, best = [], {}
    for name in ("theirs", "ours"):
        layout = min(LAYOUTS, key=lambda layout: statistics.median(seconds[name, layout]))
        best[name] = seconds[name, layout]
        cells += [f"{statistics.median(best[name]) * 1e3:.1f}", layout]
    ratio = statistics.median([a / b for a, b in zip(best["ours"], best["theirs"], strict=True)])
    return str(len(x)), "training" if training else "inference", *cells, f"{ratio:.2f}"


def step(net: nn.Module, x: Tensor, training: bool):
    """A function that runs a batch forward, and in training backward."""
    net.train(training)

    def infer() -> None:
        with torch.inference_mode():
            net(x)

    def train() -> None:
        net.zero_grad()
        net(x).square().mean().backward()

    return train if training else infer


def parity(theirs: nn.Module, ours: nn.Module) -> float:
    """The greatest relative difference of outputs and gradients in float64.

    Raises:
        SystemExit: They differ by more than rounding.
    """
    results = []
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for net in (theirs, ours):
        net = copy.deepcopy(net).double().eval()
        y = net(x)
        gradients = torch.autograd.grad(y.square().mean() / y.detach().square().mean(), list(net.parameters()))
        results.append([y.detach(), *gradients])
    norms = [(a - b).norm().item() / max(a.norm().item(), 1e-300) for a, b in zip(*results, strict=True)]
    if not max(norms) < 1e-6:
        raise SystemExit(f"outputs or gradients differ by {max(norms):.0e}, relative: nothing is timed")
    return max(norms)


if __name__ == "__main__":
    main()
