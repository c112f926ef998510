"""Stage 2: every implementation of every operator against the reference in float64, outputs and every gradient.

The reference runs on the CPU. Layers have odd sizes (`odd`), are in training mode and in evaluation, and are computed
in each precision and memory layout; half precision is by autocast, as in training. What is compared is the relative
error of norms. It may be a few times what one rounding error of the input and of every parameter makes, in float64.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing.clock import arithmetic, autocast
from torch import Tensor

from kernelwarehouse.models import DynamicLayer
from kernelwarehouse.models.tuning import Layer, Results, step

from .cases import Case
from .journal import Record
from .odd import odd_layers
from .scope import INTERPRETED, Scope
from .tiles import is_too_large, most_tiles, one_tile

STAGE = "correctness"
REFERENCE = "reference"
_CPU = torch.device("cpu")
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
_EPS = {"fp64": 2.0**-53, "fp32": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
_FACTOR = 8  # times what rounding makes
_ROUNDINGS = 32  # more, of rounding errors
_DRAWS = 2  # of rounding errors
# More for gradients, of the root of a rounding error of few digits: one that changes the sign of a value near zero
# before a ReLU changes a gradient by a jump.
_JUMP = 2


class Compared:
    """One layer, its reference, and how it is computed otherwise.

    Args:
        layer: In fp32 on the CPU.
        device: Where it is compared.
    """

    def __init__(self, layer: Layer, device: torch.device):
        self.layer, self.device = layer, device
        self._expected: dict[bool, Results] = {}
        self._rounded: dict[tuple[float, bool], dict[str, float]] = {}
        self._signatures: dict[str, Any] = {}

    def unsupported(self, implementation: str, precision: str) -> str | None:
        """Why an implementation cannot compute the layer on the device in a precision; None if it can."""
        if INTERPRETED and precision == "bf16":
            return "Triton's interpreter takes bfloat16 for whole numbers"
        if precision not in self._signatures:
            module, x, _ = self._copy(self.device, _type(precision))
            with arithmetic(precision), autocast(precision, self.device):
                self._signatures[precision] = module.signature(x.requires_grad_())
        return self.layer.candidates[implementation].supports(self._signatures[precision])

    def _copy(self, device: torch.device, dtype: torch.dtype) -> tuple[DynamicLayer, Tensor, Tensor]:
        """The layer, its input, and its output, whose values are taken for a gradient."""
        x, y = (t.detach().to(device, dtype) for t in (self.layer.x, self.layer.y))
        return copy.deepcopy(self.layer.module).to(device, dtype), x, y

    def _run(
        self,
        device: torch.device,
        dtype: torch.dtype,
        implementation: str,
        layout: str,
        training: bool,
        noise: float = 0,
    ) -> Results:
        module, x, y = self._copy(device, dtype)
        if x.ndim == 4:
            x, y = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, y))
        if noise:
            with torch.no_grad():
                for value in (x, *module.parameters()):
                    value.mul_(1 + noise * torch.randn_like(value))
        module.train(training).implementation = implementation
        leaves = {name: [p] for name, p in module.named_parameters()}
        return step(module.forward, x.requires_grad_(), y, leaves, training=True)()

    def expected(self, training: bool) -> Results:
        """By the reference, in float64 on the CPU."""
        if training not in self._expected:
            self._expected[training] = self._run(_CPU, torch.float64, REFERENCE, "NCHW", training)
        return self._expected[training]

    def errors(self, found: Results, training: bool) -> dict[str, float]:
        """Relative error of each result; infinite where one is missing, of the wrong shape, or not finite."""
        expected = self.expected(training)
        scale = max(_norm(values) for values in expected.values())
        return {name: _error(values, expected[name], 1e-6 * scale) for name, values in found.items()}

    def bounds(self, precision: str, training: bool) -> dict[str, float]:
        """By how much each result may be off."""
        eps = _EPS[precision]
        if (eps, training) not in self._rounded:
            torch.manual_seed(0)
            draws = [self._run(_CPU, torch.float64, "auto", "NCHW", training, eps) for _ in range(_DRAWS)]
            errors = [self.errors(draw, training) for draw in draws]
            self._rounded[eps, training] = {name: max(e[name] for e in errors) for name in errors[0]}
        jump = _JUMP * eps**0.5 if eps > 1e-6 else 0.0
        return {
            name: _FACTOR * error + _ROUNDINGS * eps + (0 if name == "outputs" else jump)
            for name, error in self._rounded[eps, training].items()
        }

    def compare(self, implementation: str, precision: str, tile: int) -> Record:
        """Compare in all layouts, in training and evaluation: the worst of all results, and the tile that was tried."""
        layouts = list(LAYOUTS) if self.layer.x.ndim == 4 else ["NCHW"]
        dtype, worst = _type(precision), {"share": -1.0}
        for layout, training in itertools.product(layouts, (True, False)):
            with one_tile(tile), arithmetic(precision), autocast(precision, self.device):
                found = self._run(self.device, dtype, implementation, layout, training)
            bounds = self.bounds(precision, training)
            for name, error in self.errors(found, training).items():
                if not error / bounds[name] <= worst["share"]:
                    about = {"of": name, "layout": layout, "mode": "training" if training else "evaluation"}
                    worst = {"share": error / bounds[name], "error": error, "bound": bounds[name], **about}
        return {**worst, "tile": tile, "wrong": not worst["share"] <= 1}

    def compare_by_any_tile(self, implementation: str, precision: str, tile: int) -> Record:
        """`compare` with the first tile from `tile` on, counted round, that fits on the GPU."""
        for number in range(tile, tile + most_tiles()):
            try:
                return self.compare(implementation, precision, number)
            except Exception as e:
                if not is_too_large(e):
                    raise
        raise RuntimeError("none of its tiles fits on the GPU")


def _type(precision: str) -> torch.dtype:
    """Of parameters and images."""
    return torch.float64 if precision == "fp64" else torch.float32


def _norm(values: list[Tensor | None]) -> float:
    return sum(v.double().square().sum().item() for v in values if v is not None) ** 0.5


def _error(found: list[Tensor | None], expected: list[Tensor | None], floor: float) -> float:
    (a,), (b,) = found, expected
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    if a.shape != b.shape or not a.isfinite().all():
        return float("inf")
    return _norm([a.cpu().double() - b]) / max(_norm([b]), floor)


def cases(scope: Scope) -> Iterator[Case]:
    """Triton's kernels first, then the others; of each, all layers in each precision."""
    compared = {name: Compared(layer, scope.device) for name, layer in odd_layers(scope.odd)}
    names = {name: c.layer.candidates for name, c in compared.items()}
    every = dict.fromkeys(i for candidates in names.values() for i in candidates.values())
    for implementation in sorted(every, key=lambda i: i.operators != "triton"):
        number = 0
        for precision in scope.precisions:
            if precision == "tf32" and scope.device.type == "cpu":
                continue
            for name, candidates in names.items():
                if candidates.get(implementation.name) is not implementation:
                    continue
                if compared[name].unsupported(implementation.name, precision):
                    continue
                run = _comparison(compared[name], implementation.name, precision, number)
                number += 1
                yield Case(f"{implementation.name} {precision} {name}", run)


def _comparison(compared: Compared, implementation: str, precision: str, tile: int) -> Callable[[], Record]:
    return lambda: compared.compare_by_any_tile(implementation, precision, tile)
