"""Stage 3: every implementation in every distinct layer of networks, against the static layer and the least time.

A row is a layer, a batch and a mode: forward, or forward and backward. It has the time of the static network's layer of
that name (cuDNN's on a GPU), of every implementation ("grouped" is upstream's formulation, a group for each sample),
and the floor by operations and bytes (`timing.floor`). Rows come in the order of their worth, which is the time that
all layers of such a shape must take in their network at least. A time is that of one of many steps in a row.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from timing.clock import arithmetic, autocast
from timing.floor import Machine, Work
from timing.networks import LAYOUTS, Pair
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kernelwarehouse.models import build_model
from kernelwarehouse.models.tuning import Layer, distinct_layers, step

from .cases import Case
from .journal import Record
from .machine import known
from .scope import Scope
from .stopwatch import median_seconds

STAGE = "layers"
COMPILATION = "compilation"
STATIC = "static"
UPSTREAM = "grouped"
_LAYOUT = "NHWC"
SECONDS = 3.0  # for a row: what has not begun by then is left out


@dataclass(frozen=True)
class Row:
    """What is timed.

    Attributes:
        name: Network, layer, mode and batch.
        network: The configuration.
        layer: The converted layer, its input and output.
        static: The static network's layer of that name, if it has one.
        floor: Least seconds of the converted layer.
        static_floor: Least seconds of the static one, if there is one.
    """

    name: str
    network: str
    layer: Layer
    static: nn.Module | None
    floor: float
    static_floor: float | None

    @property
    def worth(self) -> float:
        """Seconds that layers of this shape take in their network at least."""
        return self.layer.count * self.floor

    def steps(self) -> dict[str, Callable[[], object]]:
        """The static layer, upstream's formulation, Triton's kernels, then all others that can be tried."""
        layer = self.layer
        found: dict[str, Callable[[], object]] = {}
        if self.static is not None:
            parameters = {"parameters": list(self.static.parameters())}
            found[STATIC] = step(self.static.forward, layer.x, layer.y, parameters, layer.training)
        names = sorted(
            layer.candidates, key=lambda name: (name != UPSTREAM, layer.candidates[name].operators != "triton")
        )
        return found | {name: layer.step(name) for name in names if layer.can_try(name)}

    def time(self, scope: Scope) -> Record:
        """Time all that begins within `SECONDS`."""
        start, seconds, left_out = time.monotonic(), {}, {}
        with arithmetic(_product_precision(scope.precision)), autocast(scope.precision, scope.device):
            for name, run in self.steps().items():
                if time.monotonic() - start > SECONDS:
                    left_out[name] = "no time was left"
                    continue
                try:
                    run()
                    seconds |= median_seconds({name: run}, scope.device)
                except (RuntimeError, ValueError) as e:
                    if scope.device.type == "cuda":
                        torch.cuda.synchronize()  # raises if the GPU answers nothing any more
                    left_out[name] = f"{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}"
        return {**self.about(), "precision": scope.precision, "seconds": seconds, "left_out": left_out}

    def compile(self, name: str, scope: Scope) -> Record:
        """Run one implementation once."""
        start = time.monotonic()
        with arithmetic(_product_precision(scope.precision)), autocast(scope.precision, scope.device):
            self.layer.step(name)()
        return {"seconds": time.monotonic() - start}

    def about(self) -> Record:
        """What is known of the row before it is timed."""
        layer = self.layer
        return {
            "network": self.network,
            "layer": layer.name,
            "count": layer.count,
            "mode": "train" if layer.training else "infer",
            "batch": len(layer.x),
            "input": list(layer.x.shape),
            "output": list(layer.y.shape),
            "estimated": layer.estimated(),
            "floor": self.floor,
            "static_floor": self.static_floor,
        }


def _product_precision(precision: str) -> str:
    """Products of fp32 that remain under autocast may be rounded to TF32."""
    return "fp32" if precision == "fp32" else "tf32"


def find_rows(config: str, scope: Scope, batch: int, training: bool, machine: Machine) -> Iterator[Row]:
    """The rows of a network, in the order of its layers."""
    pair = Pair.read(config, side=scope.side)
    net, static_net = _networks(config, scope)
    side = pair.converted.input_size
    x = torch.randn(batch, pair.converted.in_chans, side, side, device=scope.device)
    x = x.contiguous(memory_format=LAYOUTS[_LAYOUT])
    rate = machine.products.get(scope.precision, machine.products["fp32"])
    with autocast(scope.precision, scope.device):
        layers = distinct_layers(net, x, training)
    statics = dict(static_net.named_modules())
    for layer in layers:
        static, static_floor = statics.get(layer.name), None
        if static is not None:
            work = Work(_operations(static, layer.x), sum(p.numel() for p in static.parameters()))
            static_floor = work.seconds(batch, training, rate, machine.read)
        works = [Work(*order) for order in layer.module.orders(layer.y[:1])]
        floor = min(work.seconds(batch, training, rate, machine.read) for work in works)
        mode = "train" if training else "infer"
        yield Row(f"{config} {layer.name} {mode} {batch}", config, layer, static, floor, static_floor)


@functools.cache
def _networks(config: str, scope: Scope) -> list[nn.Module]:
    """The converted network and the static one, on the device."""
    pair = Pair.read(config, side=scope.side)
    torch.manual_seed(0)
    networks = (build_model(c).eval() for c in (pair.converted, pair.static))
    return [net.to(scope.device, memory_format=LAYOUTS[_LAYOUT]) for net in networks]


@torch.no_grad()
def _operations(static: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of one sample."""
    with FlopCounterMode(display=False) as counter:
        static(x[:1].detach().float())
    return counter.get_total_flops() // 2


def rows(scope: Scope, records: Sequence[Record]) -> Iterator[Row]:
    """All rows, those of the first batch before the others, and of each batch by worth."""
    machine = known(scope, records)
    for batch in scope.layer_batches:
        found = [
            row
            for config in scope.layers
            for training in (False, True)
            for row in find_rows(config, scope, batch, training, machine)
        ]
        yield from sorted(found, key=lambda row: -row.worth)


def cases(scope: Scope, records: Sequence[Record]) -> Iterator[Case]:
    """A case for each row."""
    for row in rows(scope, records):
        yield Case(row.name, functools.partial(row.time, scope))


def compilation_cases(scope: Scope, records: Sequence[Record]) -> Iterator[Case]:
    """The rows' steps by Triton's kernels, which Triton then keeps compiled on disk; several processes share them."""
    for row in rows(scope, records):
        for name, implementation in row.layer.candidates.items():
            if implementation.operators == "triton" and row.layer.can_try(name):
                yield Case(f"{row.name} {name}", functools.partial(row.compile, name, scope))
