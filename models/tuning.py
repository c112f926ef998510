"""Implementations by measurement: each is timed in every layer of a network, and "auto" takes the fastest from then on.

What "auto" takes otherwise is estimated, with factors of the processors that they were measured on. On another
processor, and on a GPU above all, measuring is better. Every implementation's results are compared first.
"""

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .convert import dynamic_layers
from .ops.api import DynamicLayer
from .ops.selection import Implementation, case, estimate, measured, remember, remembered

MOST_BYTES = 1 << 30  # implementations that write more than this for one layer are not tried
_FASTER = 0.97  # of the time of what is estimated to be fastest: anything nearer is the clock's
_ROUNDING = 2  # times the root of what a type rounds by: results that differ by more are wrong
_NEAR = 1.5  # times the least time of the first round: anything beyond is not timed again
_UNTRIED = ("reference",)  # loops

Results = dict[str, list[Tensor | None]]  # outputs, and gradients of each kind


@dataclass
class Layer:
    """Layers of one shape in a network.

    Attributes:
        name: Of the first of them.
        module: A copy of it that shares the network's parameters.
        x: Its input, which requires a gradient if it does in the network.
        y: Its output.
        signature: What decides how it is computed.
        learned: Parameters of the network, some of which the layer uses.
        training: Whether they are to be timed in training, forward and backward.
        count: How many there are.
        seconds: By implementation, once they are.
        taken: The fastest of them by `tune`, "auto" where that is what is estimated.
        received: What it was given beside its input.
    """

    name: str
    module: DynamicLayer
    x: Tensor
    y: Tensor
    signature: Any
    learned: list[nn.Parameter]
    training: bool
    count: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    taken: str = "auto"
    received: tuple[Tensor, ...] = ()

    @property
    def candidates(self) -> Mapping[str, Implementation]:
        """The implementations by name."""
        return self.module.candidates()

    def estimated(self) -> str:
        """The implementation that should be the fastest."""
        return estimate(self.signature, self.candidates).name

    def can_try(self, name: str) -> bool:
        """Whether an implementation can compute the layer, and writes no more than `MOST_BYTES`."""
        implementation = self.candidates[name]
        if name in _UNTRIED or implementation.supports(self.signature) is not None:
            return False
        return implementation.workspace(self.signature) <= MOST_BYTES

    def step(self, implementation: str) -> Callable[[], Results]:
        """What computes the layer in one way: see the function `step`."""

        def forward(x: Tensor) -> Tensor:
            self.module.implementation = implementation
            return self.module.forward(x, *self.received)  # without hooks, whose owner does not expect the calls

        return step(forward, self.x, self.y, {"parameters": self.learned}, self.training)


def distinct_layers(model: nn.Module, x: Tensor, training: bool) -> list[Layer]:
    """Run a network once, as in evaluation, and return its layers with several implementations, equal ones as one.

    Raises:
        ValueError: It has none.
    """
    layers: dict[Any, Layer] = {}
    paths = {layer: name for name, layer in dynamic_layers(model).items() if layer.candidates()}
    if not paths:
        raise ValueError("the model has no converted layer to tune")
    learned = list(model.parameters())

    def note(module: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        signature = module.signature(args[0])
        if signature not in layers:
            seen = args[0].detach().requires_grad_(args[0].requires_grad)
            layers[signature] = Layer(paths[module], module, seen, y.detach(), signature, learned, training)
            layers[signature].received = tuple(t.detach() for t in args[1:] or module.received())
        layers[signature].count += 1

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
        # Statistics are the copy's, and parameters the network's: the memo keeps deepcopy from them.
        layer.module = copy.deepcopy(layer.module, {id(p): p for p in learned}).train(training)
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
        results: Results = {"outputs": [found.detach()]}
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
    """Time every implementation in each layer, and let "auto" take the fastest for such images.

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
            known = measured(layer.signature)
            if known is None:
                layer.seconds = _time(layer, rounds)
            layer.taken = known or _fastest(layer.seconds)
            remember({case(layer.signature): layer.taken})
    return layers


def tuned_layers() -> dict[str, str]:
    """All that `tune` has found in this process, in plain values that a checkpoint can hold."""
    return remembered()


def recall(taken: Mapping[str, str]) -> None:
    """Take what `tuned_layers` gave elsewhere; what was measured on another machine or torch is not looked for here."""
    remember(taken)


def _time(layer: Layer, rounds: int) -> dict[str, float]:
    """Seconds by implementation, "auto" for the one that is estimated to be fastest."""
    baseline = layer.step("auto")
    expected, steps = baseline(), {"auto": baseline}
    for name in layer.candidates:
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
    dtype = layer.y.dtype
    rounded = torch.float16 if layer.x.is_cuda and dtype == torch.float32 else dtype
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
