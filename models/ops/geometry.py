"""What a convolution's arguments mean: checked once, shared by every implementation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Padding = int | Sequence[int] | Literal["same", "valid"]
PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass(frozen=True)
class Geometry:
    """Stride, padding, dilation and groups of a 1-, 2- or 3-D convolution, one entry per spatial dimension.

    Attributes:
        stride: Steps of the window.
        padding: Pixels added before and after each dimension.
        dilation: Distance of the kernel's taps.
        groups: Number of independent groups of channels.
        padding_mode: As torch's convolutions: zeros, reflect, replicate or circular.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str = "zeros"
    _left: tuple[int, ...] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        equal = self.padding_mode == "zeros" and all(a == b for a, b in self.padding)
        vars(self)["_left"] = tuple(a for a, _ in self.padding) if equal else None

    @classmethod
    def of(
        cls,
        kernel_size: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> "Geometry":
        """Normalise the arguments of a torch convolution.

        Raises:
            ValueError: A value out of range, a sequence of the wrong length, or 'same' with a stride.
        """
        dims = len(kernel_size)
        stride = _spread("stride", stride, dims, low=1)
        dilation = _spread("dilation", dilation, dims, low=1)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, found {padding_mode!r}")
        if groups < 1:
            raise ValueError(f"groups must be at least 1, found {groups}")
        if padding == "same":
            if any(s != 1 for s in stride):
                raise ValueError(f"padding='same' needs stride 1, found {stride}")
            totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
            pairs = tuple((t // 2, t - t // 2) for t in totals)
        elif isinstance(padding, str):
            if padding != "valid":
                raise ValueError(f"padding must be numbers, 'same' or 'valid', found {padding!r}")
            pairs = ((0, 0),) * dims
        else:
            pairs = tuple((p, p) for p in _spread("padding", padding, dims, low=0))
        return cls(stride, pairs, dilation, groups, padding_mode)

    def pad(self, x: Tensor) -> Tensor:
        """Return x (B, C, *spatial) with the padding written out."""
        if not any(p for pair in self.padding for p in pair):
            return x
        flat = [p for pair in reversed(self.padding) for p in pair]
        return F.pad(x, flat, mode=PADDING_MODES[self.padding_mode])

    def split_padding(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return x and the padding left for torch's convolution: all of it, or what remains is written out."""
        return (self.pad(x), (0,) * len(self.padding)) if self._left is None else (x, self._left)

    def written_out(self, x: Tensor) -> tuple[Tensor, "Geometry"]:
        """Return x and the arguments left for a convolution that pads equal zeros on both sides only."""
        if self._left is not None:
            return x, self
        return self.pad(x), Geometry(self.stride, ((0, 0),) * len(self.stride), self.dilation, self.groups)

    def output_size(self, input_size: Sequence[int], kernel_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output.

        Raises:
            ValueError: An input that is smaller than the kernel.
        """
        sizes = zip(input_size, self.padding, self.dilation, kernel_size, self.stride, strict=True)
        size = tuple(output_length(n, k, s, a + b, d) for n, (a, b), d, k, s in sizes)
        if any(n < 1 for n in size):
            raise ValueError(f"an input of {tuple(input_size)} is too small for a kernel of {tuple(kernel_size)}")
        return size


def output_length(length: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """Of a convolution along one dimension, with the padding of both sides together."""
    return (length + padding - dilation * (taps - 1) - 1) // stride + 1


def check_operands(x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    """Raise a ValueError when x (B, Cin, *spatial) and weight (B, Cout, Cin/groups, *kernel) do not fit."""
    dims = len(geometry.stride)
    if x.ndim != dims + 2:
        raise ValueError(
            f"a {dims}-D per-sample convolution needs an input (B, C, {dims} sizes), found {tuple(x.shape)}"
        )
    if weight.ndim != dims + 3:
        raise ValueError(f"kernels must be (B, Cout, Cin/groups, {dims} sizes), found {tuple(weight.shape)}")
    if x.shape[0] == 0:
        raise ValueError(f"the batch is empty: input of shape {tuple(x.shape)}")
    if weight.shape[0] != x.shape[0]:
        raise ValueError(f"one kernel per sample is needed: {x.shape[0]} samples, {weight.shape[0]} kernels")
    if x.shape[1] != weight.shape[2] * geometry.groups or weight.shape[1] % geometry.groups:
        raise ValueError(
            f"kernels {tuple(weight.shape[1:])} with {geometry.groups} groups do not fit {x.shape[1]} input channels"
        )


def _spread(name: str, value: int | Sequence[int], dims: int, low: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or any(not isinstance(v, int) or v < low for v in values):
        raise ValueError(f"{name} must be {dims} whole numbers of at least {low}, found {value!r}")
    return values
