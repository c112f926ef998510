"""The least time that a network could take on this machine, from what must be computed and read.

A layer with a weight takes, for a batch of B,

    max( t · (B · operations + shared) / rate,  4 bytes · t · values / bandwidth )

with the machine's measured rate of a large matrix product (multiply-adds a second, in the precision at hand) and its
measured bandwidth of reading. `operations` are multiply-adds for one sample, `shared` those for a whole batch, and
`values` the fp32 parameters that are read once a batch; activations and mixed kernels never leave the cache. t is 1 in
inference, where what a batch shares is kept from the one before and `shared` counts as 0. It is 3 in training: every
product has two in the backward pass, and parameters are read twice and their gradient is written.

A converted layer counts in the cheapest of three orders (|W| values of a kernel, P output positions, m mixtures in k
blocks of output channels, n cells of c × i channels, r values of the attention's hidden vector):

    kernels   mix, n · |W|, then convolve, P · |W|
    folded    the products of FC2 and the cells, r · n · |W|, are shared by the batch; a sample then mixes those, which
              are what is read, (r + 1) · |W|, and convolves, P · |W|
    inputs    mix inputs, n · i · P · m, then one product with the cells, k · n · c · i · P; no kernel exists

A warehouse is read once a batch: each layer pays for its own cells. Products without a weight, such as those of DeiT's
queries and keys, have operations only.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernelwarehouse import ConfigError, ModelConfig, build_model
from kernelwarehouse.models import DynamicLayer

from .clock import HALF, arithmetic

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Machine:
    """What a device can do at best.

    Attributes:
        products: Multiply-adds a second of a large matrix product, by precision.
        read: Bytes a second of reading memory.
        copy: Bytes a second of copying it, each counted once as read and once as written.
    """

    products: dict[str, float]
    read: float
    copy: float

    @classmethod
    def measure(cls, device: torch.device, precisions: Sequence[str]) -> "Machine":
        """Take the best of a few turns of each."""
        side = 2048 if device.type == "cpu" else 8192
        products = {}
        for precision in precisions:
            # What is stored in half precision can be multiplied in fp32, which is faster where fp16 is emulated.
            types = dict.fromkeys((HALF.get(precision, torch.float32), torch.float32))
            with arithmetic(precision):
                seconds = min(_product_seconds(side, dtype, device) for dtype in types)
            products[precision] = side**3 / seconds
        size = (1 << 28) if device.type == "cpu" else (1 << 31)
        source, target = torch.ones(2, size // 4, device=device)
        return cls(products, size / _best(source.sum), 2 * size / _best(lambda: target.copy_(source)))

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {2e-9 * rate:,.0f} GFLOP/s" for name, rate in self.products.items())
        return f"{rates} (matrix product), {1e-9 * self.read:.1f} GB/s (read), {1e-9 * self.copy:.1f} GB/s (copy)"


def _product_seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return _best(lambda: a @ b)


def _best(run: Callable[[], Tensor], turns: int = 4) -> float:
    """Seconds of the fastest turn; reading one value of the result waits for a GPU. A slow run has fewer turns."""
    seconds: list[float] = []
    while len(seconds) < turns and sum(seconds) < 2:
        start = time.perf_counter()
        run().view(-1)[0].item()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@dataclass(frozen=True)
class Work:
    """What one layer must do, in the terms of this file's formula."""

    operations: int
    values: int = 0
    shared: int = 0

    def seconds(self, batch: int, train: bool, rate: float, bandwidth: float) -> float:
        """Least time for a batch."""
        passes, shared = (3, self.shared) if train else (1, 0)
        return passes * max((batch * self.operations + shared) / rate, 4 * self.values / bandwidth)


class Floor:
    """The least time of a network.

    Args:
        config: The network.
        static: Its static twin, whose products without weights the network has too.

    Raises:
        ConfigError: Images of a size that the network cannot take.
    """

    def __init__(self, config: ModelConfig, static: ModelConfig):
        twin, operations = _layers(static)
        without_weights = operations - sum(work.operations for orders in twin for work in orders)
        layers = twin if config == static else _layers(config)[0]
        self.layers = [*layers, [Work(without_weights)]]

    def seconds(self, batch: int, train: bool, precision: str, machine: Machine) -> float:
        """Least time for a batch: of each layer its cheapest order."""
        rate = machine.products[precision]
        return sum(min(work.seconds(batch, train, rate, machine.read) for work in orders) for orders in self.layers)


def _layers(config: ModelConfig) -> tuple[list[list[Work]], int]:
    """The orders of work of each layer, and all multiply-adds as computed, noted while one image passes."""
    net = build_model(config).eval()
    layers: list[list[Work]] = []

    def note(layer: nn.Module, _: tuple[Tensor, ...], y: Tensor) -> None:
        if isinstance(layer, DynamicLayer):
            layers.append([Work(*order) for order in layer.orders(y)])
        else:
            values = sum(p.numel() for p in layer.parameters())
            layers.append([Work(layer.weight[0].numel() * y[0].numel(), values)])

    for module in net.modules():
        if isinstance(module, (DynamicLayer, *_LAYERS)):
            module.register_forward_hook(note)
    side = config.input_size
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, config.in_chans, side, side))
    except (AssertionError, RuntimeError, ValueError) as e:
        raise ConfigError(f"{config.model} cannot take images of {side}×{side}: {e}") from e
    return layers, counter.get_total_flops() // 2
