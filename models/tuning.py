"""Implementations by measurement: each is timed in every layer of a network, and "auto" takes the fastest from then on.

What "auto" takes otherwise is estimated, with factors of the processors that they were measured on (`cost.py`). On
another processor, and on a GPU above all, measuring is better. Every implementation's results are compared first.
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .ops.kernel_warehouse import KWLayer, supports
from .ops.kernel_warehouse.layer import NAMES
from .ops.kernel_warehouse.mixed_conv import choose, computing_type
from .ops.kernel_warehouse.tuned import remember, remembered, tuned
from .ops.native import can_run

MOST_BYTES = 1 << 30  # kernels, mixed inputs or products beyond it are not tried
_FASTER = 0.97  # of the time of what is estimated to be fastest: anything nearer is the clock's
_ROUNDING = 2  # times the root of what a type rounds by: results that differ by more are wrong
_NEAR = 1.5  # times the least time of the first round: anything beyond is not timed again

Results = dict[str, list[Tensor | None]]  # outputs, and gradients of each kind


@dataclass
class Layer:
    """Converted layers of one shape in a network.

    Attributes:
        name: Of the first of them.
        module: A copy of it, of the network's cells.
        x: Its input, which requires a gradient if it does in the network.
        y: Its output.
        dtype: What it computes in.
        count: How many there are.
        training: Whether they are to be timed in training, forward and backward.
        seconds: By implementation, once they are.
        taken: The fastest of them by `tune`, "auto" where that is what is estimated.
    """

    name: str
    module: KWLayer
    x: Tensor
    y: Tensor
    dtype: torch.dtype
    training: bool
    count: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    taken: str = "auto"

    @property
    def images(self) -> Tensor:
        """The input as the convolution sees it, (B, Cin, *spatial)."""
        return self.module.as_images(self.x)

    @property
    def positions(self) -> int:
        """P, the output positions of one sample."""
        return self.y[0].numel() // self.module.partition.kernel[0]

    def estimated(self) -> str:
        """The implementation that should be the fastest."""
        module, images = self.module, self.images.to(self.dtype)
        hidden = module.attention.fc1.out_features
        with torch.set_grad_enabled(self.training):
            return choose(module.partition, module.geometry, len(module.cells), images, hidden)

    def can_try(self, name: str) -> bool:
        """Whether an implementation, or "folded", exists for the layer, and writes no more than `MOST_BYTES`."""
        if name == "native" and not can_run(self.x.device.type, self.dtype):
            return False
        partition, batch, n = self.module.partition, len(self.x), len(self.module.cells)
        kernel = math.prod(partition.kernel)
        written = {
            "streamed": 0,
            "native": 0,
            "chained": 2 * (self.module.attention.fc1.out_features + 2) * kernel,
            "folded": (self.module.attention.fc1.out_features + 1) * kernel,
            "inputs": batch * partition.grid[-2] * n * math.prod(partition.cell[1:]) * self.positions,
        }.get(name, batch * kernel)
        fits = written * self.x.element_size() <= MOST_BYTES
        return fits and supports("streamed" if name == "folded" else name, partition, self.module.geometry)

    def step(self, implementation: str) -> Callable[[], Results]:
        """What computes the layer in one way: see the function `step`."""
        module = self.module

        def forward(x: Tensor) -> Tensor:
            module.implementation = implementation
            return module.forward(x)  # without hooks, whose owner does not expect the calls

        learned = {"the cells": [module.cells], "parameters": list(module.parameters())}
        return step(forward, self.x, self.y, learned, self.training)


def implementations(device: torch.device) -> tuple[str, ...]:
    """Those that are worth timing on a device."""
    return tuple(name for name in NAMES if name != "naive" and (name != "fused" or device.type == "cuda"))


def distinct_layers(model: nn.Module, x: Tensor, training: bool) -> list[Layer]:
    """Run a network once, as in evaluation, and return its converted layers, those of equal shapes as one.

    Raises:
        ValueError: It has none.
    """
    layers: dict[Any, Layer] = {}
    paths = {m: name for name, m in model.named_modules() if isinstance(m, KWLayer) and m.products is None}
    if not paths:
        raise ValueError("the model has no converted layer to tune")

    def note(module: KWLayer, args: tuple[Tensor, ...], y: Tensor) -> None:
        call = module.call(module.as_images(args[0]))
        if call not in layers:
            seen = args[0].detach().requires_grad_(args[0].requires_grad)
            layers[call] = Layer(paths[module], module, seen, y.detach(), computing_type(seen), training)
        layers[call].count += 1

    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(note) for module in paths]
    try:
        with torch.set_grad_enabled(training):
            model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    for layer in layers.values():
        # Of the layer alone: the memo keeps deepcopy from the cells of the whole network.
        memo = {id(layer.module.warehouse): layer.module.warehouse}
        layer.module = copy.deepcopy(layer.module, memo).train(training)
    return list(layers.values())


def step(
    forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, learned: Mapping[str, Sequence[Tensor]], training: bool
) -> Callable[[], Results]:
    """A function that computes the forward pass of x, and in training the gradients of x and of what is learned.

    They are those of ½ ‖y‖², for the output y that is given, and left out for what requires none. It runs under the
    autocast of its caller, but for the gradients, as training does.
    """
    wanted = {name: [t for t in ts if t.requires_grad] for name, ts in {"the input": [x], **learned}.items()}
    inputs = [t for ts in wanted.values() for t in ts]

    def infer() -> Results:
        with torch.inference_mode():
            return {"outputs": [forward(x)]}

    def train() -> Results:
        with torch.enable_grad():
            found = forward(x)
        results = {"outputs": [found.detach()]}
        if inputs:
            with torch.autocast(x.device.type, enabled=False):
                gradients = iter(torch.autograd.grad(found, inputs, y.to(found.dtype), allow_unused=True))
            results |= {f"gradients of {name}": [next(gradients) for _ in ts] for name, ts in wanted.items()}
        return results

    return train if training else infer


def measure(
    steps: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each step in each round; a round runs every step once, after some rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-warm_up, rounds):
        for name, run in steps.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def tune(model: nn.Module, x: Tensor, *, training: bool, rounds: int = 5) -> list[Layer]:
    """Time every implementation in each converted layer, and let "auto" take the fastest for such images.

    That holds in this process for layers of the same sizes, in the same mode, under the same autocast, on the same
    device; for other images "auto" estimates as before. The network stays as it is, and so do torch's generators.

    An implementation that fails, or whose results differ from those of what is estimated to be fastest by more than
    rounding, is left out with a warning.

    Args:
        model: A converted network, on its device and in its memory layout.
        x: A batch as it will be given.
        training: Whether to time forward and backward, or inference.
        rounds: How often the faster ones are timed; the least time counts.

    Returns:
        The layers of distinct shapes, with `taken`, and `seconds` where that was not known already.

    Raises:
        ValueError: A model without a converted layer.
    """
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        layers = distinct_layers(model, x, training)
        for layer in layers:
            with torch.set_grad_enabled(training):
                call = layer.module.call(layer.images)
            known = tuned(call)
            if known is None:
                layer.seconds = _time(layer, rounds)
            layer.taken = known or _fastest(layer.seconds)
            remember({str(call): layer.taken})
    return layers


def tuned_layers() -> dict[str, str]:
    """All that `tune` has found in this process, in plain values that a checkpoint can hold."""
    return remembered()


def recall(taken: Mapping[str, str]) -> None:
    """Take what `tuned_layers` gave elsewhere; implementations that this version does not have are left out."""
    remember({call: name for call, name in taken.items() if name in ("auto", *NAMES)})


def _time(layer: Layer, rounds: int) -> dict[str, float]:
    """Seconds by implementation, "auto" for the one that is estimated to be fastest."""
    truth = layer.step("auto")
    expected, steps = truth(), {"auto": truth}
    for name in implementations(layer.x.device):
        if name != layer.estimated() and layer.can_try(name):
            steps[name] = layer.step(name)
            if problem := _problem(steps[name], layer, expected):
                warnings.warn(f"{layer.name}: implementation {name!r} is left out: {problem}", stacklevel=3)
                del steps[name]
    first = measure(steps, 1, layer.x.device, warm_up=0)
    bound = _NEAR * min(value for (value,) in first.values())
    near = {name: run for name, run in steps.items() if name == "auto" or first[name][0] <= bound}
    again = measure(near, rounds, layer.x.device, warm_up=0)
    return {name: min(first[name] + again.get(name, [])) for name in steps}


def _fastest(seconds: Mapping[str, float]) -> str:
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < _FASTER * seconds["auto"] else "auto"


def _problem(run: Callable[[], Results], layer: Layer, expected: Results) -> str | None:
    """Why an implementation cannot be taken, if it cannot."""
    try:
        found = run()
    except Exception as e:  # whatever a compiler or a driver says of a kernel that it cannot run
        return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
    # On a GPU products of fp32 may be rounded to TF32, which has as many digits as float16.
    rounded = torch.float16 if layer.x.is_cuda and layer.dtype == torch.float32 else layer.dtype
    bound = _ROUNDING * torch.finfo(rounded).eps ** 0.5
    for name, values in expected.items():
        difference, norm = _norm(found[name], values), _norm(values)
        if not difference <= bound * norm:
            return f"its {name} differ by {difference:.1e}, their norm is {norm:.1e}"
    return None


def _norm(values: Sequence[Tensor | None], others: Sequence[Tensor | None] | None = None) -> float:
    """Of all values together, or of their differences from others; one that is None is zero."""
    others = others or [None] * len(values)
    return sum((_wide(a) - _wide(b)).square().sum().item() for a, b in zip(values, others, strict=True)) ** 0.5


def _wide(value: Tensor | None) -> Tensor:
    if value is None:
        return torch.zeros(())
    return value.to(torch.promote_types(value.dtype, torch.float32))
