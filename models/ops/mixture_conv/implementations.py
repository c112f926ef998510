"""The ways to compute a convolution with mixed kernels; each says what it can compute and what that should cost."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..context import as_type, exporting
from ..cpu import unavailable
from ..derivatives import Function
from ..geometry import Geometry
from ..images import scaled
from ..per_sample_conv import grouped_conv, per_sample_conv_from_geometry, reference, triton_conv
from ..selection import Implementation
from . import cost, cpp, materialize, mix_inputs
from .authors import authors_mix
from .mixing import mix
from .partition import Partition
from .reference import reference_mix
from .signature import Signature


class Problem(NamedTuple):
    """What is no tensor."""

    partition: Partition
    geometry: Geometry


class MixtureConv(Implementation):
    """y[b] = conv(x[b], W[b]) with W mixed from a bank; arguments and result as `mixture_conv`, in one type."""

    def __call__(self, x: Tensor, alpha: Tensor, bank: Tensor, partition: Partition, geometry: Geometry) -> Tensor:
        """(B, Cin, *spatial) → (B, Cout, *output spatial)."""
        raise NotImplementedError

    def scaled(
        self,
        x: Tensor,
        alpha: Tensor,
        bank: Tensor,
        partition: Partition,
        geometry: Geometry,
        in_scale: Tensor | None,
        out_scale: Tensor | None,
    ) -> Tensor:
        """The same with scales (B, C) or (C,) of the input's and the output's channels, each if there is one."""
        return scaled(self(scaled(x, in_scale), alpha, bank, partition, geometry), out_scale)

    def supports(self, signature: Signature) -> str | None:  # noqa: ARG002
        """As the base class."""
        return None

    def cost(self, signature: Signature) -> float:  # noqa: ARG002
        """As the base class."""
        return math.inf


class Reference(MixtureConv):
    """Loops over samples, parts and terms: the definition, with every kind of derivative."""

    name = "reference"
    operators = "torch"

    def __call__(self, x, alpha, bank, partition, geometry):
        """As the base class."""
        return reference(x, reference_mix(alpha, bank, partition), geometry)


class Grouped(MixtureConv):
    """The authors' formulation: all kernels are mixed and kept, then one convolution with a group for every sample."""

    name = "grouped"
    operators = "torch"

    def __call__(self, x, alpha, bank, partition, geometry):
        """As the base class."""
        return grouped_conv(x, authors_mix(alpha, bank, partition), geometry)

    def workspace(self, signature: Signature) -> int:
        """As the base class."""
        products = signature.terms if signature.partition.mixtures > 1 and not signature.shared else 0
        return (1 + products) * _kernels(signature)


class _WithFunction(MixtureConv, Function):
    """What keeps its arguments for backward, and nothing that grows with samples × kernel."""

    def __call__(self, x, alpha, bank, partition, geometry):
        """As the base class."""
        return self.apply(Problem(partition, geometry), x, alpha, bank)


class Materialize(_WithFunction):
    """All kernels are mixed, and mixed again in backward; each sample is convolved by the best form for the shape.

    Scaled images are not kept for backward either.
    """

    name = "materialize"

    def scaled(self, x, alpha, bank, partition, geometry, in_scale, out_scale):
        """As the base class."""
        padded, geometry = geometry.written_out(x)
        return self.apply(Problem(partition, geometry), padded, alpha, bank, in_scale, out_scale)

    def __call__(self, x, alpha, bank, partition, geometry):
        """As the base class."""
        return self.scaled(x, alpha, bank, partition, geometry, None, None)

    def compute(self, arguments: Problem, x, alpha, bank, in_scale, out_scale):
        """As the base class."""
        partition, geometry = arguments
        y = per_sample_conv_from_geometry(scaled(x, in_scale), mix(alpha, bank, partition), geometry)
        return _in_layout_of(x, scaled(y, out_scale))

    def gradients(self, arguments: Problem, grad, needs: Sequence[bool], x, alpha, bank, in_scale, out_scale):
        """As the base class."""
        return materialize.gradients(grad, needs, x, alpha, bank, in_scale, out_scale, *arguments)

    def cost(self, signature: Signature) -> float:
        """As the base class."""
        return cost.materialize(signature)

    def workspace(self, signature: Signature) -> int:
        """As the base class."""
        return _kernels(signature)


class MixInputs(_WithFunction):
    """Inputs are mixed instead of kernels, for maps of few pixels."""

    name = "mix_inputs"

    def compute(self, arguments: Problem, x, alpha, bank):
        """As the base class."""
        return mix_inputs.mix_inputs(x, alpha, bank, *arguments)

    def gradients(self, arguments: Problem, grad, needs: Sequence[bool], x, alpha, bank):
        """As the base class."""
        return mix_inputs.gradients(grad, needs, x, alpha, bank, *arguments)

    def supports(self, signature: Signature) -> str | None:
        """As the base class."""
        if signature.geometry.groups > 1:
            return "it is a grouped convolution"
        return None if signature.shared else "each part has a bank of its own"

    def cost(self, signature: Signature) -> float:
        """As the base class."""
        return cost.mix_inputs(signature)

    def workspace(self, signature: Signature) -> int:
        """As the base class."""
        partition = signature.partition
        mixed = partition.grid[-2] * signature.terms * math.prod(partition.cell[1:]) * signature.positions
        return signature.images[0] * mixed * signature.dtype.itemsize


class Cpp(_WithFunction):
    """Kernels are mixed and applied tile by tile in C++, on a CPU."""

    name = "cpp"
    fast = True

    def __call__(self, x, alpha, bank, partition, geometry):
        """As the base class."""
        kind = _cpu_type(x.dtype)
        padded, geometry = geometry.written_out(as_type(x, kind))
        y = self.apply(Problem(partition, geometry), padded, as_type(alpha, kind), as_type(bank, kind))
        return as_type(y, x.dtype)

    def compute(self, arguments: Problem, x, alpha, bank):
        """As the base class."""
        return _in_layout_of(x, grouped_conv(x, mix(alpha, bank, arguments.partition), arguments.geometry))

    def forward(self, arguments: Problem, x, alpha, bank):
        """As the base class."""
        return cpp.forward(x, alpha, bank, *arguments)

    def gradients(self, arguments: Problem, grad, needs: Sequence[bool], x, alpha, bank):
        """As the base class."""
        return cpp.gradients(grad, needs, x, alpha, bank, *arguments)

    def supports(self, signature: Signature) -> str | None:
        """As the base class."""
        if signature.exporting:
            return "a graph for export holds torch's own operators"
        if signature.geometry.groups > 1:
            return "it is a grouped convolution"
        if signature.shared and not signature.partition.by_positions:
            return "its cells span several positions of the kernel"
        if signature.gradients and not (signature.shared or cpp.is_of_experts(signature.partition)):
            return "gradients of a bank for each part are in C++ for whole kernels only"
        return unavailable(signature.device, _cpu_type(signature.dtype))

    def cost(self, signature: Signature) -> float:
        """As the base class."""
        return cost.cpp(signature)


class Triton(_WithFunction):
    """All kernels are mixed, and mixed again in backward; one Triton kernel convolves each sample with its own."""

    name = "triton"
    operators = "triton"

    def compute(self, arguments: Problem, x, alpha, bank):
        """As the base class."""
        return triton_conv.triton_conv(x, mix(alpha, bank, arguments.partition), arguments.geometry)

    def supports(self, signature: Signature) -> str | None:
        """As the base class."""
        if signature.exporting:
            return "a graph for export holds torch's own operators"
        if signature.geometry.groups > 1:
            return "it is a grouped convolution"
        if len(signature.geometry.stride) > 2:
            return "its kernels convolve one or two dimensions"
        return triton_conv.unavailable(signature.device, signature.dtype)

    def workspace(self, signature: Signature) -> int:
        """As the base class."""
        return _kernels(signature)


# In the order in which they are preferred where sizes are unknown.
IMPLEMENTATIONS: dict[str, MixtureConv] = {
    implementation.name: implementation
    for implementation in (Materialize(), MixInputs(), Cpp(), Triton(), Grouped(), Reference())
}


def _cpu_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _kernels(signature: Signature) -> int:
    """Bytes of a batch's kernels."""
    return signature.images[0] * math.prod(signature.partition.kernel) * signature.dtype.itemsize


def _in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """The layers that follow should get what they would from a static one."""
    if exporting():
        return y
    if x.stride(1) != 1:
        return y.contiguous()
    pixels = y.movedim(1, -1)
    return y if pixels.is_contiguous() else pixels.contiguous().movedim(-1, 1)
