"""Whether networks compute the same, which is asked before they are timed."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from kernelwarehouse import set_implementation

TOLERANCE = 1e-9


def check_parity(net: nn.Module, x: Tensor, implementations: Sequence[str] = ("auto",)) -> float:
    """Return the largest relative difference of outputs and gradients from upstream's formulation, in float64.

    Raises:
        SystemExit: It is above `TOLERANCE`, and not explained by how much the network answers to a rounding error.
    """
    net, x = net.double().train(), x.double()

    def results(implementation: str, x: Tensor) -> list[Tensor | None]:
        torch.manual_seed(0)  # drop path draws the same
        set_implementation(net, implementation, otherwise="auto")
        y = net(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(net.parameters()), allow_unused=True)]

    truth = results("grouped", x)
    floor = 1e-6 * max(a.norm().item() for a in truth if a is not None)  # below it a gradient is rounding errors only

    def difference(found: Sequence[Tensor | None]) -> float:
        pairs = [(a, b) for a, b in zip(truth, found, strict=True) if a is not None]
        return torch.stack([(a - b).norm() / a.norm().clamp_min(floor) for a, b in pairs]).max().item()

    # BatchNorm over few values makes much of little: in a MobileNetV2 at 64×64, 1e-8 of one rounding error.
    answer = difference(results("grouped", _misrounded(x)))
    worst = max(difference(results(name, x)) for name in implementations)
    set_implementation(net, "auto")
    net.float()
    return _within_tolerance(worst, answer)


@torch.no_grad()
def check_outputs(net: nn.Module, x: Tensor, others: Iterable[Callable[[Tensor], Tensor]]) -> float:
    """Return the largest relative difference of what others make of x from what the network does.

    Args:
        net: The network; an item of `others` may change it in place when it is asked for.
        x: Images in float64.
        others: Taken one after the other, when the network has been asked.

    Raises:
        SystemExit: As `check_parity`.
    """
    y = net(x)

    def difference(z: Tensor) -> float:
        return ((z - y).norm() / y.norm()).item()

    answer = difference(net(_misrounded(x)))
    return max(_within_tolerance(difference(other(x)), answer) for other in others)


def _misrounded(x: Tensor) -> Tensor:
    return x * (1 + torch.finfo(x.dtype).eps * torch.randn_like(x))


def _within_tolerance(difference: float, answer: float) -> float:
    """The difference, of a network whose results change by `answer` with one rounding error of its input."""
    if not difference <= TOLERANCE + 20 * answer:
        raise SystemExit(f"error: the two orders differ by {difference:.1e}; no figure is printed")
    return difference
